"""Distillers with a teacher: losses and gradients as written by hand, a teacher left alone, and what is refused."""

import copy

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor import TorchEvaluator
from tersor.distillation import (
    Adaptive1dLayerwiseDistiller,
    AttentionTransferDistiller,
    CoFiDistiller,
    DynamicLayerwiseDistiller,
    LogitDistiller,
    RelationalDistiller,
)
from tersor.distillation.losses import attention_transfer, relational
from tersor.errors import InvalidValueError, TrainingError, UnmatchedError
from tersor.pruning import L1NormPruner
from tersor.wrapping import ModelWrappers

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


class Net(nn.Module):
    def __init__(self, width=8, seed=0, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(torch.relu(self.second(self.drop(x))))


def hidden(net, x):
    first = net.first(x)
    second = net.second(torch.relu(first))
    return first, second, net.head(torch.relu(second))


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Every model is unwrapped at the end, so that what is left behind then is found."""
    made = []
    first = ModelWrappers.__init__

    def watched(self, *args, **kwargs):
        first(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ModelWrappers, "__init__", watched)
    yield
    for wrappers in made:
        wrappers.detach()


def gradients(distiller, student, batch=(X, Y)):
    student.zero_grad()
    distiller.start()
    loss = distiller.loss(F.cross_entropy(student(batch[0]), batch[1]), batch)
    loss.backward()
    distiller.finish()
    distiller.unwrap_model()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def by_hand(student, teacher, extra, origin=1.0):
    student = copy.deepcopy(student).double()
    teacher = copy.deepcopy(teacher).double().eval()
    student.zero_grad()
    own = hidden(student, X.double())
    with torch.no_grad():
        other = hidden(teacher, X.double())
    loss = origin * F.cross_entropy(own[2], Y) + extra(own, other)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in student.named_parameters()}


def softened(own, other, temperature):
    p = (other / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - (own / temperature).log_softmax(-1))).sum(-1).mean()


CASES = {
    "mse and kl": (
        DynamicLayerwiseDistiller,
        [{"op_names": ["first"], "lambda": 0.5}, {"op_names": ["head"], "apply_method": "kl", "lambda": 2}],
        {"temperature": 3.0, "origin_loss_lambda": 0.25},
        lambda own, other: 0.5 * (own[0] - other[0]).pow(2).mean() + 2 * softened(own[2], other[2], 3.0),
        0.25,
    ),
    "nearest": (
        DynamicLayerwiseDistiller,
        [{"op_names": ["second"], "link": ["first", "second"]}],
        {},
        lambda own, other: min(((own[1] - other[i]).pow(2).mean() for i in (0, 1)), key=lambda loss: loss.item()),
        1.0,
    ),
    "an input": (
        DynamicLayerwiseDistiller,
        [{"op_names": ["head"], "target_names": ["_input_"]}],
        {},
        lambda own, other: (own[1].relu() - other[1].relu()).pow(2).mean(),
        1.0,
    ),
    "logits": (LogitDistiller, None, {}, lambda own, other: softened(own[2], other[2], 4.0), 1.0),
    "relations": (
        RelationalDistiller,
        [{"op_names": ["second"]}],
        {},
        lambda own, other: relational(own[1], other[1]),
        1.0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_written_by_hand(case):
    kind, config, settings, extra, origin = CASES[case]
    student, teacher = Net(seed=1), Net(seed=2)
    loss, found = gradients(kind(student, config, None, teacher, **settings), student)
    expected_loss, expected = by_hand(student, teacher, extra, origin)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(found[name].double(), gradient, rtol=1e-4, atol=1e-7), name


def test_each_layer_of_the_teacher_asks_the_nearest_of_the_student():
    student, teacher = Net(seed=1), Net(seed=2)
    both = ["first", "second"]
    distiller = CoFiDistiller(student, [{"op_names": both, "link": both, "lambda": 0.5}], None, teacher)

    def extra(own, other):
        return 0.5 * sum(
            min(((own[i] - other[j]).pow(2).mean() for i in (0, 1)), key=lambda loss: loss.item()) for j in (0, 1)
        )

    loss, found = gradients(distiller, student)
    expected_loss, expected = by_hand(student, teacher, extra)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert torch.allclose(found["first.weight"].double(), expected["first.weight"], rtol=1e-4, atol=1e-7)
    own, other = (hidden(net, X) for net in (student, teacher))
    for j, name in enumerate(both):
        nearest = min((0, 1), key=lambda i: (own[i] - other[j]).pow(2).mean().item())
        assert distiller.nearest[f"{name}._output_0"] == f"{both[nearest]}._output_0"


def test_attention_is_transferred_between_convolutions_of_other_widths():
    student, teacher = nn.Sequential(nn.Conv2d(2, 4, 3)), nn.Sequential(nn.Conv2d(2, 6, 3))
    images = torch.randn(3, 2, 6, 6)
    distiller = AttentionTransferDistiller(student, [{"op_names": ["0"]}], None, teacher)
    own = student(images)
    loss = distiller.loss(own.sum() * 0, (images, None))
    assert loss.item() == pytest.approx(attention_transfer(own, teacher(images), 1).item(), rel=1e-6)


def train(student, kind, config, teacher, steps=60, **settings):
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    evaluator = TorchEvaluator.from_loader([(X, Y)], F.cross_entropy, optimizer, progress=False)
    distiller = kind(student, config, evaluator, teacher, None, 0.0, **settings)
    losses = []
    distilled = distiller.distillation_loss

    def watched(observed, batch):
        losses.append(distilled(observed, batch))
        return losses[-1]

    distiller.distillation_loss = watched
    distiller.compress(max_steps=steps)
    distiller.unwrap_model()
    return distiller, [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (DynamicLayerwiseDistiller, [{"op_names": ["first", "second"]}]),
        (Adaptive1dLayerwiseDistiller, [{"op_names": ["first", "second"]}]),
        (LogitDistiller, None),
        (RelationalDistiller, [{"op_names": ["second"]}]),
        (CoFiDistiller, [{"op_names": ["first", "second"], "link": ["first", "second"]}]),
    ],
)
def test_the_distance_shrinks_and_the_teacher_stays_as_it_is(kind, config):
    teacher = Net(seed=2, width=12 if kind is Adaptive1dLayerwiseDistiller else 8).train()
    before, hooks = copy.deepcopy(teacher.state_dict()), [len(m._forward_hooks) for m in teacher.modules()]
    distiller, losses = train(Net(seed=1), kind, config, teacher)
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert [len(m._forward_hooks) for m in teacher.modules()] == hooks
    assert teacher.training
    assert not any("project" in name for name, _ in distiller.model.named_parameters())


def test_a_projection_works_along_channels_and_is_learned_by_its_own_adam():
    student, teacher = nn.Sequential(nn.Conv2d(2, 4, 3)), nn.Sequential(nn.Conv2d(2, 6, 3))
    images = torch.randn(3, 2, 6, 6)
    distiller = Adaptive1dLayerwiseDistiller(student, [{"op_names": ["0"]}], None, teacher, learning_rate=0.1)
    distiller.start()
    loss = distiller.loss(student(images).sum() * 0, (images, None))
    state = distiller.projections.state()["0._output_0"]["values"]
    projected = torch.einsum("nchw,dc->ndhw", student(images), state["weight"]) + state["bias"][:, None, None]
    assert loss.item() == pytest.approx((projected - teacher(images)).pow(2).mean().item(), rel=1e-5)
    before = [loss.item()]
    for _ in range(30):
        loss.backward()
        distiller.step()
        loss = distiller.loss(student(images).sum() * 0, (images, None))
        before.append(loss.item())
    assert before[-1] < 0.6 * before[0]


def test_dropout_in_the_teacher_is_off_unless_asked_for():
    student, teacher = Net(seed=1), Net(seed=2, dropout=0.5).train()
    distiller = LogitDistiller(student, None, None, teacher)
    with torch.no_grad():
        first, second = (distiller.loss(student(X).sum() * 0, (X, Y)).item() for _ in range(2))
    assert first == second
    distiller.unwrap_model()
    distiller = LogitDistiller(student, None, None, teacher, teacher_training=True)
    with torch.no_grad():
        first, second = (distiller.loss(student(X).sum() * 0, (X, Y)).item() for _ in range(2))
    assert first != second


def test_teacher_predict_a_compiled_teacher_and_a_place_by_key():
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(seed=2)

        def forward(self, x):
            return {"logits": self.net(x), "twice": 2 * x}

    student, teacher, calls = Net(seed=1), Keyed(), []

    def predict(batch, model):
        calls.append(batch)
        return model(x=batch[0])

    config = [{"op_names": [""], "target_names": ["_output_0"], "link": ["_output_logits"], "apply_method": "mse"}]
    for compiled in (False, "eager"):
        distiller = LogitDistiller(student, config, None, teacher, predict, teacher_compiled=compiled)
        before = len(teacher._forward_hooks)
        loss = distiller.loss(student(X).sum() * 0, (X, Y))
        assert loss.item() == pytest.approx((student(X) - teacher.net(X)).pow(2).mean().item(), rel=1e-5)
        other = X.flip(0)
        loss = distiller.loss(student(other).sum() * 0, (other, Y))
        assert loss.item() == pytest.approx((student(other) - teacher.net(other)).pow(2).mean().item(), rel=1e-5)
        assert len(teacher._forward_hooks) == before == (1 if compiled else 0)
        distiller.unwrap_model()
    assert len(calls) == 4
    teacher._forward_hooks.clear()
    torch._dynamo.reset()


def test_two_distillers_run_one_teacher_once():
    student, teacher = Net(seed=1), Net(seed=2)
    calls = []
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    first = DynamicLayerwiseDistiller(student, [{"op_names": ["first"]}], None, teacher)
    second = LogitDistiller.from_compressor(first, None, teacher)
    assert second.teacher is first.teacher
    for _ in range(3):
        second.loss(F.cross_entropy(student(X), Y), (X, Y))
    assert len(calls) == 3
    handle.remove()


def test_what_is_pruned_is_what_is_compared():
    student, teacher = Net(seed=1), Net(seed=2)
    pruner = L1NormPruner(student, [{"op_names": ["second"], "sparse_ratio": 0.5}])
    pruner.compress()
    distiller = DynamicLayerwiseDistiller.from_compressor(pruner, [{"op_names": ["second"]}], teacher)
    loss = distiller.loss(student(X).sum() * 0, (X, Y))
    assert loss.item() == pytest.approx((hidden(student, X)[1] - hidden(teacher, X)[1]).pow(2).mean().item(), rel=1e-5)
    assert (hidden(student, X)[1] == student.second.bias).float().mean() == pytest.approx(0.5)


def narrow():
    return Net(width=4, seed=3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda s: LogitDistiller(s), InvalidValueError, "teacher_model: a NoneType is no teacher"),
        (lambda s: LogitDistiller(s, None, None, s), InvalidValueError, "the teacher is the student itself"),
        (
            lambda s: DynamicLayerwiseDistiller(s, [{"op_names": ["first"], "link": "frist"}], None, Net()),
            UnmatchedError,
            "the teacher has no module 'frist'.*first",
        ),
        (
            lambda s: Adaptive1dLayerwiseDistiller(
                s, [{"op_names": ["first"], "link": ["first", "second"]}], None, Net()
            ),
            InvalidValueError,
            "first._output_0: is linked to 2 modules",
        ),
        (
            lambda s: RelationalDistiller(s, [{"op_names": ["first"], "apply_method": "kl"}], None, Net()),
            InvalidValueError,
            "RelationalDistiller knows no 'kl'",
        ),
        (lambda s: LogitDistiller(s, None, None, Net(), None, -1.0), InvalidValueError, "-1.0 is no weight of a loss"),
    ],
)
def test_what_cannot_be_distilled_is_said_before_training(make, error, message):
    student = Net(seed=1)
    with pytest.raises(error, match=message):
        make(student)
    assert not any(module._forward_hooks for module in student.modules())


def test_what_does_not_fit_is_said_with_both_shapes():
    student = Net(seed=1)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["first"]}], None, narrow())
    with pytest.raises(TrainingError, match=r"\(16, 8\).*\(16, 4\).*Adaptive1d"):
        distiller.loss(student(X).sum(), (X, Y))
    with pytest.raises(TrainingError, match="reached none of the student's targets"):
        distiller.loss(X.sum(), (X, Y))
    distiller.unwrap_model()
    images = nn.Sequential(nn.Conv2d(2, 4, 3)), nn.Sequential(nn.Conv2d(2, 6, 3, stride=2))
    distiller = Adaptive1dLayerwiseDistiller(images[0], [{"op_names": ["0"]}], None, images[1])
    x = torch.randn(3, 2, 6, 6)
    with pytest.raises(TrainingError, match="differ in more than their width"):
        distiller.loss(images[0](x).sum(), (x, None))


def test_a_target_that_the_teacher_does_not_reach():
    class Skips(Net):
        def forward(self, x):
            return self.head(torch.relu(self.first(x)))

    student = Net(seed=1)
    distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["second"]}], None, Skips())
    with pytest.raises(TrainingError, match="the teacher's forward pass did not reach second"):
        distiller.loss(student(X).sum(), (X, Y))


@pytest.mark.parametrize("kind", [Adaptive1dLayerwiseDistiller, CoFiDistiller])
def test_a_run_that_was_killed_goes_on_with_the_same_projection(kind):
    config = [{"op_names": ["first", "second"], **({"link": ["first", "second"]} if kind is CoFiDistiller else {})}]

    def made():
        student, teacher = Net(seed=1), Net(width=12, seed=2)
        return student, torch.optim.SGD(student.parameters(), 0.1), kind(student, config, None, teacher)

    def steps(student, optimizer, distiller, count):
        for _ in range(count):
            optimizer.zero_grad()
            distiller.loss(F.cross_entropy(student(X), Y), (X, Y)).backward()
            optimizer.step()
            distiller.step()

    whole = made()
    whole[2].start()
    steps(*whole, 6)
    first = made()
    first[2].start()
    steps(*first, 3)
    saved = copy.deepcopy((first[2].state_dict(), first[0].state_dict()))
    second = made()
    second[2].load_state_dict(saved[0])
    second[0].load_state_dict(saved[1])
    steps(*second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True))


def test_a_teacher_that_is_cached_runs_once_for_each_sample(tmp_path):
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    weights = []
    for cached in (False, True, True):
        student, teacher = Net(seed=1), Net(seed=2)
        rows = []
        teacher.register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(output)))
        distiller = DynamicLayerwiseDistiller(student, [{"op_names": ["first"]}], None, teacher)
        logits = LogitDistiller.from_compressor(distiller, None, teacher)
        batches = logits.cached(loader, directory=tmp_path / "values") if cached else loader
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        logits.evaluator = TorchEvaluator.from_loader(batches, F.cross_entropy, optimizer, progress=False)
        logits.compress(max_epochs=3)
        weights.append([parameter.detach().clone() for parameter in student.parameters()])
        teacher._forward_hooks.clear()
        assert sum(rows) == (3 * 16 if not cached else 16 if len(weights) == 2 else 0)
    for other in weights[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights[0], other, strict=True))
