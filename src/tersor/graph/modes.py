"""The modes under which torch shows every operator that a model calls."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Mode(TorchDispatchMode):
    """Torch's compiler has no part in it: nothing is compiled here, and to import it takes a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
