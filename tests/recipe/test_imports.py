"""Objects by import path and by short name."""

import pytest
import torch
from torch import nn

from tersor.errors import ConfigError, InvalidValueError
from tersor.recipe.imports import import_object, import_path, named_object


@pytest.mark.parametrize("value", ["torch.nn", "torch.nn:", ":Linear", "torch nn:Linear", "a:b.c", "a:b:c", 3, None])
def test_form_is_checked(value):
    with pytest.raises(InvalidValueError, match=r"is no import path\. Legal: package\.module:callable"):
        import_path(value)


def test_class_is_found():
    assert import_object("torch.nn:Linear") is nn.Linear


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nosuchpackage.models:net", r"here: .*there is no module 'nosuchpackage'.*Install it"),
        ("torch.nosuchmodule:net", r"here: .*there is no module 'torch\.nosuchmodule'"),
        ("torch.nn:Linera", r"the module 'torch\.nn' has no 'Linera'\. Did you mean 'Linear'\?"),
        ("tests.recipe.toy:not_callable", "is a int and cannot be called"),
        ("broken_toy:net", r"its module cannot be imported \(ModuleNotFoundError: No module named 'nosuchpackage'\)"),
        ("raising_toy:net", r"its module cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("torch.nn", r"here: 'torch\.nn' is no import path"),
    ],
)
def test_failing_part_is_named(tmp_path, monkeypatch, path, message):
    (tmp_path / "broken_toy.py").write_text("import nosuchpackage")
    (tmp_path / "raising_toy.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        import_object(path, "here")


def test_short_names():
    assert named_object("Adam", torch.optim, torch.optim.Optimizer, "here") is torch.optim.Adam
    assert named_object("mse_loss", nn.functional, object, "here") is nn.functional.mse_loss
    assert named_object("torch.optim:Adam", torch.optim, torch.optim.Optimizer, "here") is torch.optim.Adam


@pytest.mark.parametrize("name", ["SDG", "sgd"])
def test_nearest_short_name_is_offered(name):
    with pytest.raises(ConfigError, match=r"here: .*Legal: a name in torch\.optim, .*Did you mean 'SGD'\?"):
        named_object(name, torch.optim, torch.optim.Optimizer, "here")


def test_base_class_itself_is_not_offered():
    with pytest.raises(ConfigError, match="'Optimizer' is not known here"):
        named_object("Optimizer", torch.optim, torch.optim.Optimizer, "here")
