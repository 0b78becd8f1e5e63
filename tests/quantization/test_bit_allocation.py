import itertools
import random

import pytest

from tersor.errors import InvalidValueError, UnmatchedError
from tersor.quantization import allocate_bits, bit_operations, weight_bytes


def by_brute_force(harm, costs, budget):
    """The least harm of all choices that fit."""
    fitting = [
        sum(harm[name][bits] for name, bits in zip(harm, widths, strict=True))
        for widths in itertools.product(*harm.values())
        if sum(costs[name][bits] for name, bits in zip(harm, widths, strict=True)) <= budget
    ]
    return min(fitting)


def drawn(generator, integral):
    """Modules with a few widths; with small integers many choices tie, with floats they spread over decades."""
    names = [f"m{i}" for i in range(generator.randint(1, 6))]
    choices = generator.sample(range(1, 9), generator.randint(1, 4))
    number = (lambda: generator.randint(0, 6)) if integral else (lambda: 10 ** generator.uniform(-6, 3))
    harm, costs = ({name: {bits: number() for bits in choices} for name in names} for _ in range(2))
    least, most = (sum(end(widths.values()) for widths in costs.values()) for end in (min, max))
    budget = least + (most - least) * generator.uniform(0, 1.1)
    return harm, costs, int(budget) if integral else budget


@pytest.mark.parametrize("integral", [True, False])
def test_no_choice_that_fits_is_better(integral):
    generator = random.Random(0)
    for _ in range(300):
        harm, costs, budget = drawn(generator, integral)
        bits = allocate_bits(harm, costs, budget)
        assert list(bits) == list(harm)
        assert sum(costs[name][width] for name, width in bits.items()) <= budget * (1 + 1e-9)
        reached = sum(harm[name][width] for name, width in bits.items())
        assert reached == pytest.approx(by_brute_force(harm, costs, budget), rel=1e-9, abs=1e-15)


def test_against_dynamic_programming_over_costs_where_brute_force_ends():
    generator = random.Random(1)
    sizes = {f"m{i}": generator.randint(1, 40) for i in range(40)}
    costs = {name: {bits: size * bits for bits in (2, 4, 8)} for name, size in sizes.items()}
    harm = {name: {bits: 4.0**-bits * 10 ** generator.uniform(0, 4) for bits in (2, 4, 8)} for name in sizes}
    budget = sum(sizes.values()) * 4
    best = {0: 0.0}  # by cost, over all integers
    for name in sizes:
        step: dict[int, float] = {}
        for (cost, so_far), (bits, extra) in itertools.product(best.items(), harm[name].items()):
            if (total := cost + costs[name][bits]) <= budget:
                step[total] = min(step.get(total, float("inf")), so_far + extra)
        best = step
    bits = allocate_bits(harm, costs, budget)
    assert sum(harm[name][width] for name, width in bits.items()) == pytest.approx(min(best.values()), rel=1e-9)
    assert sum(costs[name][width] for name, width in bits.items()) <= budget


def test_a_greedy_choice_would_be_worse():
    # The dense step of the first does not fit beside that of the second, which spares more.
    harm = {"a": {4: 10.0, 8: 0.0}, "b": {4: 18.0, 8: 0.0}}
    costs = {"a": {4: 0, 8: 5}, "b": {4: 0, 8: 10}}
    assert allocate_bits(harm, costs, 10) == {"a": 4, "b": 8}
    assert allocate_bits(harm, costs, 9) == {"a": 8, "b": 4}
    assert allocate_bits(harm, costs, 15) == {"a": 8, "b": 8}


def test_of_equal_harm_the_cheapest_and_other_orders_of_adding_up():
    assert allocate_bits({"a": {2: 0.0, 4: 0.0, 8: 0.0}}, {"a": {2: 1.0, 4: 2.0, 8: 4.0}}, 4) == {"a": 2}
    costs = {name: {8: value} for name, value in zip("abc", (0.1, 0.2, 0.3), strict=True)}
    harm = {name: {8: 1.0} for name in costs}
    assert 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3
    assert allocate_bits(harm, costs, 0.3 + 0.2 + 0.1) == {"a": 8, "b": 8, "c": 8}


def test_costs():
    assert weight_bytes({"fc": 10}, (3, 8)) == {"fc": {3: 3.75, 8: 10.0}}
    assert bit_operations({"fc": 7}, (2, 4)) == {"fc": {2: 28.0, 4: 112.0}}


def test_errors_say_what_is_possible():
    harm, costs = {"fc": {2: 1.0, 8: 0.5}}, {"fc": {2: 3.0, 8: 12.0}}
    with pytest.raises(InvalidValueError, match=r"budget of 2 cannot be reached: the least that is possible is 3\."):
        allocate_bits(harm, costs, 2)
    with pytest.raises(InvalidValueError, match="cannot be reached"):
        allocate_bits(harm, costs, float("nan"))
    with pytest.raises(UnmatchedError, match=r"no cost for module 'fc'.*Did you mean 'fcc'"):
        allocate_bits(harm, {"fcc": {}}, 2)
    with pytest.raises(UnmatchedError, match=r"costs\['fc'\]: there is no cost for 8 bits.*2"):
        allocate_bits(harm, {"fc": {2: 1.0}}, 2)
    with pytest.raises(InvalidValueError, match=r"fc: at 2 bits the sensitivity is nan"):
        allocate_bits({"fc": {2: float("nan")}}, costs, 20)
