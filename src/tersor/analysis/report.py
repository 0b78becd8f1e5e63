"""The report: one HTML page without scripts, fonts or links, for light and dark, for wide screens and phones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from tersor.analysis.layers import LayerChange, shape_text
from tersor.analysis.metrics import Metric, percent, si


def render(
    *,
    title: str,
    metrics: Sequence[Metric],
    layers: Sequence[LayerChange],
    notes: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    sparsity: Mapping[str, float] | None = None,
) -> str:
    """The page as text.

    Args:
        title: heading.
        metrics: one card each, with bars before and after.
        layers: rows of the plot (those with a weight of two or more dimensions) and of the table (all).
        notes: sentences to be wary of.
        environment: what the latencies were measured on.
        sparsity: layer name -> share that the masks removed; None plots the zeros of the layers after.

    >>> page = render(title="a < b", metrics=[Metric("macs", "MACs", 40, 10, "", 0.25)], layers=[])
    >>> "<h1>a &lt; b</h1>" in page, "4.00x <small>fewer</small>" in page
    (True, True)
    """
    style = resources.files("tersor.analysis").joinpath("report.css").read_text(encoding="utf-8")
    facts = " &middot; ".join(f"{escape(name)}: {escape(value)}" for name, value in (environment or {}).items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="lede">{escape(_summary(metrics))}</p>
<section class="cards" aria-label="Figures before and after">
{_lines(_card(metric) for metric in metrics)}
</section>
{_notes(notes)}
{_plots(layers, sparsity)}
{_table(layers)}
<footer>
<p>Latencies are medians of interleaved rounds; the line over a bar spans the 10th to the 90th percentile.</p>
<p>{facts}</p>
</footer>
</main>
</body>
</html>
"""


def _summary(metrics: Sequence[Metric]) -> str:
    nouns = {"macs": "MACs", "parameters": "parameters"}
    parts = [f"{percent(metric.ratio)} of the {nouns[metric.key]}" for metric in metrics if metric.key in nouns]
    parts += [
        f"{metric.label.lower()} {metric.texts[1]} ({metric.change})" for metric in metrics if metric.unit == "score"
    ]
    return ", ".join(parts)


def _card(metric: Metric) -> str:
    number, _, word = metric.change.partition(" ")
    mood = "" if metric.unit == "score" or not word else " good" if metric.ratio < 1 else " bad"
    values = (metric.before, metric.after)
    spreads = metric.spread or tuple((value, value) for value in values)
    largest = max(*values, *spreads[0], *spreads[1]) or 1
    rows = "".join(
        f"<span>{side}</span>"
        + _bar(value / largest, side, spread=(spread[0] / largest, spread[1] / largest))
        + f"<span>{escape(text)}</span>"
        for side, value, spread, text in zip(("before", "after"), values, spreads, metric.texts, strict=True)
    )
    return (
        f'<article class="card"><h3>{escape(metric.label)}</h3>'
        f'<p class="big{mood}">{number} <small>{word}</small></p><div class="pair">{rows}</div></article>'
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="panel notes"><h3>Notes</h3><ul>{items}</ul></section>'


def _plots(layers: Sequence[LayerChange], sparsity: Mapping[str, float] | None) -> str:
    """For each layer with a weight matrix: width kept, share of the weights masked or zero, and MACs."""
    shown = [layer for layer in layers if any(layer.widths)]
    if not shown:
        return ""
    zeros = {layer.name: layer.after.sparsity if layer.after else 0.0 for layer in shown}
    if sparsity is not None:
        zeros = {layer.name: sparsity.get(layer.name, 0.0) for layer in shown}
    has_zeros = any(zeros.values())
    largest = max(max(layer.macs) for layer in shown) or 1

    def row(layer: LayerChange) -> str:
        width, new_width = layer.widths
        macs, new_macs = layer.macs
        full = max(layer.widths)
        plots = [_plot(_bar(new_width / full, "after", ghost=width / full), f"{new_width} of {width}")]
        if has_zeros:
            plots.append(_plot(_bar(zeros[layer.name], "zeros"), percent(zeros[layer.name], 0)))
        bar = _bar(new_macs / largest, "after", ghost=macs / largest)
        plots.append(_plot(bar, f"{si(macs)} &rarr; {si(new_macs)}"))
        return f'<div class="layer"><b>{escape(layer.name or "(model)")}</b>{"".join(plots)}</div>'

    removed = "Weights masked" if sparsity is not None else "Weights zero"
    headings = ["Width kept", removed, "MACs"] if has_zeros else ["Width kept", "MACs"]
    head = "".join(f"<span>{heading}</span>" for heading in headings)
    legend = {"before": "before", "after": "after", **({"zeros": removed.lower()} if has_zeros else {})}
    return f"""<h2>Layer by layer</h2>
<p class="hint">{"".join(f'<i class="{kind}"></i>{label}' for kind, label in legend.items())}</p>
<div class="panel" style="--plots: {len(headings)}">
<div class="layer head"><b></b>{head}</div>
{_lines(row(layer) for layer in shown)}
</div>"""


def _table(layers: Sequence[LayerChange]) -> str:
    def row(layer: LayerChange) -> str:
        numbers = [f"{number:,}" if number else "-" for number in (*layer.parameters, *layer.macs)]
        shapes = [shape_text(side) for side in (layer.before, layer.after)]
        cells = [layer.name or "(model)", layer.type, *shapes, *numbers, percent(layer.kept)]
        return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"

    pairs = "".join(f'<th colspan="2">{heading}</th>' for heading in ("Weight", "Parameters", "MACs per sample"))
    sides = "<th>before</th><th>after</th>" * 3
    return f"""<h2>All layers</h2>
<div class="panel scroll"><table>
<thead>
<tr><th rowspan="2">Layer</th><th rowspan="2">Type</th>{pairs}<th rowspan="2">Parameters kept</th></tr>
<tr>{sides}</tr>
</thead>
<tbody>
{_lines(row(layer) for layer in layers)}
</tbody>
</table></div>"""


def _plot(bar: str, text: str) -> str:
    return f'<div class="plot">{bar}<span>{text}</span></div>'


def _bar(share: float, kind: str, *, ghost: float = 0.0, spread: tuple[float, float] = (0.0, 0.0)) -> str:
    """A horizontal bar, over a ghost of what was before; ``spread`` is a line. All lengths are shares of 1."""
    low, high = (f"{100 * end:.2f}" for end in spread)
    line = f'<line x1="{low}" x2="{high}" y1="5" y2="5"/>' if low != high else ""
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="before" width="{100 * ghost:.2f}" height="10"/>'
        f'<rect class="{kind}" width="{100 * share:.2f}" height="10"/>{line}</svg>'
    )


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)
