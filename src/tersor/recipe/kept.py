"""What a run keeps while it trains, to go on from if it is killed, and whose that is."""

from __future__ import annotations

import json
from pathlib import Path

from tersor.errors import CheckpointError
from tersor.recipe.spec import Recipe
from tersor.storage import write_text

RECIPE_FILE = "recipe.json"
WHAT_COUNTS = {"model", "data", "pruning", "quantization", "distillation", "fine_tuning", "seed", "device"}


def begin(recipe: Recipe, folder: Path, name: str) -> bool:
    """Say whose run a folder keeps.

    Args:
        recipe: the run's.
        folder: the folder.
        name: of the file in it from which a run goes on.

    Returns:
        Whether there is such a file, of a run that was killed.

    Raises:
        CheckpointError: it is that of another recipe.
    """
    asked = recipe.model_dump(mode="json", include=WHAT_COUNTS)
    file = folder / RECIPE_FILE
    if not (folder / name).exists():
        write_text(file, json.dumps(asked, indent=1))
        return False
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if differing := [key for key in asked if known.get(key) != asked[key]]:
        raise CheckpointError(
            f"keeps a run that was not finished, of a recipe with another {', '.join(differing)}",
            where=str(folder),
            remedy="Delete the folder to begin anew, or give another output.directory.",
        )
    return True


def forget(folder: Path, name: str) -> None:
    """Delete what was kept, once the run is over."""
    for file in (name, RECIPE_FILE):
        (folder / file).unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
