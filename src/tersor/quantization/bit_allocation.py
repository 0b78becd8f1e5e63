"""How many bits each layer gets: the choice of least harm whose costs fit into a budget, found exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from tersor.errors import InvalidValueError, UnmatchedError, nearest

PerWidth = Mapping[str, Mapping[int, float]]
"""``{module: {bits: number}}``."""

_SLACK = 1e-12
"""What adding up numbers in another order may change, relative to their sum."""


def weight_bytes(elements: Mapping[str, int], choices: Iterable[int]) -> dict[str, dict[int, float]]:
    """What weights take in memory: elements times bits, in bytes.

    >>> weight_bytes({"fc": 12}, (2, 8))
    {'fc': {2: 3.0, 8: 12.0}}
    """
    widths = list(choices)
    return {name: {bits: count * bits / 8 for bits in widths} for name, count in elements.items()}


def bit_operations(macs: Mapping[str, int], choices: Iterable[int]) -> dict[str, dict[int, float]]:
    """What multiplying takes: MACs times the bits of the weight times those of the input, which are as many.

    Args:
        macs: by module; :func:`tersor.analysis.count` gives them.
        choices: widths in bits.

    >>> bit_operations({"fc": 10}, (2, 8))
    {'fc': {2: 40.0, 8: 640.0}}
    """
    widths = list(choices)
    return {name: {bits: float(count * bits**2) for bits in widths} for name, count in macs.items()}


def allocate_bits(sensitivities: PerWidth, costs: PerWidth, budget: float) -> dict[str, int]:
    r"""One width for each module, so that the sum of sensitivities is least and costs stay within a budget.

    .. math:: \min_b \sum_m \Omega_m(b_m) \quad \text{with} \quad \sum_m c_m(b_m) \le B

    This is a knapsack problem of multiple choice, solved exactly: over one module after another, it keeps what no other
    partial choice beats in both cost and sensitivity, and drops what could not end below a choice that is known already
    (by the bound of Lagrange: what fits has :math:`\sum \Omega \ge \sum \min_b (\Omega + \lambda c) - \lambda B`).
    Fifty modules take a fraction of a second, some hundreds seconds. That sensitivities add up is an assumption, which
    holds as long as errors are small.

    Papers: Dong et al.: HAWQ-V2 (NeurIPS 2020) for choosing on sums of sensitivities; Sinha and Zoltners: The
    Multiple-Choice Knapsack Problem (Operations Research 1979).

    Args:
        sensitivities: the harm done by each width.
        costs: of each width, in any unit: bytes, bit operations, milliseconds.
        budget: the most that all modules may cost together, in that unit.

    Returns:
        Bits by module, in the order of ``sensitivities``.

    Raises:
        InvalidValueError: the budget cannot be reached, or a number is not finite.
        UnmatchedError: there is no cost for a module or width.

    >>> harm = {"first": {2: 9.0, 8: 0.1}, "last": {2: 1.0, 8: 0.0}}
    >>> allocate_bits(harm, weight_bytes({"first": 8, "last": 8}, (2, 8)), budget=10)
    {'first': 8, 'last': 2}
    """
    options = [_options(name, widths, costs) for name, widths in sensitivities.items()]
    least = sum(float(option.cost[0]) for option in options)
    if not least <= budget + _SLACK * abs(least):
        raise InvalidValueError(
            f"a budget of {budget:g} cannot be reached: the least that is possible is {least:g}.",
            where="budget",
            legal=[f"at least {least:g}"],
            remedy="Raise it, or offer fewer bits in choices.",
        )
    chosen = _search(options, budget + _SLACK * abs(least))
    return {name: option.bits[index] for name, option, index in zip(sensitivities, options, chosen, strict=True)}


class _Options(NamedTuple):
    """What one module can be: cost rising, sensitivity falling."""

    cost: np.ndarray
    harm: np.ndarray
    bits: list[int]


def _options(name: str, widths: Mapping[int, float], costs: PerWidth) -> _Options:
    if name not in costs:
        raise UnmatchedError(f"there is no cost for module {name!r}.", where="costs", remedy=nearest(name, costs))
    for bits, harm in widths.items():
        if bits not in costs[name]:
            raise UnmatchedError(
                f"there is no cost for {bits} bits.", where=f"costs[{name!r}]", legal=[str(bit) for bit in widths]
            )
        if not (np.isfinite(harm) and np.isfinite(costs[name][bits])):
            raise InvalidValueError(
                f"at {bits} bits the sensitivity is {harm} and the cost {costs[name][bits]}.",
                where=name,
                legal=["finite numbers"],
            )
    ranked = sorted(widths, key=lambda bits: (costs[name][bits], widths[bits]))
    cost, harm = np.array([costs[name][b] for b in ranked], float), np.array([widths[b] for b in ranked], float)
    keep = _unbeaten(harm)
    return _Options(cost[keep], harm[keep], [bits for bits, kept in zip(ranked, keep, strict=True) if kept])


def _unbeaten(harm: np.ndarray) -> np.ndarray:
    """Of states by rising cost, those of less harm than all before."""
    before = np.concatenate([[np.inf], np.minimum.accumulate(harm)[:-1]])
    return harm < before


def _search(options: list[_Options], budget: float) -> list[int]:
    """The index of the best option of each module.

    At the right price per unit of cost nearly every module's best option is part of the solution. The search begins at
    the modules for which another comes close, so the others hardly branch.
    """
    price = _price(options, budget)
    lagrangians = [option.harm + price * option.cost for option in options]
    order = sorted(range(len(options)), key=lambda m: float(np.diff(np.sort(lagrangians[m])[:2]).sum()))
    best = [int(lagrangians[m].argmin()) for m in order]
    cheapest = _sums_from([options[m].cost[0] for m in order])
    rest_cost = _sums_from([options[m].cost[index] for m, index in zip(order, best, strict=True)])
    rest_harm = _sums_from([options[m].harm[index] for m, index in zip(order, best, strict=True)])
    slack = _SLACK * sum(float(np.abs(lagrangian).max()) for lagrangian in lagrangians)
    known, bound, cost, harm = np.inf, np.full(1, -np.inf), np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for position, module in enumerate(order, start=1):
        option, excess = options[module], lagrangians[module] - lagrangians[module].min()
        usable = np.flatnonzero(bound.min() + excess <= known + slack)
        count = len(cost)
        cost = np.add.outer(option.cost[usable], cost).ravel()  # runs in order, which a stable sort merges
        harm = np.add.outer(option.harm[usable], harm).ravel()
        full, ends = cost + rest_cost[position], harm + rest_harm[position]
        known = float(np.min(ends, where=full <= budget, initial=known))
        bound = ends + price * (full - budget)
        alive = np.flatnonzero((cost + cheapest[position] <= budget) & (bound <= known + slack))
        alive = alive[cost[alive].argsort(kind="stable")]
        alive = alive[_unbeaten(harm[alive])]
        alive = alive[np.append(np.diff(cost[alive]) > 0, True)]  # of equal cost, the last has the least harm
        cost, harm, bound = cost[alive], harm[alive], bound[alive]
        steps.append((alive % count, usable[alive // count]))
    state, chosen = len(cost) - 1, [0] * len(options)  # the last is the dearest, so the one of least harm
    for module, (parents, picks) in zip(reversed(order), reversed(steps), strict=True):
        chosen[module] = int(picks[state])
        state = parents[state]
    return chosen


def _sums_from(values: list[float]) -> np.ndarray:
    """At each position the sum of what comes from there on."""
    return np.concatenate([np.cumsum(values[::-1])[::-1], [0.0]])


def _price(options: list[_Options], budget: float) -> float:
    """The harm that a unit of cost is worth, where the budget is just used up.

    All modules start at their cheapest. Then steps along each one's convex hull are taken, those that spare the most
    harm for their cost first; the first that does not fit sets the price.
    """
    steps: list[tuple[float, float]] = []
    for option in options:
        at = 0
        while at < len(option.bits) - 1:
            spared, paid = option.harm[at] - option.harm[at + 1 :], option.cost[at + 1 :] - option.cost[at]
            best = int(np.argmax(spared / paid))
            steps.append((float(spared[best] / paid[best]), float(paid[best])))
            at += 1 + best
    left = budget - sum(float(option.cost[0]) for option in options)
    for rate, paid in sorted(steps, reverse=True):
        left -= paid
        if left < 0:
            return rate
    return 0.0
