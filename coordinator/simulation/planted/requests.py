"""Bugs of a request: tokens lost, repeated or believed, recoveries that do not happen, ends that
come twice or never."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator import instructions as do
from coordinator import token_validator
from coordinator.endings import Endings
from coordinator.fallback import FallbackCoordinator
from coordinator.membership import Loss
from coordinator.recovery import FaultKind, RecoveryManager, RequestFault, Rung
from coordinator.requests import RequestDesk
from coordinator.route import LiveRoute
from coordinator.scheduler import RouteScheduler
from coordinator.session import Session
from coordinator.simulation.planted.bug import Bug
from coordinator.simulation.planted.hops import gap_is_next
from coordinator.step_book import SentStep, StepBook
from coordinator.token_validator import TokenValidator
from stagemesh.frame import StepFrame, StepRow
from stagemesh.hop_receiver import HopReceiver
from stagemesh.token import TokenChunk

_attach = Session.attach


def _attach_off_by_one(self: Session, epoch: int, route: Any, now: float) -> None:
    _attach(self, epoch, route, now)
    if self.accepted_count > 1:
        self.stream._tokens.pop()


def _attach_behind(self: Session, epoch: int, route: Any, now: float) -> None:
    _attach(self, epoch, route, now)
    if self.accepted_count > 1:
        self.stream._tokens.append(self.stream._tokens[-1])


_accept = RequestDesk._accept


def _emit_again(
    self: RequestDesk, live: LiveRoute, session: Session, chunk: TokenChunk, now: float
) -> None:
    if session.recovering is not None and session.accepted_count > 1:
        emitted = do.AcceptTokens(session.request, session.accepted_count - 2, (chunk,))
        self.state.emit(emitted)
    _accept(self, live, session, chunk, now)


def _overshoot(
    self: RequestDesk, live: LiveRoute, session: Session, chunk: TokenChunk, now: float
) -> None:
    before = session.max_tokens
    session.max_tokens += 1
    session.demand = replace(session.demand, stop_token_ids=frozenset())
    _accept(self, live, session, chunk, now)
    session.max_tokens = before


_finish = Endings.finish


def _finish_twice(self: Endings, session: Session, reason: str, now: float) -> None:
    _finish(self, session, reason, now)
    ended = next(one for one in reversed(self.state.out) if isinstance(one, do.FinishRequest))
    self.state.emit(ended)


def _finish_silently_when_cancelled(
    self: Endings, session: Session, reason: str, now: float
) -> None:
    _finish(self, session, reason, now)
    if reason == "cancelled":
        self.state.out[:] = [one for one in self.state.out if not _ends(one, session)]


def _ends(instruction: do.Instruction, session: Session) -> bool:
    return isinstance(instruction, do.FinishRequest) and instruction.request == session.request


def _any_attempt(
    self: RequestDesk, live: LiveRoute, sent: SentStep, frame: StepFrame, now: float
) -> list[Loss]:
    rows = tuple(
        replace(row, attempt=row.session.attempt) if row.session is not None else row
        for row in sent.rows
    )
    return _step_returned(self, live, replace(sent, rows=rows), frame, now)


_step_returned = RequestDesk.step_returned


def _forget_displaced(self: FallbackCoordinator, session: Session) -> bool:
    return True


_choose = RecoveryManager.choose


def _no_replay(self: RecoveryManager, session: Session, fault: RequestFault, now: float) -> Rung:
    if fault.kind is FaultKind.CACHE_LOST:
        return Rung.FAIL
    return _choose(self, session, fault, now)


def _keep_caches(self: RouteScheduler, session: Session) -> None:
    opened, session.opened = session.opened, False
    _remove(self, session)
    session.opened = opened


_remove = RouteScheduler.remove


def _settle_anything(self: StepBook, step: int, now: float) -> SentStep | None:
    oldest = next(iter(self.outstanding), None)
    return _settle(self, oldest, now) if oldest is not None else None


_settle = StepBook.settle
_next_row = Session.next_row


def _opening_with_first_chain(self: Session, step: int, tokens_max: int) -> StepRow:
    row = _next_row(self, step, tokens_max)
    if row.opening is None:
        return row
    return replace(row, opening=replace(row.opening, chain=self.stream._start))


def _trust_rows(self: TokenValidator, row: StepRow, expected: Any) -> bool:
    return True


def _chain_as_said(previous: bytes, position: int, token_id: int) -> bytes:
    return _AnyChain(16)


class _AnyChain(bytes):
    """Equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


REQUESTS = (
    Bug("reroute off by one", ((Session, "attach", _attach_off_by_one),)),
    Bug("reroute repeats the last token", ((Session, "attach", _attach_behind),)),
    Bug("a token is emitted again on reroute", ((RequestDesk, "_accept", _emit_again),)),
    Bug("goes on behind the end", ((RequestDesk, "_accept", _overshoot),)),
    Bug("two terminals", ((Endings, "finish", _finish_twice),)),
    Bug("no terminal", ((Endings, "finish", _finish_silently_when_cancelled),)),
    Bug("rows of older attempts count", ((RequestDesk, "step_returned", _any_attempt),)),
    Bug("displaced requests are forgotten", ((FallbackCoordinator, "enqueue", _forget_displaced),)),
    Bug("no replay after a lost cache", ((RecoveryManager, "choose", _no_replay),)),
    Bug("caches are not closed", ((RouteScheduler, "remove", _keep_caches),)),
    Bug("a replay opens with the first chain", ((Session, "next_row", _opening_with_first_chain),)),
    Bug("marks not checked", ((TokenValidator, "_row_fits", _trust_rows),)),
    Bug("chain not checked", ((token_validator, "chain_next", _chain_as_said),)),
    Bug(
        "any step settles the oldest, gaps accepted",
        (
            (StepBook, "settle", _settle_anything),
            (HopReceiver, "_hold", gap_is_next),
        ),
        pair=True,
    ),
)
