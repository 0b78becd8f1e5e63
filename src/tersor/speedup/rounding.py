"""Channel counts that hardware likes: in multiples of 8, say."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from tersor.errors import InvalidValueError
from tersor.graph.coupling import Coupling


def round_up_kept(coupling: Coupling, removed: np.ndarray, multiple: int) -> np.ndarray:
    """Give back as few classes as possible, so that the channels left come in multiples.

    Classes that cut the same dimensions equally often are interchangeable, and are rounded together: of what one such
    group has along a dimension that a contraction writes or reads, a multiple is left, or all of it where its size
    allows no larger multiple. So is what is left of the whole dimension, where it belongs to one group. A concatenation
    has several: what is left of it is a multiple if each of its parts was cut or had a multiple of indices before.
    A class that is several indices wide (a head, the channels of a convolution's group) comes back whole.

    Nothing new is removed, so no layer gets empty. Where the group has classes to choose from, the first come back:
    their masks are all the same.

    Args:
        coupling: of the model.
        removed: the classes that were to leave, boolean, indexed by class.
        multiple: of what; 1 gives nothing back.

    Returns:
        the classes that leave, boolean, indexed by class.

    Raises:
        InvalidValueError: the multiple is not a positive integer.

    >>> import torch
    >>> from tersor.graph import groups
    >>> coupling = groups(torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.Linear(20, 2)), torch.zeros(1, 4))
    >>> mask = {"0": {"weight": (torch.arange(20) < 9)[:, None]}}
    >>> rounded = round_up_kept(coupling, coupling.removed(mask), 8)
    >>> int(coupling.kept(rounded)["0.weight"][0].sum())
    16
    """
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise InvalidValueError(f"{multiple!r} is no number of channels", where="round_to", legal=("1, 2, 3, ...",))
    rounded = removed.copy()
    for classes, step in _interchangeable(coupling, removed, multiple):
        lost = classes[removed[classes]]
        kept = len(classes) - len(lost)
        wanted = min(math.ceil(kept / step) * step, len(classes))
        rounded[lost[: wanted - kept]] = False
    return rounded


def _interchangeable(coupling: Coupling, removed: np.ndarray, multiple: int) -> Iterator[tuple[np.ndarray, int]]:
    """Each set of interchangeable classes of which some leave, and the number of them that makes a multiple."""
    axes = coupling.axis_numbers
    touched = np.unique(axes[coupling.written | coupling.read])
    labels = np.flatnonzero(np.isin(axes, touched) & (axes >= 0))
    classes, axes = coupling.classes[labels], axes[labels]
    signatures = coupling.signatures(labels)
    present = np.unique(classes)
    for signature in np.unique(signatures[present[removed[present]]]):
        members = present[signatures[present] == signature]
        counts = np.unique(axes[classes == members[0]], return_counts=True)[1].tolist()
        yield members, math.lcm(*(multiple // math.gcd(multiple, count) for count in counts))
