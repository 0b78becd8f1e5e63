"""What an accelerator leaves on a model that it prepared for mixed precision, taken back.

It puts a ``forward`` that computes in half precision in the place of the model's own, and leaves it there. What is
calibrated, compared, exported or measured later would be in half precision too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import Module

from tersor.training.evaluator import attributes_kept

LEFT = ("forward", "_original_forward", "_is_accelerate_prepared")


@contextmanager
def unprepared(accelerator: Any, model: Module) -> Iterator[None]:
    """Give a model back at the end as it was, so that the accelerator prepares it anew the next time."""
    known = any(own is model for own in accelerator._models)
    with attributes_kept(model, *LEFT):
        try:
            yield
        finally:
            if not known:
                accelerator._models[:] = [own for own in accelerator._models if own is not model]


def take_back_forward(model: Module) -> None:
    """Give a model that is prepared its own ``forward`` back; a later training prepares it anew.

    >>> from torch import nn
    >>> model = nn.Linear(2, 1)
    >>> model._original_forward, model.forward = model.forward, lambda x: x
    >>> take_back_forward(model)
    >>> "forward" in vars(model), "_original_forward" in vars(model)
    (False, False)
    """
    own = vars(model)
    if "_original_forward" in own:
        before = own["_original_forward"]
        for name in LEFT:
            own.pop(name, None)
        if getattr(before, "__func__", before) is not type(model).forward:
            own["forward"] = before  # somebody else's
