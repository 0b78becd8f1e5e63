"""How a recipe names a model: its own, or a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.config.specs import Parsed
from tersor.recipe.fields import ImportPath, OptionalText


class ModelSource(Parsed):
    """Where the model comes from.

    Attributes:
        build: import path of a function without arguments that returns the model, trained or not.
        checkpoint: a folder that `tersor.save` wrote, loaded into what `build` returns.
    """

    build: ImportPath
    checkpoint: OptionalText = None


def source(value: Any) -> ModelSource:
    """An import path alone, or a mapping of the keys of `ModelSource`."""
    if isinstance(value, ModelSource):
        return value
    return ModelSource.parse(value if isinstance(value, Mapping) else {"build": value})
