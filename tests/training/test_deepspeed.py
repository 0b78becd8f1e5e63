"""DeepSpeed on the CPU: ZeRO 0 to 3 agree with the loop written by hand."""

import copy
import gc
import json
import os
import warnings

import pytest
import torch
from torch.nn.functional import mse_loss

from tersor.errors import ConflictError, InvalidValueError, TrainingError, WrapError
from tersor.pruning import LevelPruner, LinearPruner
from tersor.testing.processes import in_two_processes, why_not_two
from tests.training.hand_written import Hooks, Net, X, Y, assert_agrees, assert_no_hook, assert_same, by_hand, loader

os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepspeed = pytest.importorskip(
        "deepspeed", reason="deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    )
from tersor.training.deepspeed import DeepspeedTorchEvaluator

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = torch.nn.functional.linear
STAGES = [0, 1, 2, 3]


@pytest.fixture(autouse=True)
def one_process(monkeypatch, unused_port):
    """A process group of one, without the operators that DeepSpeed would compile."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    yield
    gc.collect()  # engines hold process groups: one that is collected in a fork waits for a thread that is not there
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def config(stage, accumulate=1, **more):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        **more,
    }


def step(batch, model):
    return mse_loss(model(batch[0]), batch[1])


def training(engine, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
    engine.train()
    epochs = 0
    while epochs != max_epochs:
        for batch in loader():
            engine.backward(training_step(batch, engine))
            engine.step()
        epochs += 1


def collecting(engine, *rest):
    gc.collect()  # an engine of an earlier training, which destroys itself once more
    training(engine, *rest)


def make(stage, accumulate=1, factory=torch.optim.SGD, **more):
    model = Net()
    model.ds_of_the_user = 1
    options = {"momentum": 0.9} if factory is torch.optim.SGD else {}
    optimizer = factory(model.parameters(), lr=0.1, **options)
    evaluator = DeepspeedTorchEvaluator(training, step, config(stage, accumulate, **more), optimizer)
    return model, optimizer, evaluator


def assert_whole(model, optimizer):
    assert_no_hook(optimizer)
    assert torch.nn.functional.linear is LINEAR
    held = [of for group in optimizer.param_groups for of in group["params"]]
    assert [id(of) for of in held] == [id(of) for of in model.parameters()]
    for parameter in model.parameters():
        assert not vars(parameter)
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
        assert parameter.grad is None
    assert model.ds_of_the_user == 1
    for module in model.modules():
        assert not {name for name in vars(module) if name.startswith("ds_") and "user" not in name}
        assert not {"_original_parameters", "_external_params", "pre_bwd_fn"} & vars(module).keys()
        assert type(module._parameters) is type(Net()._parameters)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    copy.deepcopy(model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("limits", [{"max_steps": 4}, {"max_epochs": 2}, {"max_steps": 2, "max_epochs": 5}])
def test_limits_are_exact(stage, limits):
    model, optimizer, evaluator = make(stage)
    result = evaluator.train(model, **limits)
    steps = limits.get("max_steps", 6)
    assert (result.steps, result.epochs, result.stopped) == (steps, None, "max_steps" in limits)
    assert_same(model, by_hand(steps=steps)[1], rtol=1e-6, atol=1e-6)
    assert_whole(model, optimizer)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_see_what_the_loop_by_hand_sees_and_what_they_write_stays(stage, accumulate):
    model, optimizer, evaluator = make(stage, accumulate)
    hooks = Hooks(model)
    result = evaluator.train(model, hooks, max_epochs=2)
    made, expected, seen = by_hand(epochs=2, accumulate=accumulate, rest="always", hooks=True)
    assert result.steps == made
    assert_agrees(hooks, seen)
    assert_same(model, expected, rtol=1e-6, atol=1e-6)
    assert_whole(model, optimizer)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("factory", [torch.optim.SGD, torch.optim.AdamW])
def test_the_user_s_optimizer_goes_on_in_the_next_training_and_without_deepspeed(stage, factory):
    model, optimizer, evaluator = make(stage, factory=factory)
    expected = Net()
    evaluator = DeepspeedTorchEvaluator(collecting, step, evaluator.config, optimizer)
    options = {"momentum": 0.9} if factory is torch.optim.SGD else {}
    by_user = factory(expected.parameters(), lr=0.1, **options)
    for _ in range(2):
        evaluator.train(model, max_steps=3)
        by_hand(steps=3, model=expected, optimizer=by_user)
    assert_same(model, expected, rtol=1e-5, atol=1e-5)
    by_hand(steps=3, model=model, optimizer=optimizer)
    by_hand(steps=3, model=expected, optimizer=by_user)
    assert_same(model, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_has_master_weights_and_leaves_float32(stage):
    model, optimizer, evaluator = make(stage, bf16={"enabled": True})
    kinds = []

    def cast(batch, model):
        outputs = model(batch[0].bfloat16())
        kinds.append(outputs.dtype)
        return mse_loss(outputs.float(), batch[1])

    evaluator = DeepspeedTorchEvaluator(training, cast, evaluator.config, optimizer)
    hooks = Hooks(model)
    evaluator.train(model, hooks, max_epochs=2)
    assert set(kinds) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same(model, by_hand(epochs=2, hooks=True)[1], rtol=0.05, atol=0.02)
    assert max(p.abs().max().item() for p in model.parameters()) <= 0.5
    assert_whole(model, optimizer)


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_from_a_function_and_one_from_the_config(stage, tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    model = Net()
    DeepspeedTorchEvaluator(training, step, config(stage), sgd).train(model, max_steps=3)
    assert_same(model, by_hand(steps=3)[1], rtol=1e-6, atol=1e-6)
    path = tmp_path / "deepspeed.json"
    named = {"type": "Adam", "params": {"lr": 0.1, "torch_adam": True, "adam_w_mode": False}}
    path.write_text(json.dumps(config(stage, optimizer=named)), encoding="utf-8")
    model, expected = Net(), Net()
    DeepspeedTorchEvaluator(training, step, path).train(model, max_steps=3)
    by_hand(steps=3, model=expected, optimizer=torch.optim.Adam(expected.parameters(), lr=0.1))
    assert_same(model, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moment", ["loss", "before_step", "after_step"])
def test_an_error_leaves_everything_as_it_was(stage, moment):
    model, optimizer, evaluator = make(stage)
    model.eval()
    hooks = Hooks(model)

    def fail(*_):
        raise ZeroDivisionError

    setattr(hooks, moment, fail)
    with pytest.raises(ZeroDivisionError):
        evaluator.train(model, hooks, max_steps=3)
    assert_whole(model, optimizer)
    assert not any(part.training for part in model.modules())
    assert evaluator.train(model, max_steps=2).steps == 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_pruner(stage):
    model, _, evaluator = make(stage)
    pruner = LinearPruner(
        LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], evaluator), interval_steps=2, total_times=2
    )
    small, _ = pruner.compress(max_steps=5)
    assert int((small[0].weight == 0).sum()) == 6
    by_user = Net()
    plain = LinearPruner(
        LevelPruner(by_user, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]), interval_steps=2, total_times=2
    )
    optimizer = torch.optim.SGD(by_user.parameters(), lr=0.1, momentum=0.9)
    plain.start()
    for batch in (list(loader()) * 2)[:5]:
        optimizer.zero_grad()
        plain.loss(step(batch, by_user), batch).backward()
        plain.before_step()
        optimizer.step()
        plain.after_step()
    plain.finish()
    assert_same(pruner.unwrap_model(bake=True), plain.unwrap_model(bake=True), rtol=1e-6, atol=1e-6)


def test_a_training_begins_from_a_checkpoint(tmp_path):
    model, optimizer, _ = make(0)

    def saving(engine, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        engine.save_checkpoint(str(tmp_path), tag="begin")

    DeepspeedTorchEvaluator(saving, step, config(0), optimizer).train(model)
    other = Net()
    with torch.no_grad():
        other[0].weight.zero_()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    arguments = {"load_dir": str(tmp_path), "tag": "begin"}
    evaluator = DeepspeedTorchEvaluator(training, step, config(0), optimizer, resume_from_checkpoint_args=arguments)
    evaluator.train(other, max_steps=3)
    assert_same(other, by_hand(steps=3)[1], rtol=1e-6, atol=1e-6)


def test_evaluation():
    model, optimizer, _ = make(0)
    evaluator = DeepspeedTorchEvaluator(
        training, step, config(0), optimizer, dummy_input=X, evaluating_func=lambda model: mse_loss(model(X), Y)
    )
    assert evaluator.evaluate(model) == mse_loss(model(X), Y).item()
    assert evaluator.dummy_input is X
    assert list(evaluator.state_dict()) == ["optimizer"]
    evaluator.load_state_dict(evaluator.state_dict())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ConflictError, "offloaded"),
        ({"fp16": {"enabled": True}}, ConflictError, "fp16 scales the loss.* Train in bf16"),
        ({"managed_gradient_accumulation": False}, ConflictError, "complete only within"),
        ("nowhere.json", InvalidValueError, "deepspeed 'nowhere.json': no config can be read"),
        (3, InvalidValueError, "deepspeed: the int 3 is no config"),
    ],
)
def test_configs_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        DeepspeedTorchEvaluator(training, step, given)


@pytest.mark.parametrize(
    "more",
    [
        {"zero_optimization": {"stage": 0}},
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    ],
)
def test_engines_that_hide_their_master_weights_are_refused(more):
    model, optimizer, evaluator = make(0, bf16={"enabled": True}, **more)
    with pytest.raises(TrainingError, match=r"it trains by a .*, whose master weights cannot be seen"):
        evaluator.train(model, max_steps=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    by_hand(steps=1, model=model, optimizer=optimizer)


def test_a_model_that_is_in_slices_already_is_refused(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # which Init puts another one for
    with deepspeed.zero.Init(config_dict_or_path=config(3)):
        model = torch.nn.Linear(3, 4)
    with pytest.raises(WrapError, match=r"shared out over processes \(DeepSpeed's ZeRO stage 3\).* outside of"):
        LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])


def test_what_else_is_refused(monkeypatch):
    with pytest.raises(InvalidValueError, match="optimizer: the int 3 is no optimizer"):
        DeepspeedTorchEvaluator(training, step, config(0), 3)
    model, _, evaluator = make(0)
    with pytest.raises(TrainingError, match="none of their 4 parameters belongs"):
        evaluator.train(Net(), max_steps=1)
    monkeypatch.delenv("RANK")
    with pytest.raises(TrainingError, match="there is no process group"):
        evaluator.train(model, max_steps=1)


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one_does_on_both_halves(stage):
    def halves(engine, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        rank = torch.distributed.get_rank()
        while True:
            engine.backward(training_step((X[4 * rank : 4 * rank + 4], Y[4 * rank : 4 * rank + 4]), engine))
            engine.step()

    def work(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        evaluator = DeepspeedTorchEvaluator(halves, step, config(stage), optimizer)
        hooks = Hooks(model)
        for _ in range(2):
            evaluator.train(model, hooks, max_steps=2)
        moments = {f"moment {n}": optimizer.state[p]["exp_avg"] for n, p in enumerate(model.parameters())}
        seen = {f"gradient {n}": value for n, value in enumerate(hooks.gradients[-1])}
        return {**model.state_dict(), **moments, **seen}

    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (2 * mse_loss(model(X[:8]), Y[:8])).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.5, 0.5)
    for result in in_two_processes(work):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5)
        for number, parameter in enumerate(model.parameters()):
            moment = optimizer.state[parameter]["exp_avg"]
            torch.testing.assert_close(result[f"moment {number}"], moment, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result[f"gradient {number}"], parameter.grad, rtol=1e-4, atol=1e-5)
