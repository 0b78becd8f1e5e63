"""Stages see what hooks in a full forward of the so far compressed model see."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.errors import InvalidValueError, TrainingError, UnmatchedError
from tersor.graph.inputs import copied
from tersor.training import stages
from tests.torchvision_stub import import_torchvision


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def as_arguments(batch):
    if isinstance(batch, Tensor):
        return (batch,), {}
    return ((), batch) if isinstance(batch, dict) else (tuple(batch[:-1]), {})


@torch.no_grad()
def seen_in_full(model, batches, names):
    """The first input of each call of some modules, by hooks in forward passes of the whole model."""
    seen = defaultdict(list)
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append([*args, *kwargs.values()][0].clone()), with_kwargs=True
        )
        for name in names
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it computes the same in another order
    for batch in batches:
        args, kwargs = as_arguments(copied(batch))
        model(*args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(fast)
    for module, training in modes:
        module.training = training
    for hook in hooks:
        hook.remove()
    return seen


def seen_in(stage):
    seen = defaultdict(list)
    stage.run(lambda name, inputs: seen[name].append(inputs[0].clone()))
    return seen


def is_equal(a, b):
    return a.keys() == b.keys() and all(
        len(a[name]) == len(b[name]) and all(torch.equal(x, y) for x, y in zip(a[name], b[name], strict=True))
        for name in a
    )


@torch.no_grad()
def halve(model, names):
    """Prune the smaller half of each weight."""
    for name in names:
        weight = model.get_submodule(name).weight
        weight[weight.abs() < weight.abs().median()] = 0


def check(model, batches, names=None):
    """Go through all stages, change each, compare; return the names of the stages."""
    names = linears(model) if names is None else names
    before = seen_in_full(model, batches, names)
    found, changed = [], 0
    for stage in stages(model, batches, names):
        expected = seen_in_full(model, batches, stage.modules)
        assert is_equal(seen_in(stage), expected), stage
        assert is_equal(seen_in(stage), expected), f"{stage}, run again"
        changed += any(not is_equal({name: expected[name]}, {name: before[name]}) for name in stage.modules)
        halve(model, stage.modules)
        found.append(stage)
    assert changed == len(found) - 1, "what earlier stages change must be seen by all but the first"
    assert sorted(name for stage in found for name in stage.modules) == sorted(names)
    return [stage.name for stage in found]


class Block(nn.Module):
    def __init__(self, width, inplace=False):
        super().__init__()
        self.activation = nn.ReLU(inplace=inplace)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.activation(x))))


class Residual(nn.Module):
    """A stem, blocks in a list, and a head."""

    def __init__(self, blocks=3, width=6, inplace=False):
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width, inplace) for _ in range(blocks))
        self.drop = nn.Dropout(0.5)
        self.left = nn.Linear(width, 3)
        self.right = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(self.drop(x))
        return self.left(x), self.right(x)


def random_batches(*shape, count=3):
    return [torch.randn(shape) for _ in range(count)]


def count_calls(monkeypatch, kind):
    """How often modules of a class run, by module."""
    calls = defaultdict(int)
    forward = kind.forward

    def counted(self, *args, **kwargs):
        calls[id(self)] += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return calls


def test_each_part_of_a_sequential_is_a_stage():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    assert check(model, random_batches(3, 4)) == ["0", "2", "4"]


@pytest.mark.parametrize("inplace", [False, True])
def test_blocks_in_a_list_are_stages_and_the_rest_goes_by_input(inplace):
    model = Residual(inplace=inplace)
    model.train()
    names = check(model, random_batches(2, 5))
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2", "left, right"]
    assert all(module.training for module in model.modules())


def test_blocks_of_which_only_some_hold_a_wanted_module():
    model = Residual(blocks=5)
    assert check(model, random_batches(2, 5), ["blocks.1.up", "blocks.3.down"]) == ["blocks.1", "blocks.3"]


def test_several_chains():
    model = nn.Sequential()
    model.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model.flat = nn.Flatten()
    model.classifier = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2))
    found = check(model, [(torch.randn(2, 3, 10, 10), torch.zeros(2)) for _ in range(2)])
    assert found == ["features.0", "features.2", "features.4", "classifier.0", "classifier.2"]


class Branches(nn.Module):
    """Branches in a list, which do not follow each other, on one input; joined, and read twice by one layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, size, padding=size // 2) for size in (1, 3, 5))
        self.mix = nn.Conv2d(12, 12, 1)
        self.head = nn.Linear(12, 2)

    def forward(self, images):
        x = self.stem(images).relu()
        x = torch.cat([branch(x) for branch in self.branches], 1)
        x = self.mix(self.mix(x).relu()).relu()
        return {"logits": self.head(x.mean((2, 3)))}


def test_branches_are_run_from_the_start():
    batches = [{"images": torch.randn(2, 3, 6, 6)} for _ in range(2)]
    assert check(Branches(), batches) == ["stem", "branches.0, branches.1, branches.2", "mix", "head"]


def test_a_tensor_that_changes_between_two_layers_is_two_inputs():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x):
            y = self.a(x) + self.b(x)
            x.add_(y)
            return self.c(x)

    batches = random_batches(2, 3)
    given = [batch.clone() for batch in batches]
    model = Adds()
    assert [stage.name for stage in stages(model, batches, ["a", "b", "c"])] == ["a, b", "c"]
    for stage in stages(model, batches, ["c"]):
        seen = seen_in(stage)
    for batch, before, input_of_c in zip(batches, given, seen["c"], strict=True):
        assert torch.equal(batch, before), "the caller's batch is as it was"
        with torch.no_grad():
            assert torch.equal(input_of_c, before + (model.a(before) + model.b(before)))


class Shifted(nn.Bilinear):
    """Writes into its first input."""

    def forward(self, x, extra):
        return super().forward(x.add_(1), extra)


class Crossed(nn.Module):
    """Blocks whose further arguments are made in one of many ways."""

    def __init__(self, made):
        super().__init__()
        self.layers = nn.ModuleList((Shifted if made == "beforehand" else nn.Bilinear)(4, 4, 4) for _ in range(3))
        self.made = made

    def forward(self, x):
        extra = [torch.sin(x), torch.cos(x), torch.tanh(x)]
        first = x
        for number, layer in enumerate(self.layers):
            if self.made == "beforehand":
                x = layer(x, extra[number])
            elif self.made == "by a block":
                x = layer(x, first * 1)
                first = x
            elif self.made == "beforehand, with a change between":
                x = layer(x, extra[0])
                x[x > 10] = 0
            elif self.made == "without torch":
                x = layer(x, torch.from_numpy(x.numpy() + 1))
            elif self.made == "beforehand, in another dtype":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    x = layer(x, extra[0])
        return x


@pytest.mark.parametrize(
    ("made", "holds"),
    [
        ("beforehand", True),
        ("by a block", False),
        ("beforehand, with a change between", False),
        ("without torch", False),
        ("beforehand, in another dtype", False),
    ],
)
def test_further_arguments_must_not_depend_on_blocks(made, holds, monkeypatch):
    model, batches = Crossed(made), random_batches(2, 4)
    names = [f"layers.{number}" for number in range(3)]
    assert check(model, batches, names) == names
    calls = count_calls(monkeypatch, nn.Bilinear)
    for stage in stages(model, batches, names):
        stage.run(lambda name, inputs: None)
    # A chain: the dry run, to confirm it within the model and alone, and then each batch to catch, to see, to go on.
    # Nothing comes behind the last block: it is seen as soon as it is called.
    chain = [1 + 2 + 3 * 3, 1 + 2 + 3 * 3, 1 + 3]
    # Else the dry run, and each batch from the start up to the layer that is seen.
    from_start = [1 + 3 * 2, 1 + 3, 1]
    if made == "beforehand, in another dtype":  # which is found out only by trying
        from_start = [1 + 2 + 3 * 2, 1 + 2 + 3, 1]
    assert [calls[id(layer)] for layer in model.layers] == (chain if holds else from_start)


def test_blocks_that_refuse_to_be_run_alone():
    class Bound(nn.Linear):
        def forward(self, x):
            if not running:
                raise RuntimeError("not without my model")
            return super().forward(x)

    class Binding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*(Bound(3, 3) for _ in range(3)))

        def forward(self, x):
            running.append(self)
            try:
                return self.layers(x)
            finally:
                running.pop()

    running = []
    assert check(Binding(), random_batches(2, 3)) == ["layers.0", "layers.1", "layers.2"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.layers[4].weight = self.layers[0].weight

    def forward(self, x):
        return self.layers(x)


def test_blocks_that_share_a_weight_are_run_from_the_start():
    assert check(Tied(), random_batches(2, 4)) == ["layers.0", "layers.2", "layers.4"]


class Experts(nn.Module):
    """Which expert is called depends on the batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def forward(self, x):
        return self.experts[int(x[0, 0])](x)


def test_modules_that_only_later_batches_reach():
    model = Experts()
    batches = [torch.full((1, 2), float(expert)) for expert in (2, 0, 2)]
    found = {stage.name: seen_in(stage) for stage in stages(model, batches, ["experts.0", "experts.2"])}
    assert list(found) == ["experts.2", "experts.0"]
    assert [x[0, 0].item() for x in found["experts.2"]["experts.2"]] == [2, 2]
    assert [x[0, 0].item() for x in found["experts.0"]["experts.0"]] == [0]
    with pytest.raises(TrainingError, match=r"calls 'experts\.1', 'experts\.3' on no batch"):
        next(stages(model, batches, linears(model)))


def test_masks_of_parametrizations_count():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model, batches = Residual(), random_batches(2, 5)
    names = linears(model)
    for stage in stages(model, batches, names):
        assert is_equal(seen_in(stage), seen_in_full(model, batches, stage.modules))
        for name in stage.modules:
            parametrize.register_parametrization(model.get_submodule(name), "weight", Halved())
    for name in names:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")


def test_keyword_inputs_come_in_the_order_of_forward():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Bilinear(2, 3, 1)

        def forward(self, a, b):
            return self.product(input2=b, input1=a)

    a, b = torch.randn(4, 2), torch.randn(4, 3)
    seen = []
    for stage in stages(Named(), [{"b": b, "a": a}], ["product"]):
        stage.run(lambda name, inputs: seen.extend(inputs))
    assert [torch.equal(x, y) for x, y in zip(seen, (a, b), strict=True)] == [True, True]


def tokens(count=3, length=7):
    batches = []
    for number in range(count):
        mask = torch.ones(2, length + number, dtype=torch.long)
        mask[1, -2:] = 0
        batches.append({"input_ids": torch.randint(4, 50, mask.shape), "attention_mask": mask})
    return batches


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0}


def transformer(name, **config):
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    kind = getattr(transformers, name)
    return kind(kind.config_class(**config))


def test_llama_with_its_cache_on():
    model = transformer("LlamaForCausalLM", **TEXT, num_key_value_heads=1, use_cache=True)
    model.train()
    assert check(model, tokens()) == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
    assert model.config.use_cache is True
    assert model.training


def test_bert():
    model = transformer("BertForSequenceClassification", **TEXT)
    layers = [f"bert.encoder.layer.{number}" for number in range(3)]
    assert check(model, tokens()) == [*layers, "bert.pooler.dense", "classifier"]


def test_gpt2():
    model = transformer("GPT2LMHeadModel", vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    assert check(model, tokens(), names) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def test_vit():
    model = transformer("ViTForImageClassification", **SIZES, image_size=8, patch_size=4)
    found = check(model, [{"pixel_values": torch.randn(2, 3, 8, 8)} for _ in range(2)])
    assert len(found) == 5
    assert found[0].endswith("projection")
    assert found[-1] == "classifier"


def test_masks_that_differ_by_layer():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = transformer(
        "Gemma3ForCausalLM", **TEXT, head_dim=8, num_key_value_heads=1, sliding_window=3, layer_types=types
    )
    layers = [f"model.layers.{number}" for number in range(3)]
    assert check(model, tokens(), [name for name in linears(model) if "layers" in name]) == layers


def test_an_encoder_and_a_decoder_with_a_bias_that_the_first_layer_makes():
    model = transformer(
        "T5ForConditionalGeneration",
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    batches = [{**batch, "decoder_input_ids": torch.randint(4, 50, (2, 5))} for batch in tokens(2)]
    found = check(model, batches, [name for name in linears(model) if "block" in name])
    assert found == [f"{side}.block.{number}" for side in ("encoder", "decoder") for number in range(4)]


def test_torchs_own_encoder_whose_fast_path_no_hook_sees():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    names = [name for name in linears(model) if "out_proj" not in name]  # whose weight is used without calling it
    assert check(model, random_batches(2, 4, 8), names) == ["layers.0", "layers.1", "layers.2"]


def test_a_chain_costs_two_passes(monkeypatch):
    model = Residual(blocks=6)
    calls = count_calls(monkeypatch, Block)
    names = [name for name in linears(model) if name.startswith("blocks")]
    batches = random_batches(2, 5, count=10)
    for stage in stages(model, batches, names):
        stage.run(lambda name, inputs: None)
    alone = 1 + 1 + 1  # the dry run; to confirm, within the model and alone
    assert [calls[id(block)] for block in model.blocks] == [alone + 20] * 5 + [1 + 10]


def test_only_one_blocks_inputs_are_in_memory(monkeypatch):
    model = Residual(blocks=6)
    names = [name for name in linears(model) if name.startswith("blocks")]
    made = []
    forward = Block.forward

    def noted(self, x):
        y = forward(self, x)
        made.extend((weakref.ref(x), weakref.ref(y)))
        return y

    def alive():
        return len({id(tensor) for tensor in (reference() for reference in made) if tensor is not None})

    monkeypatch.setattr(Block, "forward", noted)
    all_stages = stages(model, random_batches(7, 5, count=4), names)
    for number, stage in enumerate(all_stages):
        assert alive() == (4 if number else 0), "what one block gave for four batches; the first one's is from the stem"
        peaks = []
        stage.run(lambda name, inputs, peaks=peaks: peaks.append(alive()))
        assert max(peaks) <= 4 + 1
    assert alive() == 0


def test_a_stage_that_is_over_says_so_and_holds_nothing():
    model = Residual()
    all_stages = stages(model, random_batches(2, 5), linears(model))
    first = next(all_stages)
    second = next(all_stages)
    inputs = []
    second.run(lambda name, given: inputs.append(weakref.ref(given[0])))
    with pytest.raises(TrainingError, match=r"stage 'stem': the stage is over"):
        first.run(lambda name, given: None)
    all_stages.close()
    with pytest.raises(TrainingError, match=r"stage 'blocks\.0'"):
        second.run(lambda name, given: None)
    gc.collect()
    assert all(reference() is None for reference in inputs)


class Unwilling(Exception):
    pass


@pytest.mark.parametrize("stage_number", [0, 1, 4])
def test_an_early_end_leaves_the_model_as_it_was(stage_number):
    model = Residual()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()

    def refuse(name, inputs):
        assert not any(module.training for module in model.get_submodule(name).modules())
        assert not torch.is_grad_enabled()
        raise Unwilling

    batches = [torch.ones(2, 5)]
    for number, stage in enumerate(stages(model, batches, linears(model))):
        assert torch.is_grad_enabled()
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        if number == stage_number:
            with pytest.raises(Unwilling):
                stage.run(refuse)
            break
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_buffers_that_forward_writes_are_put_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("runs", torch.zeros(()))

        def forward(self, x):
            self.runs += 1
            return self.linear(x)

    model = nn.Sequential(Counts(), Counts())
    for stage in stages(model, random_batches(1, 2), ["0.linear", "1.linear"]):
        stage.run(lambda name, inputs: None)
    assert [block.runs.item() for block in model] == [0, 0]


def test_autocast_around_it_keeps_no_old_weights():
    model, batches = Residual(), random_batches(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for stage in stages(model, batches, linears(model)):
            seen = seen_in(stage)
            with torch.autocast("cpu", enabled=False):
                torch.clear_autocast_cache()
            assert is_equal(seen, seen_in_full(model, batches, stage.modules))
            assert all(inputs[0].dtype == torch.bfloat16 or name == "stem" for name, inputs in seen.items())
            halve(model, stage.modules)


def test_works_in_inference_mode():
    model, batches = Residual(), random_batches(2, 5)
    with torch.inference_mode():
        found = [stage.name for stage in stages(model, batches, linears(model))]
    assert found == ["stem", "blocks.0", "blocks.1", "blocks.2", "left, right"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, torch.zeros(2)),
        lambda x: [x, {"label": 1}],
        lambda x: {"input": x},
    ],
)
def test_kinds_of_batches(wrap):
    data = random_batches(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    given = (wrap(batch) for batch in data)  # an iterator is read once
    for stage, expected in zip(stages(model, given, ["0", "1"]), (data, None), strict=True):
        seen = seen_in(stage)[stage.name]
        expected = [model[0](batch).detach() for batch in data] if expected is None else expected
        assert len(seen) == 3
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_errors():
    model, batch = Residual(), torch.ones(2, 5)
    with pytest.raises(InvalidValueError, match="no module is named"):
        stages(model, [batch], [])
    with pytest.raises(UnmatchedError, match=r"no module 'blocks\.0\.upp'.*Did you mean 'blocks\.0\.up'"):
        stages(model, [batch], ["stem", "blocks.0.upp"])
    with pytest.raises(TrainingError, match="Give at least one batch"):
        stages(model, [], ["stem"])
    with pytest.raises(TrainingError, match="inputs and targets cannot be told apart"):
        stages(model, ["text"], ["stem"])


def test_a_cache_in_a_batch_is_refused():
    class Cache:
        def get_seq_length(self):
            return 0

    with pytest.raises(TrainingError, match="grows with each run"):
        stages(Residual(), [{"x": torch.ones(2, 5), "past": Cache()}], ["stem"])


def test_a_batch_that_leaves_the_chain():
    class Leaves(Residual):
        def forward(self, x):
            return self.stem(x) if x.sum() < 0 else super().forward(x)

    model = Leaves()
    with pytest.raises(TrainingError, match=r"blocks\.0: a batch does not run through all blocks"):
        list(stages(model, [torch.ones(2, 5), -torch.ones(2, 5)], linears(model)))
