"""Coupling groups as JSON and as a Graphviz graph."""

import json
import re

import torch
from torch import nn

from tersor.graph import CouplingGroup, Member, groups
from tersor.graph.export import to_dict, to_dot, to_json
from tests.networks import IMAGE, Residual
from tests.torchvision_stub import import_torchvision

GROUPS = (
    CouplingGroup(
        8,
        (
            Member("conv.weight", 0, 0, 8, "written"),
            Member("bn.weight", 0, 0, 8, "carried"),
            Member("bn.bias", 0, 0, 8, "carried"),
            Member("fc.weight", 1, 4, 8, "read"),
        ),
        None,
    ),
    CouplingGroup(3, (Member("conv.weight", 1, 0, 3, "read"),), 'is the "input"'),
    CouplingGroup(5, (Member("fc.weight", 0, 0, 5, "written"),), "is the model's own output"),
    CouplingGroup(2, (Member("fc.weight", 1, 2, 2, "read"),), 'is the "input"'),
)
STATEMENT = re.compile(
    r"""(?:
        rankdir=TB
        | (?:node|edge)[ ]\[.*\]
        | (?P<node>g\d+)[ ]\[label="(?P<text>(?:[^"\\]|\\.)*)"(?P<style>(?:,[ ]\w+="[^"]*")*)\]
        | (?P<tail>g\d+)[ ]->[ ](?P<head>g\d+)[ ]\[label="(?P<tensors>(?:[^"\\]|\\.)*)"(?P<plain>,[ ]dir=none)?\]
    );""",
    re.VERBOSE,
)


def parsed(source: str) -> tuple[dict[str, list[str]], set[str], dict[tuple[str, str], list[str]]]:
    """Lines of each node, the grey nodes, and the tensors of each edge; fails where the source is not DOT."""
    first, *body, last = source.splitlines()
    assert (first, last) == ("digraph coupling {", "}")
    nodes: dict[str, list[str]] = {}
    grey: set[str] = set()
    edges: dict[tuple[str, str], list[str]] = {}
    for line in body:
        found = STATEMENT.fullmatch(line.strip())
        assert found, line
        if found["node"]:
            nodes[found["node"]] = found["text"].split(r"\l")[:-1]
            grey |= {found["node"]} if "gray" in found["style"] else set()
        elif found["tail"]:
            assert {found["tail"], found["head"]} <= set(nodes)
            edges[found["tail"], found["head"]] = found["tensors"].split(r"\l")[:-1]
    return nodes, grey, edges


def test_json_says_what_the_groups_say(tmp_path):
    text = to_json(GROUPS, tmp_path / "groups.json")
    assert json.loads(text) == to_dict(GROUPS)
    assert (tmp_path / "groups.json").read_text() == text
    first = to_dict(GROUPS)[0]
    assert (first["size"], first["frozen"], len(first["members"])) == (8, None, 4)
    assert first["members"][3] == {"name": "fc.weight", "dim": 1, "offset": 4, "count": 8, "role": "read"}


def test_a_box_lists_its_members_and_a_shared_tensor_is_an_arrow(tmp_path):
    source = to_dot(GROUPS, tmp_path / "groups.dot")
    assert (tmp_path / "groups.dot").read_text() == source
    nodes, grey, edges = parsed(source)
    assert nodes["g0"] == [
        "group 0: 8 choices",
        "conv.weight dim 0 [0:8] written",
        "bn.weight, bias dim 0 [0:8] carried",
        "fc.weight dim 1 [4:12] read",
    ]
    assert grey == {"g1", "g2"}
    assert nodes["g1"] == [
        r"groups 1, 3: frozen, it is the \"input\"",
        "conv.weight dim 1 [0:3] read",
        "fc.weight dim 1 [2:4] read",
    ]
    assert edges == {("g1", "g0"): ["conv.weight"], ("g0", "g2"): ["fc.weight"], ("g1", "g2"): ["fc.weight"]}


def test_a_long_frozen_box_is_cut_short():
    members = tuple(Member(f"layer{number}.weight", 0, 0, 4, "written") for number in range(20))
    nodes, _, _ = parsed(to_dot([CouplingGroup(4, members, "meets 'sort'"), CouplingGroup(4, members, None)]))
    assert len(nodes["g0"]) == 1 + 20
    assert nodes["g1"][-2:] == ["layer7.weight dim 0 [0:4] written", "and 12 more"]


def test_a_table_that_nothing_computes_with_is_a_plain_line():
    table = [CouplingGroup(4, (Member("table", dim, 0, 4, "carried"),), None) for dim in (0, 1)]
    assert '  g0 -> g1 [label="table\\l", dir=none];' in to_dot(table).splitlines()


def test_no_groups():
    assert parsed(to_dot([])) == ({}, set(), {})
    assert json.loads(to_json([])) == []


def test_arrows_point_the_way_the_model_computes():
    chain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    found = groups(chain, torch.randn(2, 3))
    nodes, grey, edges = parsed(to_dot(found.groups))
    assert (len(nodes), len(grey)) == (4, 2)
    names = {text[1].split()[0]: node for node, text in nodes.items() if node not in grey}
    assert edges[names["0.weight"], names["2.weight"]] == ["2.weight"]


def test_every_tensor_of_several_groups_is_an_arrow():
    found = groups(Residual(), torch.randn(IMAGE)).groups
    homes: dict[str, set[int]] = {}
    for number, group in enumerate(found):
        for member in group.members:
            homes.setdefault(member.name, set()).add(number)
    _, _, edges = parsed(to_dot(found))
    drawn = {name for tensors in edges.values() for name in tensors}
    assert drawn == {name for name, own in homes.items() if len(own) > 1}


def test_resnet_18_is_a_readable_picture():
    net = import_torchvision().models.resnet18()
    nodes, grey, edges = parsed(to_dot(groups(net, torch.zeros(1, 3, 64, 64)).groups))
    assert (len(nodes), len(grey), len(edges)) == (14, 2, 21)
    assert max(len(text) for text in nodes.values()) <= 12
    assert max(len(line) for text in nodes.values() for line in text) <= 100
