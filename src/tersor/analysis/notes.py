"""What a reader of a comparison should be wary of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from tersor.analysis.latency import Ratio
from tersor.analysis.layers import LayerChange
from tersor.analysis.macs import Uncounted
from tersor.analysis.metrics import percent

_LANES = 8  # GPUs' matrix units and CPUs' vector units both work on eight numbers or a multiple of it


def notes_on(
    changes: Sequence[LayerChange],
    uncounted: Sequence[Uncounted],
    *,
    macs_ratio: float,
    latency_ratios: Mapping[int, Ratio],
) -> Iterator[str]:
    """Sentences on what was not counted, is not faster, or is not really smaller.

    Args:
        changes: every layer before and after.
        uncounted: operators that the MACs lack, before or after.
        macs_ratio: MACs after / before.
        latency_ratios: batch size -> latency after / before.

    >>> list(notes_on([], [], macs_ratio=0.5, latency_ratios={1: Ratio(0.98, 0.95, 1.02)}))
    ['At batch 1 the latency is not measurably lower (0.98 of before, 95 % interval 0.95 to 1.02) with 50 % of the MACs:
    small layers cost their overhead, not their arithmetic. Try a larger batch or fewer layers.']
    """
    if uncounted:
        calls = Counter[str]()
        for missing in uncounted:
            calls[missing.operator] = max(calls[missing.operator], missing.calls)
        listed = _some([f"{name} ({number}x)" for name, number in calls.items()])
        yield f"MACs are incomplete: no formula counts {listed}."

    for batch, ratio in latency_ratios.items():
        if macs_ratio < 0.98 and ratio.high >= 1:
            yield (
                f"At batch {batch} the latency is not measurably lower ({ratio.median:.2f} of before, 95 % interval "
                f"{ratio.low:.2f} to {ratio.high:.2f}) with {percent(macs_ratio, 0)} of the MACs: "
                "small layers cost their overhead, not their arithmetic. Try a larger batch or fewer layers."
            )

    pairs = [(change.before, change.after) for change in changes if change.before and change.after]
    uneven = [after for before, after in pairs if after.width != before.width and after.width % _LANES]
    if uneven:
        listed = _some([f"{layer.name} has {layer.width}" for layer in uneven])
        yield f"Widths that are not multiples of {_LANES} run below the speed of the hardware: {listed}."

    same_shape = [(before, after) for before, after in pairs if after.shape == before.shape]
    zeros = [after for before, after in same_shape if after.sparsity > before.sparsity + 0.01]
    if zeros:
        listed = _some([f"{layer.name} {percent(layer.sparsity, 0)}" for layer in zeros])
        yield f"Zeros at the old shape save nothing on dense kernels; ModelSpeedup removes whole channels: {listed}."
    elif changes and len(same_shape) == len(changes):
        yield "All layers have their old shape and no more zeros than before: nothing is smaller yet."


def _some(texts: Sequence[str], limit: int = 4) -> str:
    """The first few, and how many more."""
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return ", ".join([*texts[:limit], *more])
