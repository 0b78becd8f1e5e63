"""Quantization-aware training: the model trains with its values rounded, and with ranges that follow them."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.graph.coupling import Coupling
from tersor.quantization.base import FakeQuantize
from tersor.quantization.dynamic import DynamicQuantize, dynamic
from tersor.quantization.norm_folding import FrozenNorms
from tersor.quantization.observers import Latest, MovingAverage, mean_ranges
from tersor.quantization.training import TrainingQuantizer
from tersor.quantization.uniform import UniformQuantize
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.ranks import processes


@final
class QATQuantizer(TrainingQuantizer):
    r"""Trains with rounded values: gradients go straight through the rounding, and are 0 where a value was clipped.

    .. math:: \hat{x} = s (\operatorname{clip}(\operatorname{round}(x / s) + z, q_{min}, q_{max}) - z), \qquad
        \frac{\partial \hat{x}}{\partial x} = 1 \text{ inside the range, } 0 \text{ outside}

    Scale and zero point follow the range: of weights the range that they have at the moment (masked ones count as
    zeros), of inputs and outputs the exponential moving averages of the minima and maxima of batches,
    :math:`m \leftarrow 0.99\, m + 0.01\, x_{min}`, which only training moves; in eval mode the model computes what will
    be deployed. After the training all ranges are fixed.

    Use it where post-training quantization loses too much, as with 4 bits, and there is time to fine-tune: a tenth of
    the original training with a small learning rate. A later start (``quant_start_step``) lets ranges settle first, as
    the first paper advises for training from scratch; ranges are watched meanwhile. Where batch norms are fused
    (``fuse_names``), freeze their statistics for the last part (``freeze_norm_step``), as the second paper advises.

    Papers: Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (CVPR 2018), section 3; Krishnamoorthi: Quantizing deep convolutional networks for efficient inference: A whitepaper
    (2018), section 4.

    Args:
        model: the model; it is wrapped in place.
        config_list: what is quantized and how; an entry's ``quant_start_step`` stands for the argument.
        evaluator: how the model is trained; or use a loop of your own.
        quant_start_step: how many optimizer steps pass before values are rounded.
        freeze_norm_step: how many optimizer steps pass before fused batch norms keep their statistics and use them; by
            default all.
        decay: the share of a moving average that stays from batch to batch.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: an observer is asked for that this does not use, or norms are to be frozen and none is fused.
        InvalidValueError: a number out of its range.

    Example:
        >>> import torch
        >>> layer = nn.Linear(4, 8)
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight", "_input_0"], "quant_dtype": "int4"}]
        >>> quantizer = QATQuantizer(layer, config_list)
        >>> optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.01), torch.randn(16, 4)
        >>> quantizer.start()
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     quantizer.loss(layer(x).square().mean()).backward()
        ...     optimizer.step()
        ...     quantizer.step()
        >>> quantizer.finish()
        >>> [len(row.unique()) <= 15 for row in layer.weight]
        [True, True, True, True, True, True, True, True]
    """

    works_on_shards = True
    methods = frozenset({"qat_clamp_round"})

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        quant_start_step: int = 0,
        *,
        freeze_norm_step: int | None = None,
        decay: float = 0.99,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("freeze_norm_step"):
            self.freeze_norm_step = (
                None if freeze_norm_step is None else values.whole(freeze_norm_step, "number of steps", low=0)
            )
        self._frozen: FrozenNorms | None = None
        with values.at("decay"):
            self.decay = values.number(decay, "share", low=0, high=1)
        super().__init__(
            model, config_list, evaluator, quant_start_step, example_inputs=example_inputs, previous=previous
        )

    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """The latest range of a parameter, the moving average of an input or output unless it is dynamic."""
        at_run_time = dynamic(self, target)
        if at_run_time is not None:
            return at_run_time
        activation = is_activation(target.config.target_name)
        self._refuse_observer(target, "moving_average" if activation else "minmax")
        observer = MovingAverage(self.decay) if activation else Latest()
        form, cut = self.form(target), self.cut(target)
        return UniformQuantize(target.name, form, cut, observer, live=True, only_in_training=activation)

    def on_start(self) -> None:
        """Watch; round what does not wait."""
        super().on_start()
        for _, transform in self._uniform():
            if self.keeps_scales:
                transform.recall()
            transform.watching, transform.live, transform.enabled = True, True, self.keeps_scales
        self.look_at_parameters()
        self._enable()
        self._freeze()

    def on_step(self) -> None:
        """Bring the processes' ranges together, and round what has waited long enough."""
        super().on_step()
        if processes() > 1:
            moving = [(own, own.observer) for _, own in self._uniform() if isinstance(own.observer, MovingAverage)]
            mean_ranges([observer for _, observer in moving])
            for transform, _ in moving:
                transform.follow()
        self._enable()
        self._freeze()

    def on_stop(self) -> None:
        """Watch no longer, and let norms go."""
        if self._frozen is not None:
            self._frozen.remove()
            self._frozen = None
        for _, transform in self._uniform():
            transform.watching = False

    def on_finish(self) -> None:
        """Fix all ranges, those of the parameters as these are now.

        Raises:
            NumericalError: values were seen that are not finite.
        """
        parameters = [t for target, t in self._uniform() if not is_activation(target.config.target_name)]
        for transform in parameters:
            transform.watching = True
        self.look_at_parameters()
        self.leave_out(target for target, transform in self._uniform() if transform.unseen)
        for _, transform in self._uniform():
            transform.watching = transform.live = transform.enables = False
            transform.settle()
            transform.enabled = True
        self._enable(whether_due=False)

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was asked."""
        super().load_own_state(state)
        self._freeze()

    def _make_plan(self, coupling: Coupling | None, example_inputs: Any) -> None:
        super()._make_plan(coupling, example_inputs)
        if self.freeze_norm_step is not None and not self.folded_norms():
            raise ConflictError(
                "no batch norm is fused, so none would be frozen",
                where="freeze_norm_step",
                remedy="Name the norms in fuse_names (see auto_fuse), or leave it out.",
            )

    def _freeze(self) -> None:
        if self._frozen is None and self.freeze_norm_step is not None and self.steps >= self.freeze_norm_step:
            self._frozen = FrozenNorms(self.folded_norms())

    def _enable(self, *, whether_due: bool = True) -> None:
        for target, transform in self.transforms():
            if whether_due and not self.due(target):
                continue
            if isinstance(transform, DynamicQuantize):
                transform.enabled = True
            elif isinstance(transform, UniformQuantize) and not transform.enabled:
                transform.enable()

    def _uniform(self) -> list[tuple[PlannedTarget, UniformQuantize]]:
        return [(target, own) for target, own in self.transforms() if isinstance(own, UniformQuantize)]
