"""What ``benchmarks.quantization`` compares; a quantizer of Tersor gets a row there by a line in `QUANTIZERS`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.mnist import Batches
from tersor.config.specs import OBSERVERS
from tersor.quantization import (
    AdaRoundQuantizer,
    BNNQuantizer,
    DoReFaQuantizer,
    GPTQQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
    Quantizer,
    auto_fuse,
    equalize,
    fuse_modules,
    mixed_precision,
)
from tersor.training import TorchEvaluator

Classify = Callable[[Tensor], Tensor]
"""From images to logits."""


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network to quantize, and the data that a quantizer may look at.

    Attributes:
        model: the network.
        ends: its first and its last layer.
        calibration: the images for calibration.
        batch_size: how many of them at a time.
        seed: of what is random.
        train: the images to train on; None where there are none.
        learning_rate: of that training, at its highest.
    """

    model: nn.Module
    ends: tuple[str, str]
    calibration: Tensor
    batch_size: int
    seed: int
    train: Batches | None = None
    learning_rate: float = 0.0

    @property
    def steps(self) -> int:
        """How long the training is."""
        return 0 if self.train is None else len(self.train)

    @property
    def example(self) -> Tensor:
        """A few images, to trace with."""
        return self.calibration[:4]

    @property
    def layers(self) -> list[str]:
        """The names of all convolutions and linear layers."""
        return [name for name, module in self.model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]

    def copy(self) -> nn.Module:
        """A copy of the network; also starts the random numbers of the seed."""
        torch.manual_seed(self.seed)
        return copy.deepcopy(self.model)

    def batches(self) -> list[Tensor]:
        """The images for calibration, in batches."""
        return list(self.calibration.split(self.batch_size))

    def training(self) -> Batches:
        """The batches to train on, in the order of the seed.

        Raises:
            ValueError: there are none.
        """
        if self.train is None:
            raise ValueError("there is nothing to train this network on")
        torch.manual_seed(self.seed)
        return self.train


@dataclass(frozen=True)
class Bits:
    """How many bits weights and inputs of the layers between the first and the last have."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}"


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        quantize: returns the quantized network in eval mode, or what computes as it does.
        says: what was run, for the reader of the results.
        bits: of the layers between; the first and the last have 8. None for a network that is not quantized.
        trains: it fine-tunes the weights on training images; else the images for calibration are all that it sees.
        fits: whether the row makes sense for a network.
    """

    quantize: Callable[[Task], Classify]
    says: str
    bits: Bits | None
    trains: bool
    fits: Callable[[nn.Module], bool] = lambda _: True


def optimizer_of(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The same for all rows that train."""
    return torch.optim.AdamW(model.parameters(), task.learning_rate)


def schedule_of(optimizer: torch.optim.Optimizer, task: Task) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle, the same for all rows that train."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=task.steps + 1)


def norms(model: nn.Module) -> list[tuple[str, str]]:
    """Convolutions with their batch norms, which stand right behind them in the networks here.

    >>> norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3)))
    [('0', '1')]
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, _NEIGHBOURS)]
    return [
        (name, behind)
        for (name, module), (behind, norm) in pairwise(modules)
        if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]


_NEIGHBOURS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Linear)


Configure = Callable[[nn.Module, Task], list[dict[str, Any]]]
"""From the network, as it was prepared, to a config list."""


def layers_and_inputs(
    bits: Bits,
    *,
    fused: bool = False,
    ends: bool = True,
    weights: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Configure:
    """The weights and inputs of all convolutions and linear layers.

    Args:
        bits: of the layers between the first and the last.
        fused: with the modules that ``auto_fuse`` finds as ``fuse_names``.
        ends: the first and the last layer too, with 8 bits.
        weights: settings of all weights besides their type.
        inputs: settings of all inputs besides their type, in place of the affine scheme.
    """

    def configure(model: nn.Module, task: Task) -> list[dict[str, Any]]:
        chains = auto_fuse(model, task.example) if fused else []

        def entry(names: list[str], own: Bits) -> dict[str, Any]:
            given = {"quant_scheme": "affine"} if inputs is None else inputs
            signed = inputs == {} and names == [task.ends[0]]  # images have both signs, and no zero point to move
            settings = {
                "weight": {"quant_dtype": f"int{own.weights}", **(weights or {})},
                "_input_0": {"quant_dtype": f"{'int' if signed else 'uint'}{own.activations}", **given},
            }
            chosen = [chain for chain in chains if chain[0] in names]
            asked = {"op_names": names, "target_names": [*settings], "target_settings": settings}
            return {**asked, **({"fuse_names": chosen} if chosen else {})}

        between = [name for name in task.layers if name not in task.ends]
        return [entry(between, bits), *(entry([name], Bits(8, 8)) for name in task.ends if ends)]

    return configure


def signs(model: nn.Module, task: Task) -> list[dict[str, Any]]:
    """The weights between the first and the last layer, and what stands before the activation functions.

    After a ReLU there is nothing left for a sign to tell.
    """
    weights = [name for name in task.layers if name not in task.ends]
    outputs = [norm for _, norm in norms(model)] or [name for name in task.layers if name != task.ends[1]]
    return [
        {"op_names": weights, "target_names": ["weight"], "quant_dtype": "int1"},
        {"op_names": outputs, "target_names": ["_output_0"], "quant_dtype": "int1"},
    ]


def calibrated(
    quantizer_class: Callable[..., Quantizer],
    bits: Bits,
    says: str,
    *,
    prepare: Callable[[nn.Module, Tensor], Any] | None = None,
    fits: Callable[[nn.Module], bool] = lambda _: True,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Method:
    """A row for a post-training quantizer of Tersor.

    Args:
        quantizer_class: the class.
        bits: of the layers between the first and the last.
        says: what else there is to say.
        prepare: done to the network before, in place; without it norms are fused.
        fits: as `Method` has it.
        options: of the quantizer itself.
        **settings: of `layers_and_inputs`.
    """

    def quantize(task: Task) -> Classify:
        model = task.copy()
        if prepare is not None:
            prepare(model, task.example)
        config_list = layers_and_inputs(bits, fused=prepare is None, **settings)(model, task)
        given = {"calibration": task.batches(), "example_inputs": task.example, **(options or {})}
        quantizer_class(model, config_list, **given).compress()
        return model.eval()

    return Method(quantize, _says(quantizer_class, says, options), bits, trains=False, fits=fits)


def trained(
    quantizer_class: Callable[..., Quantizer],
    bits: Bits,
    says: str,
    *,
    configure: Configure | None = None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Method:
    """A row for a quantizer of Tersor that trains.

    Args:
        quantizer_class: the class.
        bits: of the layers between the first and the last.
        says: what else there is to say.
        configure: makes the config list; that of `layers_and_inputs` by default.
        options: of the quantizer itself.
        **settings: of `layers_and_inputs`.
    """

    def quantize(task: Task) -> Classify:
        model = task.copy()
        optimizer = optimizer_of(model, task)
        evaluator = TorchEvaluator.from_loader(
            task.training(),
            F.cross_entropy,
            optimizer,
            schedule_of(optimizer, task),
            scheduler_interval="step",
            progress=False,
        )
        config_list = (configure or layers_and_inputs(bits, **settings))(model, task)
        quantizer = quantizer_class(model, config_list, evaluator, example_inputs=task.example, **(options or {}))
        quantizer.compress(max_epochs=1)
        return model.eval()

    return Method(quantize, _says(quantizer_class, says, options), bits, trains=True)


def _says(quantizer_class: Callable[..., Quantizer], says: str, options: Mapping[str, Any] | None) -> str:
    named = "".join(f", {key}={value!r}" for key, value in (options or {}).items())
    return f"tersor {getattr(quantizer_class, '__name__', quantizer_class)}{named}; {says}"


def mixed(bits: Bits, says: str) -> Method:
    """A row whose weights have widths of their own, in as many bytes as those of one width would have.

    Args:
        bits: of inputs, and of the weights between the first and the last layer that set the budget.
        says: what else there is to say.
    """

    def quantize(task: Task) -> Classify:
        model = task.copy()
        _fold(model, task.example)
        uniform = layers_and_inputs(bits)(model, task)
        sizes = {name: model.get_submodule(name).get_parameter("weight").numel() for name in task.layers}
        budget = sum(size * (8 if name in task.ends else bits.weights) for name, size in sizes.items()) / 8
        config_list, _ = mixed_precision(
            model, uniform, task.batches(), budget=budget, choices=WIDTHS, targets=("weight",)
        )
        PtqQuantizer(model, config_list, calibration=task.batches(), example_inputs=task.example).compress()
        return model.eval()

    return Method(quantize, f"tersor mixed_precision and PtqQuantizer; {says}", bits, trains=False)


def _fold(model: nn.Module, example: Tensor) -> None:
    fuse_modules(model, auto_fuse(model, example), example)


def _equalize(model: nn.Module, example: Tensor) -> None:
    _fold(model, example)
    equalize(model, example)


def _equalize_with_relu(model: nn.Module, example: Tensor) -> None:
    _fold(model, example)
    equalize(model, example, replace_relu6=True)


def _has_relu6(model: nn.Module) -> bool:
    return any(isinstance(module, nn.ReLU6) for module in model.modules())


def _plain(task: Task) -> Classify:
    return task.copy().eval()


def _tuned(task: Task) -> Classify:
    model = task.copy().train()
    optimizer = optimizer_of(model, task)
    schedule = schedule_of(optimizer, task)
    for images, labels in task.training():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _observed_by(observer: str) -> Method:
    inputs = {"quant_scheme": "affine", "observer": observer}
    return calibrated(PtqQuantizer, EIGHT, f"ranges of inputs by the observer {observer!r}", inputs=inputs)


EIGHT, FOUR, TWO = Bits(8, 8), Bits(4, 4), Bits(2, 2)
WIDTHS = (2, 3, 4, 5, 6, 8)
WHOLE: Mapping[str, Any] = {"granularity": [[-1], "front", -1]}

QUANTIZERS: dict[str, Method] = {
    "fp32": Method(_plain, "the network as it was trained", None, trains=False),
    "fp32, fine-tuned": Method(_tuned, "trained as the rows that train, without quantization", None, trains=True),
    "PTQ": calibrated(PtqQuantizer, EIGHT, "its default observers: mse for inputs, minmax for weights"),
    **{f"PTQ, {observer}": _observed_by(observer) for observer in OBSERVERS if observer != "mse"},
    "PTQ, bias correction": calibrated(PtqQuantizer, EIGHT, "its default observers", options={"bias_correction": True}),
    "PTQ, equalised": calibrated(PtqQuantizer, EIGHT, "norms folded and layers equalised before", prepare=_equalize),
    "PTQ, per tensor": calibrated(PtqQuantizer, EIGHT, "one scale for each weight", weights=WHOLE),
    "PTQ, per tensor, equalised": calibrated(
        PtqQuantizer,
        EIGHT,
        "one scale for each weight, norms folded and layers equalised before",
        prepare=_equalize,
        weights=WHOLE,
    ),
    "PTQ, per tensor, equalised, ReLU for ReLU6": calibrated(
        PtqQuantizer,
        EIGHT,
        "one scale for each weight, norms folded, ReLU6 replaced and layers equalised before",
        prepare=_equalize_with_relu,
        fits=_has_relu6,
        weights=WHOLE,
    ),
    "PTQ, 4-bit weights": calibrated(PtqQuantizer, Bits(4, 8), "its default observers"),
    "PTQ, 4-bit weights, mse": calibrated(
        PtqQuantizer, Bits(4, 8), "its default observer", options={"weight_observer": "mse"}
    ),
    "PTQ, 4-bit weights, mixed": mixed(
        Bits(4, 8), f"weights of {WIDTHS} bits in as many bytes as with 4, and 8 in the first and the last layer"
    ),
    "GPTQ, 4-bit weights": calibrated(GPTQQuantizer, Bits(4, 8), "norms folded before", prepare=_fold),
    "AdaRound, 4-bit weights": calibrated(AdaRoundQuantizer, Bits(4, 8), "norms folded before", prepare=_fold),
    "PTQ, 4 bits": calibrated(PtqQuantizer, FOUR, "its default observers"),
    "PTQ, 4 bits, mse": calibrated(PtqQuantizer, FOUR, "its default observer", options={"weight_observer": "mse"}),
    "QAT": trained(QATQuantizer, EIGHT, "norms fused", fused=True),
    "QAT, 4 bits": trained(QATQuantizer, FOUR, "norms fused", fused=True),
    "QAT, 2 bits": trained(QATQuantizer, TWO, "norms fused", fused=True),
    "LSQ, 4 bits": trained(LsqQuantizer, FOUR, "norms not fused", inputs={}),
    "LSQ, 2 bits": trained(LsqQuantizer, TWO, "norms not fused", inputs={}),
    "LSQ+, 4 bits": trained(LsqPlusQuantizer, FOUR, "norms not fused"),
    "LSQ+, 2 bits": trained(LsqPlusQuantizer, TWO, "norms not fused"),
    "DoReFa, 4 bits": trained(DoReFaQuantizer, FOUR, "first and last layer in fp32", ends=False, inputs={}),
    "DoReFa, 2 bits": trained(DoReFaQuantizer, TWO, "first and last layer in fp32", ends=False, inputs={}),
    "DoReFa, 1-bit weights": trained(
        DoReFaQuantizer, Bits(1, 2), "first and last layer in fp32", ends=False, inputs={}
    ),
    "BNN": trained(
        BNNQuantizer,
        Bits(1, 1),
        "first and last layer in fp32; signs of weights, and of what norms (without any: layers) give, before the ReLU",
        configure=signs,
    ),
}
