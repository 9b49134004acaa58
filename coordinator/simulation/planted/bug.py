"""What a planted bug is: attributes that are others inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Change = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Bug:
    """``changes``: (owner, attribute, what it is instead). ``pair``: two guards at once.
    ``reached_by``: seeds known to reach the guard, which a hunt over a range that has them tries
    first; it goes on with all others."""

    name: str
    changes: tuple[Change, ...]
    pair: bool = False
    reached_by: tuple[int, ...] = ()

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The code under test has this bug inside the block."""
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in self.changes]
        try:
            for owner, name, value in self.changes:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)
