"""Wrong input, across the library: each gives its typed error with the place and the remedy, and changes nothing."""

import contextlib
import json

import pytest
import torch
from torch import nn

import tersor
from tersor.errors import (
    CheckpointError,
    ConfigError,
    ConflictError,
    EmptyLayerError,
    InvalidValueError,
    MaskError,
    TraceError,
    TrainingError,
    UnknownKeyError,
    UnmatchedError,
    WrapError,
)
from tersor.graph import groups
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.recipe import Recipe, read_recipe, run_recipe
from tersor.speedup import ModelSpeedup
from tests.networks import IMAGE, Dense, Plain, Residual, randomize

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
CONV1 = {"op_names": ["conv1"], "sparse_ratio": 0.5}
MASKS = {"conv1": {"weight": torch.arange(10).view(10, 1, 1, 1) > 4}}
RECIPE = {
    "model": "tests.recipe.toy:net",
    "data": "tests.recipe.toy:data",
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
}


def entry(**keys):
    """Make a pruner with one entry that has these keys beside its own."""
    return entries({**CONV1, **keys})


def entries(*config_list):
    return lambda model, folder: L1NormPruner(model, list(config_list), example_inputs=X)


def whole_list(config_list):
    return lambda model, folder: L1NormPruner(model, config_list)


def plan(mode, **keys):
    return lambda model, folder: tersor.plan(model, [{"op_names": ["conv1"], **keys}], mode)


def file(name, text):
    """Give the pruner a config file."""

    def act(model, folder):
        (folder / name).write_text(text)
        L1NormPruner(model, folder / name)

    return act


@contextlib.contextmanager
def unwrapping(pruner):
    try:
        yield
    finally:
        pruner.unwrap_model()


def compress(*config_list, evaluator=None, pruner_class=L1NormPruner, **limits):
    """Compress, and unwrap whatever happens."""

    def act(model, folder):
        pruner = pruner_class(model, list(config_list), evaluator and evaluator(model), example_inputs=X)
        with unwrapping(pruner):
            pruner.compress(**limits)

    return act


def wrapped(use, evaluator=None):
    """Use a pruner or its model while it is wrapped."""

    def act(model, folder):
        pruner = L1NormPruner(model, [CONV1], evaluator and evaluator(model), example_inputs=X)
        with unwrapping(pruner):
            use(pruner)

    return act


def speedup(masks=MASKS, x=X):
    return lambda model, folder: ModelSpeedup(model, x, masks).speedup_model()


def checkpoint(damage):
    """Load a checkpoint of another state of the model, after something happened to its folder."""

    def act(model, folder):
        damage(tersor.save(randomize(Residual(), seed=1), folder / "checkpoint"))
        tersor.load(model, folder / "checkpoint")

    return act


def truncate(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-20])


def flip(name, position):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)

    return damage


def rewrite(**changes):
    def damage(folder):
        path = folder / "architecture.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def run(**changes):
    return lambda model, folder: run_recipe(
        Recipe.parse({**RECIPE, "output": {"directory": str(folder)}, **changes}, "recipe"), progress=False
    )


def evaluator_of(model):
    def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
        training_step(X, model).backward()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return tersor.TorchEvaluator(training_func, optimizer, lambda batch, model: model(batch).sum(), progress=False)


def stranger(model):
    """An evaluator whose optimizer trains another model of the same kind."""
    return evaluator_of(Residual())


def align(module, target="weight", dims=(0,)):
    return {"align": {"module_name": module, "target_name": target, "dims": list(dims)}}


GROUP = {"op_names": ["conv2"], "sparse_ratio": 0.25}

CONFIG = [
    ("misspelt key", entry(sparse_ratoi=0.5), UnknownKeyError, r"config_list\[0\]\['sparse_ratoi'\].*'sparse_ratio'\?"),
    ("key of another mode", entry(quant_dtype="int8"), UnknownKeyError, "belongs to quantization"),
    ("quant types of 2.x", entry(quant_types=["weight"]), UnknownKeyError, "quant_types.*belongs to quantization"),
    ("misspelt type", entries({"op_types": ["conv2d"], "sparse_ratio": 0.5}), UnmatchedError, "Did you mean 'Conv2d'"),
    ("misspelt name", entry(op_names=["conv_1"]), UnmatchedError, r"\['op_names'\].*'conv_1'.*Did you mean 'conv1'"),
    ("misspelt exclusion", entry(exclude_op_names=["conv11"]), UnmatchedError, "'conv11'.*Did you mean 'conv1'"),
    ("regex without a match", entry(op_names_re=[r"layer\d"]), UnmatchedError, r"op_names_re.*layer.*no module"),
    ("bad regex", entry(op_names_re=["conv("]), InvalidValueError, r"'conv\(' is no regular expression.*Escape"),
    ("all excluded", entry(exclude_op_types=["Conv2d"]), UnmatchedError, "exclude_ keys leave out all.*Loosen"),
    ("ratio 5.0", entry(sparse_ratio=5.0), InvalidValueError, r"\['sparse_ratio'\]: 5.0 is no ratio.*from 0 to 1"),
    ("ratio NaN", entry(sparse_ratio=float("nan")), InvalidValueError, "nan is no ratio"),
    ("negative ratio", entry(sparse_ratio=-0.1), InvalidValueError, "-0.1 is no ratio"),
    ("ratio as text", entry(sparse_ratio="0.5"), InvalidValueError, "'0.5' is no ratio"),
    ("ratio as flag", entry(sparse_ratio=True), InvalidValueError, "True is no ratio"),
    ("min above max", entry(min_sparse_ratio=0.6, max_sparse_ratio=0.4), ConflictError, "0.6 is above max.*Swap"),
    ("threshold beside ratio", entry(sparse_threshold=0.1), ConflictError, "exclude each other.*Keep one"),
    ("positive softmax value", entry(apply_method="add", apply_value=5.0), InvalidValueError, "a number below 0"),
    ("unknown method", entry(apply_method="mull"), InvalidValueError, "'mull'.*bypass, mul, add.*Did you mean 'mul'"),
    ("granularity misspelt", entry(granularity="out_chanel"), InvalidValueError, "Did you mean 'out_channel'"),
    (
        "block that does not divide",
        entry(granularity=[4, -1, -1, -1]),
        InvalidValueError,
        r"conv1\.weight.*1, 2, 5, 10",
    ),
    ("block of too many dimensions", entry(granularity=[1] * 5), InvalidValueError, "more dimensions.*at most 4"),
    ("block of zero", entry(granularity=[0, 4]), InvalidValueError, "-1 or at least 1"),
    ("exclude beside a sparsity", entry(exclude=True), ConflictError, "'exclude' stands beside 'sparse_ratio'"),
    ("entry that selects nothing", entries({"sparse_ratio": 0.5}), InvalidValueError, "selects nothing.*op_names"),
    ("empty list", whole_list([]), InvalidValueError, "config_list: the list is empty.*Add an entry"),
    ("no list", whole_list(CONV1), InvalidValueError, r"is no list.*\[\{...\}\]"),
    ("entry that is no mapping", whole_list(["conv1"]), InvalidValueError, r"config_list\[0\]: 'conv1' is no mapping"),
    (
        "2.x sparsity twice",
        entries({"op_names": ["fc"], "sparsity": 0.5, "total_sparsity": 0.5}),
        ConflictError,
        "twice",
    ),
    ("target that is not there", entry(target_names=["wieght"]), UnmatchedError, "'wieght'.*Did you mean 'weight'"),
    (
        "input without a ratio",
        entry(target_names=["_input_"], sparse_ratio=None),
        ConflictError,
        r"conv1\._input_0.*neither a ratio.*Set align",
    ),
    (
        "key that no target owns",
        entry(target_names=["bias"]),
        ConflictError,
        "no selected target owns.*target_settings",
    ),
    (
        "settings of a left-out target",
        entry(target_names=["weight"], target_settings={"bias": {}}),
        ConflictError,
        "bias",
    ),
    (
        "align to a lost module",
        entry(target_settings={"bias": align("conv11")}),
        UnmatchedError,
        "Did you mean 'conv1'",
    ),
    (
        "align to no target",
        entry(target_settings={"bias": align("bn")}),
        ConflictError,
        "no target.*Select that target",
    ),
    ("align in a circle", entry(target_settings={"weight": align("conv1")}), ConflictError, "circle"),
    ("align along other sizes", entry(target_settings={"bias": align("conv1", dims=[1])}), ConflictError, "sizes"),
    ("mode", plan("prunning", sparse_ratio=0.5), InvalidValueError, "mode: .*'prunning'.*Did you mean 'pruning'"),
    ("bits", plan("quantization", quant_dtype="int99"), InvalidValueError, "'int99' is no quantized data type"),
    ("quant type", plan("quantization", quant_types=["wieght"]), InvalidValueError, "Did you mean 'weight'"),
    (
        "distilled weight",
        plan("distillation", target_names=["weight"]),
        InvalidValueError,
        "'weight' cannot be distilled",
    ),
    ("file that is missing", whole_list("no/such.yaml"), ConfigError, r"no/such\.yaml: cannot be read.*Check the path"),
    ("file of another kind", whole_list("list.toml"), ConfigError, r"list\.toml: is no config file.*\.yaml"),
    ("malformed YAML", file("a.yaml", "- {op_names: [conv1"), ConfigError, r"a\.yaml: is malformed.*Mend"),
    ("malformed JSON", file("a.json", '[{"op_names": ["conv1"],}]'), ConfigError, r"a\.json: is malformed"),
    ("repeated key", file("a.yaml", "- {op_names: [fc], op_names: [conv1]}"), ConflictError, "'op_names' stands twice"),
    (
        "file with a wrong value",
        file("a.yaml", "[{op_names: [fc], sparse_ratio: 2}]"),
        InvalidValueError,
        r"a\.yaml.*2 is",
    ),
]

GROUPS = [
    (
        "ratios of a global group",
        entries({**CONV1, "global_group_id": 1}, {**GROUP, "global_group_id": 1}),
        ConflictError,
        r"config_list\[1\].*0\.25 of global_group_id '1' meets 0\.5 from config_list\[0\].*one ratio",
    ),
    (
        "ratios of a dependency group",
        compress({**CONV1, "dependency_group_id": 1}, {**GROUP, "dependency_group_id": 1}),
        ConflictError,
        r"sparse_ratio is 0\.5 for conv1\.weight but 0\.25 for conv2\.weight",
    ),
    (
        "sizes of a dependency group",
        compress({"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5, "dependency_group_id": 1}),
        ConflictError,
        r"equally many blocks \(conv1\.weight: 10, conv2\.weight: 8\)",
    ),
    (
        "a layer emptied by its ratio",
        compress({**CONV1, "sparse_ratio": 1}),
        EmptyLayerError,
        "conv1.*max_sparse_ratio",
    ),
    (
        "a layer emptied by a threshold",
        compress({"op_names": ["conv1"], "sparse_threshold": 1e6}),
        EmptyLayerError,
        "10",
    ),
    (
        "a layer emptied element by element",
        compress({**CONV1, "sparse_ratio": 1}, pruner_class=LevelPruner),
        EmptyLayerError,
        "conv1",
    ),
    ("parts that do not divide", compress({**CONV1, "internal_metric_block": 3}), InvalidValueError, "1, 2, 5, 10"),
    ("nothing that can leave", compress({"op_names": ["fc"], "sparse_ratio": 0.5}), ConfigError, "model's own output"),
]

LIFECYCLE = [
    ("double wrap", wrapped(lambda pruner: L1NormPruner(pruner.model, [CONV1])), WrapError, "already.*from_compressor"),
    (
        "one target to two pruners",
        wrapped(lambda pruner: LevelPruner.from_compressor(pruner, [CONV1])),
        ConflictError,
        r"conv1\.bias: L1NormPruner and LevelPruner",
    ),
    (
        "two evaluators",
        wrapped(
            lambda pruner: L1NormPruner.from_compressor(pruner, [GROUP], evaluator=evaluator_of(pruner.model)),
            evaluator=evaluator_of,
        ),
        ConflictError,
        "evaluator.*Leave it out",
    ),
    ("no steps", compress(CONV1, evaluator=evaluator_of, max_steps=0), InvalidValueError, "max_steps: 0.*positive int"),
    ("half an epoch", compress(CONV1, evaluator=evaluator_of, max_epochs=0.5), InvalidValueError, "max_epochs: 0.5"),
    ("steps without an evaluator", compress(CONV1, max_steps=10), TrainingError, "no evaluator.*TorchEvaluator"),
    ("another model's optimizer", compress(CONV1, evaluator=stranger, max_steps=1), TrainingError, "belongs to this"),
    (
        "masks of another model",
        wrapped(lambda pruner: pruner.update_masks({"conv11": MASKS["conv1"]})),
        MaskError,
        "conv11.*Did you mean 'conv1'",
    ),
    (
        "masks of another shape",
        wrapped(lambda pruner: pruner.update_masks({"conv1": {"weight": torch.ones(8, 8, 3, 3)}})),
        MaskError,
        r"\(8, 8, 3, 3\) does not fit.*\(10, 8, 3, 3\)",
    ),
    (
        "masks of a half",
        wrapped(lambda pruner: pruner.update_masks({"conv1": {"weight": torch.full((10, 1, 1, 1), 0.5)}})),
        MaskError,
        "holds 0 .removes. and 1 .keeps.",
    ),
    ("masks file", wrapped(lambda pruner: pruner.update_masks("no/such")), CheckpointError, "no/such.*no such file"),
    (
        "inputs of a wrong shape",
        lambda m, f: L1NormPruner(m, [CONV1], example_inputs=X[0, 0]),
        TraceError,
        "Residual cannot run on the example inputs of shape",
    ),
    (
        "inputs of a wrong type",
        lambda model, folder: L1NormPruner(model, [CONV1], example_inputs="x"),
        InvalidValueError,
        "type str.*a tensor",
    ),
    (
        "coupling of another model",
        lambda model, folder: L1NormPruner(model, [CONV1], example_inputs=groups(Dense(), X)),
        TraceError,
        "another model",
    ),
    (
        "module that no plan knows",
        lambda model, folder: tersor.plan(model, [CONV1]).explain("conv_1"),
        UnmatchedError,
        "conv_1.*Did you mean 'conv1'",
    ),
]


def wrapped_speedup(pruner):
    ModelSpeedup(pruner.model, X, MASKS)


def damaged_masks(model, folder):
    truncate("masks")(tersor.save_masks(MASKS, folder / "masks").parent)
    ModelSpeedup(model, X, folder / "masks")


SMALL = [
    ("speedup without inputs", speedup(x=None), InvalidValueError, "example_inputs.*NoneType"),
    ("speedup on a wrong shape", speedup(x=X[:, :2]), TraceError, "cannot run"),
    ("speedup of a wrapped model", wrapped(wrapped_speedup), WrapError, r"unwrap_model\(\)"),
    ("speedup by another model's masks", speedup({"0": MASKS["conv1"]}), MaskError, r"0\.weight: the model has no"),
    ("speedup that empties", speedup({"conv1": {"weight": torch.zeros(10, 1, 1, 1)}}), EmptyLayerError, "all 10"),
    ("speedup by masks of a half", speedup({"conv1": {"weight": torch.full((10, 8, 3, 3), 0.5)}}), MaskError, "0.5"),
    ("masks file that is missing", speedup("no/such.safetensors"), CheckpointError, "no such file"),
    ("masks file that is damaged", damaged_masks, CheckpointError, "masks: is damaged"),
    (
        "checkpoint cut short",
        checkpoint(truncate("model.safetensors")),
        CheckpointError,
        r"model\.safetensors.*damaged",
    ),
    ("flipped byte of a value", checkpoint(flip("model.safetensors", -9)), CheckpointError, "checksum"),
    (
        "flipped byte of a shape",
        checkpoint(flip("architecture.json", -9)),
        CheckpointError,
        r"architecture\.json.*damaged",
    ),
    ("checkpoint edited by hand", checkpoint(rewrite(metadata={"accuracy": 1})), CheckpointError, "checksum differs"),
    ("checkpoint of the future", checkpoint(rewrite(version=9)), CheckpointError, "version 9.*Update Tersor"),
    ("foreign file", checkpoint(rewrite(format="zip")), CheckpointError, "not written by Tersor"),
    (
        "foreign folder",
        lambda model, folder: tersor.load(model, folder),
        CheckpointError,
        r"no checkpoint.*tersor\.save",
    ),
    (
        "another model's checkpoint",
        lambda model, folder: tersor.load(model, tersor.save(Plain(), folder / "plain")),
        CheckpointError,
        "of another model.*Plain",
    ),
    (
        "saving a wrapped model",
        wrapped(lambda pruner: tersor.save(pruner.model, "no/where")),
        CheckpointError,
        "unwrap",
    ),
    ("recipe with an unknown key", run(fine_tunning={}), UnknownKeyError, "recipe: 'fine_tunning'.*'fine_tuning'"),
    (
        "recipe with an unknown key inside",
        run(pruning={**RECIPE["pruning"], "prunner": "L1NormPruner"}),
        UnknownKeyError,
        r"\['pruning'\]: 'prunner'.*Did you mean 'pruner'",
    ),
    (
        "recipe with a wrong ratio",
        run(pruning={"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 2}]}),
        InvalidValueError,
        r"recipe\['pruning'\]\['config_list'\]\[0\]\['sparse_ratio'\]: 2 is no ratio",
    ),
    ("recipe with a lost function", run(model="tests.recipe.toy:nett"), ConfigError, "no 'nett'.*Did you mean 'net'"),
    ("recipe with a lost module", run(model="no.such:net"), ConfigError, "no module 'no'.*Install it"),
    (
        "recipe with a lost pruner",
        run(pruning={**RECIPE["pruning"], "pruner": "L1Pruner"}),
        InvalidValueError,
        "L1Norm",
    ),
    (
        "recipe without a model",
        lambda m, f: Recipe.parse({"data": "a:b"}, "recipe"),
        InvalidValueError,
        "'model' is missing",
    ),
    ("recipe that is missing", lambda m, f: read_recipe(f / "no.yaml"), ConfigError, r"no\.yaml: cannot be read"),
]

ROWS = [*CONFIG, *GROUPS, *LIFECYCLE, *SMALL]


def picture(model):
    """All that a failed call could have changed."""
    modules = {
        name: (module, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return modules, dict(model.named_parameters()), {name: x.clone() for name, x in model.state_dict().items()}


@pytest.mark.parametrize(("act", "error", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_is_refused_and_changes_nothing(act, error, words, tmp_path):
    model = randomize(Residual())
    modules, parameters, values = picture(model)
    with pytest.raises(error, match=f"(?s){words}") as caught:
        act(model, tmp_path)
    assert type(caught.value) is error
    after = picture(model)
    assert after[0] == modules
    assert list(after[1]) == list(parameters)
    assert all(after[1][name] is parameter for name, parameter in parameters.items())
    assert list(after[2]) == list(values)
    assert all(torch.equal(after[2][name], value) for name, value in values.items())
    assert not any(nn.utils.parametrize.is_parametrized(module) for module in model.modules())


def test_there_are_as_many_rows_as_promised():
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 45


@pytest.mark.parametrize("ratio", [1, 1.0, 0, torch.tensor(0.5).item()])
def test_whole_numbers_are_ratios(ratio):
    plan = tersor.plan(Residual(), [{"op_names": ["conv1"], "sparse_ratio": ratio, "max_sparse_ratio": 1}])
    assert plan.rows[0].removes == int(10 * ratio)
