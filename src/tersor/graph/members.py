"""What a coupling group consists of, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor inside a coupling group.

    Attributes:
        name: the tensor's qualified name.
        dim: the dimension.
        offset: the first index that belongs to the group.
        count: how many indices belong to it.
        role: ``written`` by a contraction, ``read`` by one, or ``carried`` (norms, biases, factors).
    """

    name: str
    dim: int
    offset: int
    count: int
    role: str

    def __str__(self) -> str:
        return f"{self.name} dim {self.dim} [{self.offset}:{self.offset + self.count}] {self.role}"


@dataclass(frozen=True)
class CouplingGroup:
    """Indices that are interchangeable: each choice of what leaves cuts every member in the same way.

    Attributes:
        size: number of choices (channels, blocks of channels) in the group.
        members: the dimensions that are cut.
        frozen: why nothing may leave; None where it may.
    """

    size: int
    members: tuple[Member, ...]
    frozen: str | None

    def __str__(self) -> str:
        state = f"frozen, it {self.frozen}" if self.frozen else "free"
        return "\n".join([f"{self.size} choices, {state}", *(f"  {member}" for member in self.members)])
