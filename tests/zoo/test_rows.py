"""That the zoo holds every family it promises; nothing is built here."""

import pytest

from tests.torchvision_stub import import_torchvision
from tests.zoo import timm_rows, torchvision_rows
from tests.zoo.rows import Row


def named(rows: list[Row]) -> set[str]:
    """The names without their source; each must be there once."""
    names = {row.name.partition("/")[2] for row in rows}
    assert len(names) == len(rows)
    return names


def test_every_module_of_timm_has_a_row():
    timm = timm_rows.import_timm()
    rows = timm_rows.rows()
    assert len(rows) >= 150
    assert {row.family for row in rows} == set(timm.list_modules())
    assert named(rows) <= set(timm.list_models())


@pytest.mark.parametrize(
    ("part", "suffix"),
    [(None, ""), ("segmentation", ""), ("video", ""), ("optical_flow", ""), ("detection", ".backbone")],
)
def test_every_architecture_of_torchvision_has_a_row(part, suffix):
    models = import_torchvision().models
    names = models.list_models(module=getattr(models, part) if part else models)
    assert len(names) > 1
    assert {name + suffix for name in names} <= named(torchvision_rows.rows())


def test_quantized_copies_are_not_counted_as_architectures():
    models = import_torchvision().models
    quantized = models.list_models(module=models.quantization)
    assert len(torchvision_rows.rows()) == len(models.list_models()) - len(quantized)


@pytest.mark.parametrize(("module", "least", "families"), [(torchvision_rows, 12, 12), (timm_rows, 20, 19)])
def test_the_sample_is_balanced(module, least, families):
    sample = [row for row in module.rows() if row.in_sample]
    assert len(sample) == len(module.SAMPLE.split()) >= least
    assert len({row.family for row in sample}) >= families


@pytest.mark.parametrize("module", [torchvision_rows, timm_rows])
def test_settings_name_rows(module):
    names = {name.removesuffix(".backbone") for name in named(module.rows())}
    for table in ("SIDES", "CLIPS", "ARGUMENTS", "CHANGED", "SHALLOW"):
        assert set(getattr(module, table, {})) <= names
