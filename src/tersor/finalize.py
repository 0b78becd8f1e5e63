"""After compression, one call: masks, scales and learned steps are cut together, and the small model simulates on."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.analysis.batches import batch_size_of
from tersor.checkpoint import save
from tersor.compressor import Compressor
from tersor.deploy import CompiledModel, QuantizationSpeedup
from tersor.deploy.lowering import Fallback
from tersor.deploy.plain import Plain, plain_copy
from tersor.deploy.small import make_small, simulated
from tersor.errors import InvalidValueError, VerificationError
from tersor.graph import fresh_inputs
from tersor.graph.inputs import evaluating, map_tensors
from tersor.pruning import FixedPruner
from tersor.quantization.base import CalibrationConfig, Quantizer
from tersor.quantization.training import TrainingQuantizer
from tersor.speedup.verify import outputs_of, relative_error
from tersor.storage import save_calibration
from tersor.wrapping import ModelWrappers

CALIBRATION_FILE = "calibration.safetensors"


@dataclass(frozen=True)
class Finalized:
    """A small model, and what it simulates.

    Attributes:
        model: with fewer channels; wrapped as long as there is a compressor: it rounds, and what could not leave is
            masked. Its weights are the latent ones.
        compressor: quantizers, and the masks that stay, on the small model, to train on with; None where there is
            neither.
        calibration: of all quantizers.
        fallbacks: what of the calibration had to be given up, and why.
        error: how far the small simulated model is from the masked simulated one, relative to the largest output.
        example_inputs: what it was verified on.
    """

    model: nn.Module
    compressor: Compressor | None
    calibration: CalibrationConfig
    fallbacks: tuple[Fallback, ...]
    error: float
    example_inputs: Any

    def plain(self, *, bake: bool = False) -> nn.Module:
        """A copy without any simulation; masked values are zero.

        Args:
            bake: with the rounded weights, in place of the latent ones of by now.
        """
        if self.compressor is None:
            return copy.deepcopy(self.model)
        if bake:
            return plain_copy(self.compressor).model
        model, wrappers = copy.deepcopy((self.model, self.compressor.wrappers))
        for name, targets in wrappers.masks().items():
            for target, mask in targets.items():
                if not target.startswith("_"):
                    wrappers[name].tensor(target).data.mul_(mask)
        wrappers.detach()
        return model

    def save(self, directory: str | os.PathLike[str], *, bake: bool = True) -> Path:
        """Write the small model, as :func:`tersor.load` reads it, with its calibration beside it.

        ``tersor deploy`` finds both.

        Args:
            directory: a folder of its own.
            bake: write the rounded weights; the latent ones, to train on with, do not say by themselves what algorithms
                that transform weights before they round them (``DoReFaQuantizer``, ``BNNQuantizer``) made of them.
        """
        folder = save(self.plain(bake=bake), directory)
        calibration = self._calibration()
        if calibration:
            save_calibration(calibration, folder / CALIBRATION_FILE)
        return folder

    def deploy(self, engine: str = "auto", **options: Any) -> CompiledModel:
        """Compile for an inference engine; see :class:`tersor.deploy.QuantizationSpeedup`, whose options it takes."""
        source = self.model if self.compressor is None else self.compressor
        return QuantizationSpeedup(source, self.example_inputs, engine=engine, **options).compile()

    def _calibration(self) -> CalibrationConfig:
        """By now: training on changes it."""
        found: CalibrationConfig = {}
        for quantizer in () if self.compressor is None else self.compressor.chain:
            if isinstance(quantizer, Quantizer):
                for module, targets in quantizer.get_calibration_config().items():
                    found.setdefault(module, {}).update(targets)
        return found


def finalize(
    compressor: Compressor, example_inputs: Any = None, *, round_to: int = 1, tolerance: float = 1e-4
) -> Finalized:
    """Make the model of finished compressors small, with all that they simulate.

    The masked channels are cut out of the latent weights, of scales and zero points, learned or measured, and of norms
    that are quantized with a layer; then the same quantizers simulate the small model. Its outputs are compared with
    those of the masked, rounding model. The compressor and its model stay as they are.

    Args:
        compressor: one of those that are fused on the model, after ``compress()`` or ``finish()``, still wrapped.
        example_inputs: what the model can be run on; by default the compressor's.
        round_to: leave this many channels, or heads, or a multiple; see :class:`tersor.speedup.ModelSpeedup`.
        tolerance: the largest accepted difference, relative to the largest output.

    Raises:
        InvalidValueError: no example inputs, a model that is unwrapped, or a quantizer that has no scales yet.
        SpeedupError: sizes stand in the code of a module whose inputs or outputs are quantized as a whole.
        VerificationError: the small model computes something else.

    Example:
        >>> import torch
        >>> from tersor.pruning import L1NormPruner
        >>> from tersor.quantization import PtqQuantizer
        >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 8)
        >>> pruner = L1NormPruner(net, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=x)
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}]
        >>> quantizer = PtqQuantizer.from_compressor(pruner, config_list, calibration=[x])
        >>> _ = quantizer.compress()
        >>> final = finalize(quantizer)
        >>> final.model[0].out_features, final.calibration["0"]["weight"]["scale"].shape
        (4, torch.Size([4, 1]))
        >>> bool((final.model(x) - net(x)).abs().max() < 1e-5)
        True
    """
    example_inputs = compressor.example_inputs if example_inputs is None else example_inputs
    if example_inputs is None:
        raise InvalidValueError(
            "there is nothing to run the model on",
            where="example_inputs",
            remedy="Give example inputs: a tensor, a tuple of positional or a mapping of keyword arguments.",
        )
    plain = plain_copy(compressor)
    small = make_small(plain, example_inputs, round_to=round_to, tolerance=tolerance)
    latent = make_small(
        replace(_latent(compressor), masks=plain.masks), example_inputs, round_to=round_to, verify=False
    )
    model, last = latent.model, None
    quantizers = [own for own in compressor.chain if isinstance(own, Quantizer)]
    for quantizer in quantizers:
        last = _on(quantizer, model, last, small.calibration)
    masks = {module: dict(targets) for module, targets in small.masks.items()}
    for module, targets in small.activation_masks.items():
        for target, mask in targets.items():
            if mask.factors:
                masks.setdefault(module, {})[target] = mask.product()
    if masks:
        last = FixedPruner(model, masks, previous=last)
    error = _error(simulated(small), model, example_inputs)
    if not error <= tolerance:
        raise VerificationError(
            f"the small model's simulation differs from the masked one's by {error:.2g} relative, more than "
            f"{tolerance:g}",
            where="finalize",
            remedy="Report it with the model and the config lists.",
        )
    return Finalized(model, last, small.calibration, small.fallbacks, error, example_inputs)


def _latent(compressor: Compressor) -> Plain:
    """A copy of the model with the latent weights, without any simulation."""
    model, wrappers = copy.deepcopy((compressor.model, compressor.wrappers))
    wrappers.detach()
    return Plain(model.eval(), {}, {})


def _on(
    quantizer: Quantizer, model: nn.Module, previous: Compressor | None, calibration: CalibrationConfig
) -> Quantizer:
    """The same quantizer on the small model, with what it found."""
    own = copy.copy(quantizer)
    own.model, own.evaluator = model, None
    own.wrappers = previous.wrappers if previous else ModelWrappers(model)
    own._chain = previous._chain if previous else []
    own._make_plan(None, None)
    own._wrap_targets()
    own._chain.append(own)
    names = {(target.config.module_name, target.config.target_name) for target, _ in own.transforms()}
    own.update_calibration_config(
        {
            module: found
            for module, targets in calibration.items()
            if (found := {target: said for target, said in targets.items() if (module, target) in names})
        }
    )
    if isinstance(own, TrainingQuantizer):
        own.keeps_scales = True
    return own


def _error(reference: nn.Module, model: nn.Module, example_inputs: Any) -> float:
    """How far two simulations are from each other, in double precision where the model takes it."""
    inputs = fresh_inputs(example_inputs, batch_size_of(example_inputs), seed=1)
    doubled = map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    try:
        return relative_error(*(outputs_of(_doubled(own), doubled) for own in (model, reference)))
    except RuntimeError:  # a model that insists on its own precision
        return relative_error(outputs_of(model, inputs), outputs_of(reference, inputs))


def _doubled(model: nn.Module) -> nn.Module:
    """A copy in double precision, with the weights that it simulates now.

    Weights rounded anew in double would be other numbers than those stored in single precision, by a last digit, and
    in deep models that is enough for activations to be rounded the other way.
    """
    model = copy.deepcopy(model)
    with evaluating(model), torch.no_grad():
        for module in [own for own in model.modules() if parametrize.is_parametrized(own)]:
            chains: Any = module.parametrizations
            for name, chain in chains.items():
                if not chain.is_tensor:  # several originals, as of the user's weight norm: no rounding
                    continue
                value = getattr(module, name)
                # To remove it would change the class, which the model that was copied has too.
                for position in range(len(chain)):
                    chain[position] = nn.Identity()
                chain.original.data = value
    return model.double()
