"""What pytest needs to know before it collects the doctests in ``src``."""

from importlib.util import find_spec
from pathlib import Path

from tests.torchvision_stub import import_torchvision

NEED_TORCHVISION = ("lightning.py", "transformers.py")  # their packages import it where it is installed

collect_ignore = [f"src/tersor/training/{name}" for name in NEED_TORCHVISION if not find_spec(name.removesuffix(".py"))]


def pytest_collect_file(file_path: Path) -> None:
    """Make a torchvision that lies beside a CPU build of torch importable."""
    if file_path.name in NEED_TORCHVISION and file_path.parent.name == "training" and find_spec("torchvision"):
        import_torchvision()
