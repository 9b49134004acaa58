"""Bugs of a restart: what the next coordinator must find, and must not do again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.events import GenerationRequested
from coordinator.instructions import Instruction
from coordinator.ports import ClientInstruction
from coordinator.requests import RequestDesk
from coordinator.simulation.planted.bug import Bug

_perform = MeshDriver._perform
_submit = RequestDesk.submit
_begin_mesh = Mesh.__init__


def _show_first(self: MeshDriver, instruction: Instruction, now: float) -> None:
    if isinstance(instruction, ClientInstruction):
        self._deliver(instruction)
        self._journal.commit(instruction, lambda _: None)
    else:
        _perform(self, instruction, now)


def _begin_anew(self: RequestDesk, demand: GenerationRequested, now: float) -> None:
    _submit(self, replace(demand, accepted=()) if demand.recovered else demand, now)


def _first_epoch_again(self: Mesh, policy: Any = None, *, first_epoch: int = 1) -> None:
    _begin_mesh(self, policy)


RESTARTS = (
    Bug("tokens are shown before they are kept", ((MeshDriver, "_perform", _show_first),)),
    Bug("a kept answer is begun anew", ((RequestDesk, "submit", _begin_anew),)),
    Bug("epochs begin again after a restart", ((Mesh, "__init__", _first_epoch_again),)),
)
