"""Bugs of a route: opened too early, closed by halves, lost or stuck without anybody noticing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator import instructions as do
from coordinator.barrier import Barrier, BarrierState
from coordinator.membership import Loss, Membership
from coordinator.mesh_state import MeshState
from coordinator.route import LiveRoute
from coordinator.route_book import RouteBook
from coordinator.simulation.planted.bug import Bug
from coordinator.simulation.planted.hops import ignore_time
from coordinator.simulation.worker import SimWorker
from stagemesh.hop_sender import HopSender


def _anybody_is_everybody(self: Barrier) -> tuple[Any, ...]:
    return () if self._arrived else self.participants


def _facts_do_not_matter(self: Barrier, worker: Any, facts: Any, now: float) -> bool:
    return True


def _any_weights(self: SimWorker, order: do.OpenRoute) -> None:
    """The worker takes any place."""


def _registered_weights(self: SimWorker) -> str:
    return self.info.fingerprint


_emit = MeshState.emit


def _emit_without(*kinds: type[do.Instruction]) -> Callable[[MeshState, do.Instruction], None]:
    def emit(self: MeshState, instruction: do.Instruction) -> None:
        if not isinstance(instruction, kinds):
            _emit(self, instruction)

    return emit


def _nothing_is_stalled(self: RouteBook, live: LiveRoute, now: float) -> list[Loss]:
    return []


def _nobody_is_late(self: Membership, now: float) -> list[Loss]:
    return []


def _never_lost(self: Membership, *facts: object) -> list[Loss]:
    return []


def _fence_only_the_first(self: RouteBook, loss: Loss, now: float) -> LiveRoute | None:
    live = self.state.routes.get(loss.epoch)
    closed = _close(self, loss, now)
    if live is not None:
        self.state.out[:] = [
            do.FenceEpoch(one.workers[:1], one.epoch) if isinstance(one, do.FenceEpoch) else one
            for one in self.state.out
        ]
    return closed


_close = RouteBook.close


def _no_deadline(self: Barrier, now: float) -> bool:
    return self.state is BarrierState.BROKEN


ROUTES = (
    Bug("the barrier passes early", ((Barrier, "absent", property(_anybody_is_everybody)),)),
    Bug("the barrier waits for ever", ((Barrier, "expire", _no_deadline),), reached_by=(218,)),
    Bug(
        "fingerprints ignored by barrier, worker and link",
        (
            (Barrier, "_facts_agree", _facts_do_not_matter),
            (SimWorker, "check_order", _any_weights),
            (SimWorker, "wire_fingerprint", _registered_weights),
        ),
        pair=True,
    ),
    Bug("closed routes are not fenced", ((MeshState, "emit", _emit_without(do.FenceEpoch)),)),
    Bug("only the first stage is fenced", ((RouteBook, "close", _fence_only_the_first),)),
    Bug("links of closed routes are kept", ((MeshState, "emit", _emit_without(do.CloseLink)),)),
    Bug(
        "nobody notices a route that stands still",
        (
            (RouteBook, "_stalled", _nothing_is_stalled),
            (Membership, "judge", _nobody_is_late),
            (HopSender, "on_time", ignore_time),
        ),
        pair=True,
    ),
    Bug("a lost worker is not noticed", ((Membership, "lose", _never_lost),)),
)
