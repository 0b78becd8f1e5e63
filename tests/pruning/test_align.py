"""Masks that follow another target's mask."""

import pytest
import torch
from torch import nn

from tersor.errors import MaskError
from tersor.pruning import L1NormPruner
from tersor.pruning.align import reduce_to
from tests.networks import IMAGE, Residual, randomize


def follows(module=None, target="weight", dims=(0,), **keys):
    align = {"target_name": target, "dims": list(dims)}
    return {"align": align if module is None else {"module_name": module, **align}, **keys}


def test_dimensions_come_in_the_order_asked_for():
    mask = torch.tensor([[[1, 0], [0, 0], [1, 1]], [[0, 0], [0, 0], [0, 1]]], dtype=torch.bool)
    assert reduce_to(mask, [0], (2, 3, 2)).tolist() == [True, True]
    assert reduce_to(mask, [1], (2, 3, 2)).tolist() == [True, False, True]
    assert reduce_to(mask, [1, 0], (2, 3, 2)).tolist() == mask.any(2).T.tolist()
    assert reduce_to(torch.ones(2, 1, dtype=torch.bool), [1], (2, 3)).shape == (3,)
    with pytest.raises(MaskError, match=r"no dimensions \(2,\)"):
        reduce_to(mask[0], [2], (3, 2))


def test_a_batch_norm_follows_its_convolution():
    model = randomize(Residual())
    config_list = [
        {"op_names": ["conv1"], "sparse_ratio": 0.5},
        {"op_names": ["bn1"], "target_settings": {"weight": follows("conv1"), "bias": follows(target="weight")}},
    ]
    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = masks["conv1"]["weight"].any((1, 2, 3))
    assert int(kept.sum()) == 5
    assert torch.equal(masks["conv1"]["bias"], kept)
    assert torch.equal(masks["bn1"]["weight"], kept)
    assert torch.equal(masks["bn1"]["bias"], kept)


def test_a_consumer_follows_along_its_own_first_dimension():
    """A transposed convolution has its inputs first: they follow the producer's outputs."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2)))
    config_list = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_names": ["weight"], "target_settings": {"weight": follows("0")}},
    ]
    pruner = L1NormPruner(model, config_list)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = masks["0"]["weight"].any((1, 2, 3))
    assert torch.equal(masks["1"]["weight"], kept[:, None, None, None].expand(8, 4, 2, 2))


@pytest.mark.parametrize(
    ("layer", "shape", "mask_shape"),
    [
        (nn.Conv2d(3, 8, 1), (2, 3, 4, 8), (1, 8, 1, 1)),
        (nn.Conv2d(3, 8, 1), (3, 4, 8), (8, 1, 1)),
        (nn.Conv1d(3, 8, 1), (2, 3, 8), (1, 8, 1)),
        (nn.Linear(3, 8), (2, 3), (1, 8)),
        (nn.Linear(3, 8), (2, 8, 3), (1, 1, 8)),  # eight tokens of eight channels
    ],
)
def test_an_output_follows_its_weight_where_the_channels_stand(layer, shape, mask_shape):
    model = randomize(nn.Sequential(layer, nn.ReLU()))
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5, "target_settings": {"weight": {}, "_output_": follows()}}]
    pruner = L1NormPruner(model, config_list)
    pruner.track_forward(torch.randn(shape))
    _, masks = pruner.compress()
    out = model(torch.randn(shape))
    pruner.unwrap_model()
    kept = masks["0"]["weight"].flatten(1).any(1)
    assert masks["0"]["_output_0"].shape == mask_shape
    assert torch.equal(masks["0"]["_output_0"].flatten(), kept)
    assert not (out * ~masks["0"]["_output_0"]).any()


def test_an_activation_follows_the_layer_before_it():
    """A ReLU does not say where its channels are; the source does."""
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    config_list = [
        {"op_names": ["0"], "sparse_ratio": 0.5},
        {"op_names": ["1"], "target_names": ["_output_0"], "target_settings": {"_output_0": follows("0")}},
    ]
    pruner = L1NormPruner(model, config_list, example_inputs=torch.randn(2, 6, 4))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert masks["1"]["_output_0"].shape == (1, 1, 6)
    assert int(masks["1"]["_output_0"].sum()) == 3


def test_add_takes_masked_scores_out_of_a_softmax():
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1)))
    config_list = [
        {
            "op_names": ["0"],
            "target_names": ["weight", "_output_0"],
            "sparse_ratio": 0.5,
            "target_settings": {"weight": {"apply_method": "bypass"}, "_output_0": follows(apply_method="add")},
        }
    ]
    pruner = L1NormPruner(model, config_list)
    x = torch.randn(3, 4)
    pruner.track_forward(x)
    plain = model[0](x)
    _, masks = pruner.compress()
    probabilities = model(x)
    pruner.unwrap_model()
    kept = masks["0"]["_output_0"].flatten()
    assert int(kept.sum()) == 3
    assert not probabilities[:, ~kept].any()
    torch.testing.assert_close(probabilities[:, kept], torch.softmax(plain[:, kept], -1))


def test_the_shape_of_an_output_must_be_known():
    model = randomize(nn.Sequential(nn.Linear(4, 6)))
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5, "target_settings": {"weight": {}, "_output_0": follows()}}]
    pruner = L1NormPruner(model, config_list)
    with pytest.raises(MaskError, match=r"0\._output_0.*track_forward"):
        pruner.compress()
    assert pruner.get_masks() == {}
    pruner.unwrap_model()


def test_a_mask_that_does_not_fit_is_refused():
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    settings = {"weight": {}, "_output_0": follows("0")}
    config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}, {"op_names": ["1"], "target_settings": settings}]
    pruner = L1NormPruner(model, config_list)
    pruner.track_forward(torch.randn(IMAGE[0], 4))
    with pytest.raises(MaskError, match=r"shape \(6,\) does not fit a target of shape \(2, 2\)"):
        pruner.compress()
    pruner.unwrap_model()
