"""Operators before and after pruning."""

from tersor.deploy.engine import Operator
from tersor.deploy.operator_changes import compare_operators
from tersor.deploy.record import DeployReport


def report(*operators):
    return DeployReport("engine", "1", 0, 0, tuple(operators))


def computing(name, milliseconds):
    return Operator(name, "Conv", "int8", milliseconds, computes=True)


def test_operators_are_told_by_name():
    before = report(computing("a", 1.0), Operator("pool", "Pool", "float", 5.0), computing("b", 2.0))
    after = report(computing("b", 1.96), computing("a", 0.5))
    changes = compare_operators(before, after)
    assert [(own.name, own.before, own.after, own.is_faster) for own in changes] == [
        ("b", 2.0, 1.96, False),
        ("a", 1.0, 0.5, True),
    ]


def test_else_by_order_where_there_are_as_many():
    before = report(computing("a", 1.0), computing("b", 2.0))
    assert [own.after for own in compare_operators(before, report(computing("x", 0.5), computing("y", 3.0)))] == [
        3.0,
        0.5,
    ]
    assert compare_operators(before, report(computing("x", 0.5))) == ()


def test_what_takes_next_to_no_time_or_has_none_is_left_out():
    before = report(computing("a", 100.0), computing("b", 0.5), computing("c", None))
    after = report(computing("a", 50.0), computing("b", 0.6), computing("c", None))
    assert [own.name for own in compare_operators(before, after)] == ["a"]
