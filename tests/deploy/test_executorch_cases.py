"""What XNNPACK computes otherwise than a program says, case by case: it is kept from it, and says so, or made right."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F

from tersor.deploy.agreement import snr
from tersor.deploy.executorch import ExecuTorch
from tests.deploy.lowered import largest_difference, program_of, program_outputs, ptq

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
needs_executorch = pytest.mark.skipif(bool(ExecuTorch.why_not()), reason=f"ExecuTorch: {ExecuTorch.why_not()}")
BYTE = {"quant_dtype": "int8", "quant_scheme": "affine"}
ROWS = {"quant_dtype": "int8", "granularity": "per_channel"}
SYMMETRIC = {"quant_dtype": "int8", "quant_scheme": "symmetric"}


def rounded(*names, weight=ROWS, value=BYTE, output=BYTE):
    """Weights, inputs and outputs of some modules."""
    settings = {"weight": weight, "_input_0": value, "_output_0": output}
    settings = {target: own for target, own in settings.items() if own is not None}
    return {"op_names": list(names), "target_names": list(settings), "target_settings": settings}


def behind(*names, **settings):
    """Outputs of some modules, on a grid of their own."""
    return rounded(*names, weight=None, value=None, output={**SYMMETRIC, **settings})


def conv(kernel=3, **arguments):
    return nn.Conv2d(4, 4, kernel, **{"padding": kernel // 2, **arguments})


def dead():
    layer = conv()
    layer.weight.data[1] *= 1e-12
    layer.bias.data[1] = 3.0
    return layer


def with_one_bias():
    one, two = conv(), conv()
    two.bias = one.bias
    return {"a": one, "b": two}


def one(make, **settings):
    """One layer, rounded on all sides or as said."""
    return lambda: Case(lambda m, x: m.a(x), [rounded("a", **settings)], a=make())


def moved(move, **settings):
    """A layer whose output is moved, and then rounded on another grid."""
    config = [rounded("a"), behind("i", **settings)]
    return lambda: Case(lambda m, x: m.i(move(m.a(x))), config, a=conv(), i=nn.Identity())


class Case(nn.Module):
    """A few layers, and how they are called."""

    def __init__(self, call, config, **modules):
        super().__init__()
        self.call, self.config = call, config
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.call(self, x)


def flat():
    return Case(lambda m, x: m.a(x.flatten(2)), [rounded("a")], a=nn.Conv1d(4, 6, 3, padding=1))


def few_numbers():
    config = [rounded("a", "b", output=None), behind("r", "b", quant_dtype="int5")]
    return Case(lambda m, x: m.b(m.r(m.a(x))), config, a=conv(), r=nn.ReLU6(), b=conv())


def one_bias():
    return Case(lambda m, x: (m.a(x), m.b(20 * x)), [rounded("a", "b")], **with_one_bias())


def joined():
    config = [rounded("a", "b"), behind("i", quant_range="full")]
    call = lambda m, x: m.i(torch.cat([m.a(x), m.b(3 * x)], 1))  # noqa: E731
    return Case(call, config, a=conv(), b=conv(), i=nn.Identity())


def read_twice():
    def call(m, x):
        y = m.a(x)
        return m.i(y), y

    return Case(call, [rounded("a", output=None), behind("i")], a=conv(), i=nn.Identity())


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


def far_sum():
    def call(m, x):
        y = m.a(x)
        return m.s(y, 1e-5 * x - y)

    targets = ["_input_0", "_input_1", "_output_0"]
    return Case(call, [rounded("a"), {"op_names": ["s"], "target_names": targets, **BYTE}], a=conv(), s=Sum())


AFFINE = {**BYTE, "granularity": "per_channel"}
CASES = {  # how it is made, and the fallback that it has, if any
    "transposed": (one(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2)), ""),
    "transposed, groups": (one(lambda: nn.ConvTranspose2d(4, 4, 3, groups=2)), "transposed convolutions in groups"),
    "one dimension": (flat, ""),
    "padded by name": (one(lambda: conv(4, padding="same")), ""),
    "padded by name, zero points": (one(lambda: conv(4, padding="same"), weight=AFFINE), "its weight has zero points"),
    "few numbers": (few_numbers, ""),
    "dead channel": (one(dead), ""),
    "one bias": (one_bias, ""),
    "pool": (moved(lambda x: F.max_pool2d(x, 2)), ""),
    "pad": (moved(lambda x: F.pad(x, (1, 2))), ""),
    "cat": (joined, ""),
    "limited": (moved(lambda x: x.clamp(-0.3, 0.2)), ""),
    "far sum": (far_sum, "added in floating point"),
    "not rounded": (one(conv, output=None), "its output is not rounded"),
    "read twice": (read_twice, "its output is not rounded, or is read before it is"),
}


class Cases(nn.Module):
    """All of them, so that one file tests them."""

    def __init__(self):
        super().__init__()
        self.cases = nn.ModuleList(make() for make, _ in CASES.values())

    def forward(self, x):
        return [case(x) for case in self.cases]

    def config(self):
        return [
            {**entry, "op_names": [f"cases.{index}.{name}" for name in entry["op_names"]]}
            for index, case in enumerate(self.cases)
            for entry in case.config
        ]


@pytest.fixture(scope="module")
def cases():
    torch.manual_seed(1)
    net, x = Cases().eval(), torch.randn(8, 4, 9, 9)
    program = program_of(ptq(net, net.config(), [x, torch.randn(8, 4, 9, 9)]), x)
    return program, *ExecuTorch().prepare(program)


def test_what_is_kept_from_xnnpack_keeps_its_values_and_says_why(cases):
    program, prepared, fallbacks = cases
    x = 1.2 * torch.randn(6, 4, 9, 9)
    assert largest_difference(program_outputs(prepared, x), program_outputs(program, x)) < 2e-6  # a channel is dead
    reasons = {}
    for fallback in fallbacks:
        reasons.setdefault(int(fallback.where.split(".")[1]), []).append(fallback.reason)
    for index, (name, (_, why)) in enumerate(CASES.items()):
        assert bool(reasons.get(index)) == bool(why), name
        assert why in " ".join(reasons.get(index, ())), name


@needs_executorch
def test_each_case_computes_what_the_program_says(cases, tmp_path):
    program, prepared, fallbacks = cases
    engine, x = ExecuTorch(), torch.randn(6, 4, 9, 9)
    engine.build(prepared, tmp_path, {})
    session = engine.open(tmp_path, threads=1, options={})
    results, expected = session.run([x]), program_outputs(program, x)
    counts = [2 if name in ("one bias", "read twice") else 1 for name in CASES]
    for name, count in zip(CASES, counts, strict=True):
        for _ in range(count):
            assert snr(results.pop(0), expected.pop(0)) > 40, name  # one number that is rounded the other way leaves 60
    ran = {}
    for operator in session.profile([x]):
        if operator.computes:
            ran.setdefault(int(operator.name.split(".")[1]), set()).add(operator.precision)
    floating = {int(own.where.split(".")[1]) for own in fallbacks if own.reason.startswith("runs in floating point")}
    for index, name in enumerate(CASES):
        assert ran[index] == ({"float"} if index in floating else {"int8"}), name
