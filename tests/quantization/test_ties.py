"""A parameter that several modules share is one tensor for every quantizer."""

import pytest
import torch
from torch import nn

from tersor.errors import ConflictError
from tersor.quantization import AWQQuantizer, BNNQuantizer, DoReFaQuantizer, PtqQuantizer, QATQuantizer

TOKENS = torch.arange(7).view(1, 7)


class Tied(nn.Module):
    """A language model in small: its head has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.mix(self.embed(tokens)).relu())


def weights(*names, dtype="int3"):
    return [{"op_names": list(names), "target_names": ["weight"], "quant_dtype": dtype}]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (PtqQuantizer, "int3"),
        (AWQQuantizer, "int3"),
        (QATQuantizer, "int3"),
        (DoReFaQuantizer, "int3"),
        (DoReFaQuantizer, "uint1"),
        (BNNQuantizer, "int1"),
    ],
)
@pytest.mark.parametrize("name", ["embed", "head"])
def test_what_is_written_into_a_tied_weight_is_what_was_simulated(kind, dtype, name):
    if kind is AWQQuantizer and name == "embed":
        pytest.skip("AWQ rounds weights of linear layers and convolutions")
    model, config = Tied().eval(), weights(name, dtype=dtype)
    if issubclass(kind, (PtqQuantizer, AWQQuantizer)):
        quantizer = kind(model, config, calibration=[TOKENS])
        quantizer.compress()
    else:
        quantizer = kind(model, config)
        quantizer.start()
        model(TOKENS)
        quantizer.finish()
    assert torch.equal(model.embed.weight, model.head.weight)
    simulated = model(TOKENS)
    quantizer.unwrap_model(bake=True)
    assert model.embed.weight is model.head.weight
    assert torch.equal(model(TOKENS), simulated)


def test_two_names_of_one_tensor_are_refused_also_of_two_quantizers():
    with pytest.raises(ConflictError, match=r"head.weight: is the tensor of embed.weight as well.*one of its names"):
        PtqQuantizer(Tied(), weights("embed", "head"))
    model = Tied()
    first = QATQuantizer(model, weights("embed"))
    with pytest.raises(ConflictError, match=r"head.weight: is the tensor of embed.weight as well"):
        PtqQuantizer.from_compressor(first, weights("mix", "head"))
    assert [target.name for target, _ in first.transforms()] == ["embed.weight"]
    assert not nn.utils.parametrize.is_parametrized(model.mix)
