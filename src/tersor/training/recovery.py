r"""Repairs without training, after one-shot pruning or quantization: batch norm statistics and biases.

Compression moves what flows through a model: each channel gets another mean and variance. Both functions put that right
again, from a few hundred samples and without a gradient:

- :func:`reestimate_batch_norm` measures anew what batch norms normalise by. It needs nothing but the model, and does
  nearly all that can be done where batch norms follow the layers.
- :func:`correct_bias` gives each output channel the mean back that it had before. It is for what has no batch norm
  behind it, and needs the model from before.

Statistics first, biases second: biases fitted to old statistics are wrong for the new ones.

Both take any module (plain, or wrapped by compressors), and batches as training does: ``(inputs, targets)``, where the
targets are not looked at, or a mapping of arguments; or inputs alone. Where ``torch.distributed`` is initialised, every
process calls with batches of its own; what is measured is pooled, so all come to the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from tersor.errors import InvalidValueError
from tersor.graph.inputs import evaluating
from tersor.targets.channels import activation_channel_dim
from tersor.training.batches import to_device
from tersor.training.loops import device_of
from tersor.training.moments import Moments, add_moments, channel_moments, pooled_moments
from tersor.training.ranks import of_each_process
from tersor.training.stages import inputs_of
from tersor.wrapping.stack import Mask, Stage, TargetStack, multiply
from tersor.wrapping.wrapper import Wrapper

BIASED = (nn.Linear, _ConvNd, _BatchNorm)
"""The modules whose bias is one number for each output channel."""


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> int:
    r"""Measure the mean and variance of every batch norm's input anew, and write them into its running statistics.

    The model runs in eval mode (no dropout), but each batch norm normalises by the statistics of the batch, so that the
    old ones, which no longer fit, reach no later layer. Over all :math:`n` values that a channel takes,

    .. math:: \mu = \frac{1}{n} \sum_i x_i, \qquad \sigma^2 = \frac{1}{n - 1} \sum_i (x_i - \mu)^2

    So each value weighs the same, also in a last batch that is smaller. The batch norm paper, and PyTorch's cumulative
    average (``momentum=None``), take the mean of the batches' variances instead. That lacks the variance between the
    batches' means, so it is too small where batches are small or sorted; for one batch, both are the same.

    A deeper batch norm sees inputs that were normalised by batch, not yet by the new statistics: take batches as large
    as in training. One that the model does not run in eval mode (of an auxiliary head) keeps what it has. A channel
    that is masked throughout gets a variance of zero: call this again should it ever come back.

    Papers: Wu, Johnson: Rethinking "Batch" in BatchNorm (2021), "precise batch norm"; for pruning, Li, Wu, Su, Wang:
    EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning (ECCV 2020), "adaptive batch norm".

    Args:
        model: changed in place, in nothing but the running statistics and ``num_batches_tracked``, which becomes the
            number of batches: a cumulative average goes on from there. ``momentum`` stays.
        batches: training data; some hundred to some thousand samples are enough. As in training, PyTorch refuses a
            batch that has only one value for a channel (``drop_last=True`` avoids it).
        max_batches: stop after so many (in each process); None takes all.

    Returns:
        The number of batches, of all processes together.

    Raises:
        InvalidValueError: the model has, or runs, no batch norm that tracks statistics, or there is no batch. As after
            any error of the model or the data, nothing has changed.

    >>> model = nn.BatchNorm1d(1)
    >>> reestimate_batch_norm(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [3.0]])])
    2
    >>> model.running_mean, model.running_var
    (tensor([3.]), tensor([4.6667]))
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }
    if not norms:
        raise InvalidValueError(
            "the model has no batch norm that tracks statistics",
            where="model",
            remedy="Leave this step out; where batch norms are folded into convolutions, call it before that.",
        )
    moments: dict[str, Moments] = {}
    batch_count = 0
    with evaluating(model), _normalising_by_batch(norms.values()), ExitStack() as hooks:
        for name, norm in norms.items():
            hooks.enter_context(_measure_input(norm, name, moments))
        for batch in _first(batches, max_batches):
            _run(model, batch)
            batch_count += 1
    batch_count = _some(batch_count)
    pooled = pooled_moments(moments)
    if not pooled:
        raise InvalidValueError("the model runs none of its batch norms in eval mode", where="model")
    with torch.no_grad():
        for name, found in pooled.items():
            statistics = Wrapper(name, norms[name])
            statistics.tensor("running_mean").copy_(found.mean)
            statistics.tensor("running_var").copy_(found.squares / max(found.count - 1, 1))
            statistics.tensor("num_batches_tracked").fill_(batch_count)
    return batch_count


def output_moments(model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None) -> dict[str, Moments]:
    """What the layers give that :func:`correct_bias` corrects: a reference that takes no copy of the model.

    Ask for it before compression, or while what simulates it is switched off.

    Args:
        model: stays as it is.
        batches: as for training; some hundred samples are enough.
        max_batches: take so many (in each process); None takes all.

    Returns:
        The moments of each layer's outputs over all processes, by name, in the order in which the layers run.

    Raises:
        InvalidValueError: there is no layer with a bias, or no batch.

    >>> output_moments(nn.BatchNorm1d(1), [torch.tensor([[1.0], [3.0]])])[""].count
    2
    """
    modules = _correctable(model)
    with evaluating(model):
        kept = list(_first(batches, max_batches))
        _some(len(kept))
        return _output_moments(model, modules, kept)


def correct_bias(
    model: nn.Module,
    reference: nn.Module | Mapping[str, Moments],
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
) -> list[str]:
    r"""Give each output channel the mean that it has in the model from before compression.

    Removed and rounded weights shift the mean of a layer's outputs, and a shift is what a bias can take back:

    .. math:: b_c \leftarrow b_c + E[y_c] - E[\tilde y_c]

    with :math:`E` the mean over all samples and positions, :math:`y` of the reference, :math:`\tilde y` of the model.
    It goes layer after layer in the order in which they run, so each one sees what the corrected ones before it give.
    Linear layers, convolutions and batch norms with a bias are corrected. All else stays as it is: other modules,
    layers without a bias (a batch norm behind one makes good for it), and layers that are read without being called
    (the output projection in ``nn.MultiheadAttention``).

    - **Masks**: a masked bias stays masked, so removed channels stay zero. Where the weight is masked and the bias is
      not, the bias becomes the channel's old mean. A speedup keeps that only with ``constants="fold"``.
    - **Masked or quantized outputs** are measured as they are before that; a quantized bias comes as near as its grid
      allows.
    - **A layer that runs several times** in one forward pass has one mean over all of its calls, but what the first
      call's correction does to the inputs of the second is not foreseen.

    It costs one pass of the reference and one pass of the model for each layer, over batches that are drawn once and
    kept in memory: give a calibration set, or ``max_batches``.

    Papers: Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias
    Correction (ICCV 2019), section 4.2, by measuring as in its appendix D; Finkelstein, Almog, Grobman: Fighting
    Quantization Bias with Bias (2019).

    Args:
        model: changed in place, in nothing but its (latent) biases.
        reference: a copy from before compression, in which the module of a name computes what the model's should: batch
            norms are folded in both or in neither. It stays as it is. Or what :func:`output_moments` gave of the model
            itself before, on the same batches.
        batches: as for training; some hundred samples are enough.
        max_batches: take so many (in each process); None takes all.

    Returns:
        The names of the corrected modules, in order.

    Raises:
        InvalidValueError: a module is not in the reference or has another number of channels there (call it before the
            speedup), there is no bias to correct, there is no batch, or the reference is the model itself. As after any
            error of the models or the data, nothing has changed.

    >>> reference, model = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> reference.load_state_dict({"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> model.load_state_dict({"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.zeros(1)})
    <All keys matched successfully>
    >>> correct_bias(model, reference, [torch.tensor([[1.0, 4.0], [2.0, 8.0]])])
    ['']
    >>> model.bias.data
    tensor([6.])
    """
    modules = _correctable(model)
    if isinstance(reference, nn.Module):
        _check_reference(model, reference, modules)
    with evaluating(model):
        kept = list(_first(batches, max_batches))
        _some(len(kept))
        if isinstance(reference, nn.Module):
            with evaluating(reference):
                targets = _output_moments(reference, modules, kept)
        else:
            targets = {name: found for name, found in reference.items() if name in modules}
        biases = {name: Wrapper(name, modules[name]).tensor("bias") for name in targets}
        _check_channels(biases, targets)
        before = {name: bias.clone() for name, bias in biases.items()}
        corrected: list[str] = []
        try:
            for name, target in targets.items():
                found = _output_moments(model, {name: modules[name]}, kept)
                if name in found:
                    shift = (target.mean - found[name].mean).to(biases[name].device)
                    biases[name].add_(multiply(shift, _bias_masks(modules[name])))
                    corrected.append(name)
        except BaseException:
            for name, bias in biases.items():
                bias.copy_(before[name])
            raise
    return corrected


@contextmanager
def _normalising_by_batch(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Batch norms in eval mode use the statistics of the batch for a while, and do not touch their own."""
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


def _measure_input(norm: nn.Module, name: str, moments: dict[str, Moments]) -> RemovableHandle:
    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        add_moments(moments, name, channel_moments(args[0] if args else kwargs["input"], dim=1))

    return norm.register_forward_pre_hook(measure, with_kwargs=True)


def _measure_output(layer: nn.Module, kind: nn.Module, name: str, moments: dict[str, Moments]) -> RemovableHandle:
    """Measure what a layer gives, before any other hook changes it; `kind` tells where the channels stand."""

    def measure(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        dim = activation_channel_dim(kind, output.dim())
        assert dim is not None, "known for all that is BIASED"
        add_moments(moments, name, channel_moments(output, dim))

    return layer.register_forward_hook(measure, prepend=True)


def _output_moments(model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any]) -> dict[str, Moments]:
    """What the modules of these names give over the batches of all processes, in the order in which they run."""
    moments: dict[str, Moments] = {}
    with ExitStack() as hooks:
        for name, kind in modules.items():
            hooks.enter_context(_measure_output(model.get_submodule(name), kind, name, moments))
        for batch in batches:
            _run(model, batch)
    return pooled_moments(moments)


def _correctable(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model that have a bias for each output channel."""
    modules: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, BIASED) and module.bias is not None
    }
    if not modules:
        raise InvalidValueError("has no linear layer, convolution or batch norm with a bias", where="model")
    return modules


def _check_reference(model: nn.Module, reference: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a reference that is the model itself, or has not all of its modules."""
    if reference is model:
        raise InvalidValueError(
            "is the model itself, so there is nothing to correct",
            where="reference",
            remedy="Keep a copy from before compression (reference = copy.deepcopy(model)), or output_moments(model).",
        )
    known = {name for name, _ in reference.named_modules(remove_duplicate=False)}
    if missing := [name for name in modules if name not in known]:
        raise InvalidValueError(
            f"has no module {', '.join(map(repr, missing))}",
            where="reference",
            remedy="Give a copy of the same model from before compression.",
        )


def _check_channels(biases: Mapping[str, Tensor], targets: Mapping[str, Moments]) -> None:
    """Refuse a model that has other numbers of channels than its reference, or a reference that runs nothing of it."""
    if not targets:
        raise InvalidValueError("runs no module that has a bias in the model", where="reference")
    sizes = {name: (bias.numel(), targets[name].mean.numel()) for name, bias in biases.items()}
    if other := [f"{name!r} has {own}, not {size}" for name, (own, size) in sizes.items() if own != size]:
        raise InvalidValueError(
            f"the numbers of channels are not the reference's: {', '.join(other)}",
            where="model",
            remedy="Correct biases before the speedup, while the model is masked.",
        )


def _bias_masks(module: nn.Module) -> list[Tensor]:
    """The factors of the mask on the bias of a module; none where it is not masked."""
    applied: Any = module.parametrizations["bias"] if parametrize.is_parametrized(module, "bias") else ()  # pyright: ignore
    masks = [stack.find(Stage.MASK) for stack in applied if isinstance(stack, TargetStack)]
    return [factor for mask in masks if isinstance(mask, Mask) for factor in mask.factors]


def _first(batches: Iterable[Any], count: int | None) -> Iterator[Any]:
    """The first batches, or all of them."""
    whole = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (whole and count > 0):
        raise InvalidValueError(
            f"{count!r} is no number of batches", where="max_batches", legal=("a positive int", None)
        )
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping)):
        raise InvalidValueError(
            f"a {type(batches).__name__} holds no batches",
            where="batches",
            legal=("a DataLoader", "a list of batches", "an iterator of batches"),
        )
    return islice(batches, count)


def _run(model: nn.Module, batch: Any) -> None:
    """Run the model on the inputs of a batch."""
    args, kwargs = inputs_of(to_device(batch, device_of(model)))
    model(*args, **kwargs)


def _some(batch_count: int) -> int:
    """The number of batches of all processes; refused where there is none."""
    total = sum(of_each_process(batch_count))
    if not total:
        raise InvalidValueError("there is no batch", where="batches", remedy="Give at least one.")
    return total
