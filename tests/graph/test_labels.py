import networkx
import numpy as np
import pytest
import torch

from tersor.graph.labels import Ledger, connected_components


@pytest.mark.parametrize("seed", range(5))
def test_components_equal_networkx(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 300, 200), rng.integers(0, 300, 200)
    graph = networkx.Graph()
    graph.add_nodes_from(range(300))
    graph.add_edges_from(zip(a.tolist(), b.tolist(), strict=True))
    expected = np.zeros(300, dtype=int)
    for component in networkx.connected_components(graph):
        expected[list(component)] = min(component)
    assert connected_components(300, a, b).tolist() == expected.tolist()


def test_a_chain_is_one_component():
    count = 5000
    order = np.random.default_rng(0).permutation(count)
    assert connected_components(count, order[:-1], order[1:]).max() == 0


def test_joins_and_freezes():
    ledger = Ledger()
    first = ledger.add_axis(("a",), torch.zeros(4), 0)
    second = ledger.add_axis(("b",), torch.zeros(4), 0)
    ledger.join(first, second.flip(0), "is joined")
    ledger.freeze(second[:1], "is stuck")
    found = ledger.solve()
    classes, reasons = found.of, found.reasons
    assert classes[ledger.axes[0].span].tolist() == classes[ledger.axes[1].span][::-1].tolist()
    assert [reasons.get(int(c)) for c in classes[first.numpy()]] == [None, None, None, "is stuck"]


def test_a_partner_that_nothing_controls_freezes():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(3), 0)
    ledger.join(labels, torch.tensor([0, 0, int(labels[2])]), "meets the input")
    found = ledger.solve()
    classes, reasons = found.of, found.reasons
    assert [reasons.get(int(c)) for c in classes[labels.numpy()]] == ["meets the input", "meets the input", None]
    assert len(set(classes[labels.numpy()].tolist())) == 3


def test_rows_are_tied():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(6), 0)
    assert ledger.tie(labels.reshape(2, 3), [1]).tolist() == [[1], [4]]
    classes = ledger.solve().of
    assert len(set(classes[labels[:3].numpy()])) == len(set(classes[labels[3:].numpy()])) == 1
    assert classes[1] != classes[4]


def test_a_field_becomes_a_product_along_its_longest_dimension():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(6), 0)
    ledger.must_be_product(labels.reshape(2, 3))
    classes = ledger.solve().of
    assert classes[labels.numpy()].tolist() == [1, 2, 3, 1, 2, 3]


def test_a_field_whose_heads_are_already_tied_stays():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(6), 0)
    ledger.must_be_product(labels.reshape(2, 3))
    ledger.tie(labels.reshape(2, 3), [1])
    assert ledger.solve().of[labels.numpy()].tolist() == [1, 1, 1, 4, 4, 4]


def test_an_axis_of_one_class_stays():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(3), 0)
    ledger.tie(labels, [0])
    assert ledger.solve().reasons[1] == "lives and dies with all of a dim 0"


def test_what_reaches_no_output_bends_nothing():
    ledger = Ledger()
    labels = ledger.add_axis(("a",), torch.zeros(3), 0)
    ledger.clock = 1
    ledger.bend(labels, "is averaged")
    assert ledger.solve(np.array([False, True])).bent == dict.fromkeys([1, 2, 3], "is averaged")
    assert ledger.solve(np.array([False, False])).bent == {}
