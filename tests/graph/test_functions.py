import copy
import io
import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from tersor.config import parse_config_list
from tersor.errors import UnmatchedError
from tersor.graph import functions_as_modules
from tersor.graph.operations import Concat, FunctionalLinear, FunctionalNorm, Sub, masked, zero_where_all_is_masked
from tersor.quantization import PtqQuantizer
from tersor.targets import resolve_targets
from tests.networks import IMAGE, IMAGE_NETWORKS, Dense, LiteralView, Residual, randomize


class Attention(nn.Module):
    """A block of a transformer, with attention written as steps or as one function."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.fused = fused

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * 4**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.out(F.gelu(mixed.transpose(1, 2).flatten(2)))


class Transformer(nn.Module):
    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList([Attention(fused), Attention(fused)])
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Called(nn.Module):
    """A function of two tensors, as a model."""

    def __init__(self, function) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 1.0]))
        self.function = function

    def forward(self, *inputs):
        return self.function(*(x * self.scale for x in inputs))


def modules_made(result, model):
    """The type of each module that is not the model's own, by name."""
    theirs = set(model.modules())
    return {n: type(m).__name__ for n, m in result.named_modules() if m not in theirs and not any(m.children()) and n}


@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, LiteralView, Transformer])
def test_outputs_and_gradients_are_the_models(network):
    model = randomize(network()).train()
    example, fresh = (torch.randn(IMAGE), torch.randn(5, *IMAGE[1:])) if network is not Transformer else (
        torch.randn(2, 6, 3),
        torch.randn(5, 6, 3),
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = functions_as_modules(model, example)
    assert result.training
    assert result.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert result.state_dict()[name].data_ptr() == value.data_ptr()
    assert torch.equal(result.eval()(fresh), model.eval()(fresh))

    twin = copy.deepcopy(result)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    gradients = []
    for trained in (model, twin):
        trained.train()
        trained(fresh).square().sum().backward()
        gradients.append({name: p.grad for name, p in trained.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_names_say_where_and_what():
    model = Residual()
    assert modules_made(functions_as_modules(model, torch.randn(IMAGE)), model) == {
        **{f"relu{end}": "ReLU" for end in ("", "_1", "_2", "_3")},
        "add": "Add",
        "add_1": "Add",
        "mean": "Mean",
    }
    model = Transformer()
    made = modules_made(functions_as_modules(model, torch.randn(2, 6, 3)), model)
    block = {"mul": "Mul", "matmul": "MatMul", "softmax": "Softmax", "matmul_1": "MatMul", "gelu": "GELU", "add": "Add"}
    assert made == {**{f"blocks.{i}.{k}": v for i in (0, 1) for k, v in block.items()}, "mean": "Mean"}
    model = Dense()
    concats = [m for m in functions_as_modules(model, torch.randn(IMAGE)).modules() if isinstance(m, Concat)]
    assert [concat.inputs for concat in concats] == [2, 3]


def test_a_name_that_the_model_has_is_not_taken():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.add, self.mul_factor = nn.ReLU(), 1.0, nn.Linear(2, 2)
            self.add_1 = nn.Linear(2, 2)  # it is never called

        def forward(self, x):
            return self.relu(F.relu(self.mul_factor(x)) + self.add)

    model = Named()
    result = functions_as_modules(model, torch.zeros(1, 2))
    assert modules_made(result, model) == {"relu_1": "ReLU", "add_2": "Add"}
    assert not hasattr(model, "relu_1")


FUNCTIONS = {
    "numbers": (lambda x, y: 2 - (1 + x) * 3 / 7 - y, "Add Mul Div Sub Sub"),
    "reversed": (lambda x, y: 1 / (x + 3) - torch.rsub(y, 2, alpha=3), "Add Div Sub Sub"),
    "methods": (lambda x, y: x.add(y, alpha=2).sub(y).mul(y).div(y + 9), "Add Sub Mul Add Div"),
    "keywords": (lambda x, y: torch.matmul(other=y.T, input=x), "MatMul"),
    "products": (
        lambda x, y: torch.mm(x, y.T) + torch.bmm(x[None], y.mT[None])[0] + x @ y.T,
        "MatMul MatMul Add MatMul Add",
    ),
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y), "Einsum"),
    "twice": (
        lambda x, y: torch.stack([x, x, y]).mean((0, 1), keepdim=True) + torch.cat((y, y), 1).sum(),
        "Stack Mean Concat Sum Add",
    ),
    "softmax": (
        lambda x, y: F.softmax(x, -1) + torch.softmax(y, 0) + x.softmax(1, dtype=torch.float64),
        "Softmax Softmax Add Softmax Add",
    ),
    "activations": (
        lambda x, y: F.gelu(F.silu(F.hardswish(x)), approximate="tanh").tanh().sigmoid() + F.leaky_relu(y, 0.3),
        "Hardswish SiLU GELU Tanh Sigmoid LeakyReLU Add",
    ),
    "pools": (
        lambda x, y: F.max_pool1d(F.avg_pool1d(x[None], 2, 1), 2) + F.adaptive_avg_pool1d(y[None], 1),
        "AvgPool1d MaxPool1d AdaptiveAvgPool1d Add",
    ),
    "norm": (lambda x, y: F.layer_norm(x, (4,), y[0], None, 1e-3), "FunctionalNorm"),
    "linear": (lambda x, y: F.linear(x, y, y[:, 0]), "FunctionalLinear"),
    "conv": (lambda x, y: F.conv1d(x[None], y.view(3, 1, 4)[:, :, :2], groups=3), "FunctionalConv"),
    "resize": (lambda x, y: F.interpolate(x[None], size=y.shape[0] * 3, mode="linear"), "Interpolate"),
    "in place": (lambda x, y: F.relu((x + 1).add_(y), inplace=True).mul_(2), "Add Add ReLU Mul"),
    "augmented": (lambda x, y: augmented(x + 0, y), "Add Add Mul"),
}  # fmt: skip


def augmented(x, y):
    x += y
    x *= y
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_form_of_call_becomes_a_module_and_computes_the_same_bits(name):
    function, kinds = FUNCTIONS[name]
    model = Called(function)
    result = functions_as_modules(model, (torch.randn(3, 4), torch.randn(3, 4)))
    inputs = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(result(*inputs), model(*inputs))
    assert list(modules_made(result, model).values())[2:] == kinds.split()  # the first two scale the inputs
    assert torch.equal(copy.deepcopy(result)(*inputs), model(*inputs))


class Writes(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        if self.kind == "input":
            return x.add_(1) * 2
        y = self.fc(x)
        view = y[:, :2]
        if self.kind == "read again":
            return y.mul_(3) + view.sum()
        if self.kind == "type":
            z = y.half()
            return z.add_(y)
        return y.t_().unsqueeze(0)


@pytest.mark.parametrize("kind", ["input", "read again", "type", "shape"])
def test_writes_that_a_module_cannot_stand_for_stay(kind):
    model = Writes(kind)
    result = functions_as_modules(model, torch.randn(3, 4))
    x = torch.randn(3, 4)
    expected, actual = model(x.clone()), result(written := x.clone())
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert torch.equal(written, x + 1 if kind == "input" else x)


def test_a_value_that_nobody_reads_is_no_other_name_for_the_memory():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.Identity()  # a norm that was folded

        def forward(self, x):
            out = self.norm(self.conv(x))
            out += x
            return out

    model, x = Residual().eval(), torch.randn(2, 2, 3, 3)
    result = functions_as_modules(model, x)
    assert modules_made(result, model) == {"add": "Add"}
    assert torch.equal(result(x), model(x))


def test_dropout_stays_dropout_in_training_and_shared_code_gets_a_module_a_call():
    class Drops(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training) + 1

    shared = Drops()
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    result = functions_as_modules(model, torch.randn(2, 4))
    assert list(modules_made(result, model)) == ["0.dropout", "0.add", "0.dropout_1", "0.add_1"]
    x = torch.randn(64, 4)
    outputs = [torch.manual_seed(3) and trained(x) for trained in (model.train(), result.train())]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.eval()(x))


def attend(q, k, v, **options):
    """Attention by its formula, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    if options.get("enable_gqa"):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (options.get("scale") or 1 / math.sqrt(q.shape[-1]))
    mask = options.get("attn_mask")
    if options.get("is_causal"):
        mask = torch.ones(scores.shape[-2:]).tril().bool()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - top).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30) @ v


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": MASK},
        {"attn_mask": torch.zeros(MASK.shape).masked_fill(~MASK, -math.inf)},
        {"attn_mask": torch.arange(15.0).view(3, 5)},
        {"enable_gqa": True},
    ],
    ids=str,
)
def test_attention_is_taken_apart(options):
    model = Called(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
    heads = 2 if options.get("enable_gqa") else 4
    shapes = (2, 4, 3, 4), (2, heads, 5, 4), (2, heads, 5, 4)
    result = functions_as_modules(model, tuple(map(torch.randn, shapes)))
    kinds = list(modules_made(result, model).values())
    assert kinds[3:] == ["Mul", "MatMul", "Softmax", "MatMul"]
    inputs = [torch.randn(3, *shape[1:], requires_grad=True) for shape in shapes]
    actual = result(*inputs)
    torch.testing.assert_close(actual, model(*inputs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        actual, attend(*(x * model.scale for x in inputs), **options).float(), rtol=1e-5, atol=1e-6
    )
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(actual.sum(), inputs))


def test_a_learned_bias_of_attention_is_a_target_and_dropout_keeps_it_whole():
    class Biased(nn.Module):
        def __init__(self, dropout):
            super().__init__()
            self.bias, self.dropout = nn.Parameter(torch.randn(5, 5)), dropout

        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=self.bias, dropout_p=self.dropout)

    result = functions_as_modules(model := Biased(0.0), torch.randn(1, 2, 5, 3))
    assert list(modules_made(result, model).values()) == ["Mul", "MatMul", "Add", "Softmax", "MatMul"]
    x = torch.randn(2, 2, 5, 3)
    torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-6)
    result = functions_as_modules(Biased(0.1), x)
    assert result.meta["functions"] == {"scaled_dot_product_attention": 1}


class Masked(nn.Module):
    """Scores with a mask, which no grid holds, in one of the ways in which models write it."""

    def __init__(self, way) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(4, 4), way
        self.register_buffer("shift", torch.zeros(3, 3).masked_fill(torch.eye(3).bool(), -100.0))
        self.bias = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, keep):
        x = self.fc(x)
        scores = x @ x.mT
        lowest = torch.finfo(x.dtype).min
        if self.way == "sum":
            scores = scores + (1 - keep.float()) * lowest
        elif self.way == "buffer":
            scores = self.shift + scores
        elif self.way == "fill":
            scores = scores.masked_fill(~keep, -math.inf)
        elif self.way == "joined":
            scores = scores + (self.bias + (1 - keep.float()) * lowest)
        elif self.way == "bias":
            scores = scores + self.bias
        return scores.softmax(-1) @ x


@pytest.mark.parametrize(("way", "sums"), [("sum", 0), ("buffer", 0), ("fill", 0), ("joined", 0), ("bias", 1)])
def test_masks_stay_functions_and_biases_do_not(way, sums):
    model = Masked(way)
    keep = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    example = torch.randn(2, 3, 4), keep
    result = functions_as_modules(model, example)
    kinds = list(modules_made(result, model).values())
    assert [kind for kind in kinds if kind not in ("Sub", "Mul")] == ["MatMul", *["Add"] * sums, "Softmax", "MatMul"]
    assert torch.equal(result(*example), model(*example))


def test_where_everything_is_masked_the_weights_are_zero_and_gradients_finite():
    scores = torch.randn(3, 5, requires_grad=True)
    for mask in (MASK, torch.zeros(3, 5).masked_fill(~MASK, -math.inf)):
        weights = zero_where_all_is_masked(masked(scores, mask).softmax(-1), mask)
        assert torch.equal(weights != 0, MASK)
        assert torch.autograd.grad(weights.square().sum(), scores)[0].isfinite().all()


def test_sizes_integers_and_bools_are_given_by_name():
    class Mixed(nn.Module):
        def forward(self, x, ids):
            return x * x.shape[0] ** -0.5 * (x > 0) + (ids + 1)[:, None]

    model = Mixed()
    result = functions_as_modules(model, (torch.randn(3, 4), torch.arange(3)))
    made = modules_made(result, model)
    assert made == {"mul": "Mul", "mul_1": "Mul", "add": "Add"}  # the sum of integers stays a function
    assert [result.get_submodule(name).inputs for name in made] == [1, 1, 1]
    x, ids = torch.randn(7, 4), torch.arange(7)
    assert torch.equal(result(x, ids), model(x, ids))


def test_what_is_left_is_counted():
    class Left(nn.Module):
        def forward(self, x):
            return torch.cumsum(x.abs(), 0).view(-1).abs() + torch.cat(x.chunk(2), 0).view(-1)

    result = functions_as_modules(Left(), torch.randn(4, 2))
    assert {key: result.meta["functions"][key] for key in ("abs", "cumsum", "view")} == {
        "abs": 2,
        "cumsum": 1,
        "view": 2,
    }
    assert "add" not in result.meta["functions"]


def test_a_type_can_be_kept_whole():
    class RootMeanSquare(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    model = nn.Sequential(nn.Linear(4, 4), RootMeanSquare())
    assert list(modules_made(functions_as_modules(model, torch.randn(2, 4)), model)) == ["1.mean", "1.add", "1.mul"]
    assert modules_made(functions_as_modules(model, torch.randn(2, 4), leaf_types=(RootMeanSquare,)), model) == {}


def test_keyword_inputs_saving_and_compiling():
    model = Masked("sum")
    inputs = {"x": torch.randn(2, 3, 4), "keep": torch.ones(2, 3, 3, dtype=torch.bool)}
    result = functions_as_modules(model, inputs)
    torch.save(result, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(*inputs.values()), model(**inputs))
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs.values()), model(**inputs))
    torch._dynamo.reset()


def test_default_targets_are_the_inputs_there_are():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            y = self.fc(x) + 1
            return torch.cat([(y + y.sin()).softmax(-1), x @ y.mT], 1)

    model = functions_as_modules(Sums(), torch.randn(4, 4))
    types = ["Linear", "Add", "MatMul", "Softmax", "Concat"]
    entries = parse_config_list([{"op_types": types, "quant_dtype": "int8"}], "quantization")
    found = [(t.module_name, t.target_name) for t in resolve_targets(model, entries, "quantization").targets]
    assert sorted(found) == sorted(
        [
            *(("fc", name) for name in ("_input_0", "weight", "_output_0")),
            *(("add", name) for name in ("_input_0", "_output_0")),
            *((place, name) for place in ("add_1", "matmul") for name in ("_input_0", "_input_1", "_output_0")),
            *(("softmax", "_output_0"), ("concat", "_output_0")),
        ]
    )
    entries = parse_config_list([{"op_names": ["add"], "target_names": ["_input_1"]}], "quantization")
    with pytest.raises(UnmatchedError, match="_input_1"):
        resolve_targets(model, entries, "quantization")


def test_operations_show_their_call():
    model = Called(lambda x, y: F.layer_norm(F.linear(1 - x, y), (3,), y[:, 0], eps=0.1))
    result = functions_as_modules(model, (torch.randn(3, 4), torch.randn(3, 4)))
    shown = {type(m): repr(m) for m in result.modules() if isinstance(m, (Sub, FunctionalLinear, FunctionalNorm))}
    assert shown == {
        Sub: "Sub(__rsub__(_input_0, 1))",
        FunctionalLinear: "FunctionalLinear(linear(_input_0, _input_1))",
        FunctionalNorm: "FunctionalNorm(layer_norm(_input_0, (3,), weight=_input_1, bias=None, eps=0.1))",
    }


class OnGrids(fx.Interpreter):
    """Runs a quantized model and checks all that flows: modules give int8, functions only move it."""

    def __init__(self, model, calibration):
        super().__init__(model)
        self.calibration, self.checked = calibration, 0

    def run_node(self, n):
        value = super().run_node(n)
        if n.op == "call_module":
            stored = value / self.calibration[n.target]["_output_0"]["scale"]
            torch.testing.assert_close(stored, stored.round(), rtol=0, atol=1e-4)
            assert stored.abs().max() < 127.1
            assert len(stored.round().unique()) > 5
            self.checked += 1
        elif isinstance(value, torch.Tensor) and n.op != "placeholder":
            sources = [self.env[source] for source in n.all_input_nodes]
            sources = [x for source in sources for x in (source if isinstance(source, tuple) else (source,))]
            assert torch.isin(value, torch.cat([x.flatten() for x in sources if isinstance(x, torch.Tensor)])).all()
        return value


@pytest.mark.parametrize(
    ("network", "types", "shape"),
    [
        (Residual(), ["Conv2d", "Linear", "BatchNorm2d", "ReLU", "Add", "Mean"], IMAGE),
        (Dense(), ["Conv2d", "Linear", "BatchNorm2d", "ReLU", "Concat", "Mean"], IMAGE),
        *(
            (Transformer(fused), ["Linear", "LayerNorm", "GELU", "Add", "Mul", "MatMul", "Softmax", "Mean"], (4, 6, 3))
            for fused in (False, True)
        ),
    ],
    ids=["residual", "dense", "steps", "fused"],
)
def test_whole_networks_are_integer(network, types, shape):
    model = functions_as_modules(randomize(network), torch.randn(shape))
    data = [torch.randn(shape) for _ in range(3)]
    plain = model(data[0])
    config = [{"op_types": types, "quant_dtype": "int8"}]
    quantizer = PtqQuantizer(model, config, observer="minmax", calibration=data)
    _, calibration = quantizer.compress()
    with torch.no_grad():
        check = OnGrids(model, calibration)
        output = check.run(data[0])
    assert check.checked == sum(node.op == "call_module" for node in model.graph.nodes)
    counted = {"Residual": 4, "Dense": 0, "Transformer": 14}[type(network).__name__]
    operations = [name for name, m in model.named_modules() if type(m).__name__ in ("Add", "Mul", "MatMul")]
    assert sum(target.startswith("_input_") for name in operations for target in calibration[name]) == counted
    noise = (output - plain).square().sum() / plain.square().sum()
    assert 0 < noise < 0.02
    quantizer.unwrap_model()
    assert torch.equal(model(data[0]), plain)
