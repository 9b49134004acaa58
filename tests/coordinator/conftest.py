"""Who watches the states of a mesh."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import pytest

from coordinator import states
from coordinator.mesh_state import WorkerRecord
from coordinator.route import LiveRoute
from coordinator.session import Session

WATCHED = ((LiveRoute, "phase"), (WorkerRecord, "state"), (Session, "phase"))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[enum.Enum, enum.Enum]]]:
    """Every move that any record makes; at the end each must be in its table."""
    seen: set[tuple[enum.Enum, enum.Enum]] = set()

    def watch(kind: type, field: str) -> None:
        def assign(self: object, name: str, value: object) -> None:
            if name == field and hasattr(self, field) and getattr(self, field) is not value:
                seen.add((getattr(self, field), value))
            object.__setattr__(self, name, value)

        monkeypatch.setattr(kind, "__setattr__", assign)

    for kind, field in WATCHED:
        watch(kind, field)
    yield seen
    listed = {*states.ROUTE_MOVES, *states.WORKER_MOVES, *states.REQUEST_MOVES}
    assert not seen - listed
