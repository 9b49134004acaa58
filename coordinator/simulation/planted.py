"""Bugs on purpose: would the referee notice if a guard were missing?

A planted bug replaces one or two methods of the code under test while a run lasts, and puts them
back. The product knows nothing of it. Guards cover for each other: a bug whose guard is backed by
another one is planted together with it (a *pair*), because alone it changes nothing that anybody
could see, and saying so is what the pair is for.

``BUGS`` is the list; a bug is *killed* if any seed of the range violates any invariant under it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from coordinator import echo, token_validator
from coordinator import instructions as do
from coordinator.barrier import Barrier
from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.echo import EchoCache, EchoStage
from coordinator.events import GenerationRequested
from coordinator.fallback import FallbackCoordinator
from coordinator.membership import Loss, Membership
from coordinator.mesh_state import MeshState
from coordinator.ports import ClientInstruction
from coordinator.recovery import FaultKind, RecoveryManager, RequestFault, Rung
from coordinator.requests import RequestDesk
from coordinator.route import LiveRoute
from coordinator.route_book import RouteBook
from coordinator.scheduler import RouteScheduler, SentStep
from coordinator.session import Session
from coordinator.simulation.worker import SimWorker
from coordinator.token_validator import TokenValidator
from stagemesh import hop_receiver
from stagemesh.checksum import chain_next
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.hop_receiver import Ack, Action, HopReceiver, Nack, Received, TokenTransferValidator
from stagemesh.hop_sender import HopSender, RoundTrip
from stagemesh.parts import PartAssembler
from stagemesh.sequence import Order, SequenceGate
from stagemesh.tensor import check_tensor
from stagemesh.token import TokenChunk
from stagemesh.window import InflightWindow

Change = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Bug:
    """``changes``: (owner, attribute, what it is instead). ``pair``: two guards at once."""

    name: str
    changes: tuple[Change, ...]
    pair: bool = False

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


# Frames


def _header_unchecked(frame: StepFrame, **facts: object) -> None:
    """No checksum, version or fingerprint is looked at."""


def _payload_unchecked(frame: StepFrame) -> None:
    if frame.tensor is not None:
        check_tensor(frame.tensor)


def _payload_only(self: StepFrame, payload_length: int | None = None) -> bytes:
    return self.payload_crc32c.to_bytes(4, "little")


def _answer_unchecked(answer: object) -> int:
    return 0


def _judge_any_epoch(self: SequenceGate, epoch: int, step: int) -> Order:
    if step == self.next_step:
        return Order.NEXT
    return Order.DUPLICATE if step < self.next_step else Order.GAP


def _admit_any_epoch(self: SequenceGate, epoch: int, step: int) -> Order:
    self.next_step = step + 1
    return Order.NEXT


def _take_again(self: SequenceGate, epoch: int, step: int) -> Order:
    if epoch != self.epoch:
        return Order.STALE_EPOCH if epoch < self.epoch else Order.UNKNOWN_EPOCH
    if step > self.next_step:
        return Order.GAP
    self.next_step = step
    return Order.NEXT


def _gap_is_next(self: HopReceiver, frame: StepFrame) -> Received:
    self._gate.next_step = frame.step
    return self._accept(frame)


_judge_label = HopReceiver._judge_label


def _any_hop(self: HopReceiver, frame: StepFrame) -> Order:
    hop = (self.hop_from, self.hop_to)
    self.hop_from, self.hop_to = frame.hop_from, frame.hop_to
    try:
        return _judge_label(self, frame)
    finally:
        self.hop_from, self.hop_to = hop


def _acknowledge_before_accepting(self: HopReceiver, frame: StepFrame) -> Received:
    received = _judge_content(self, frame)
    if received.action is Action.REFUSE and frame.step == self.next_step:
        self._gate.next_step += 1
        return replace(received, nack=None, ack=Ack(self.epoch, self._gate.last_step))
    return received


_judge_content = HopReceiver._judge_content


def _no_answer_again(self: HopReceiver) -> Received:
    return Received(Action.DUPLICATE)


def _forget_nack(self: HopReceiver, error: MeshError, *, retransmit: bool = True) -> Nack:
    return Nack(self.epoch, self.next_step, error.reason, "", False)


_transmissions = HopSender.transmissions


def _drop_before_ack(self: HopSender, now: float) -> list[StepFrame]:
    frames = _transmissions(self, now)
    if frames:
        self._free_through(self.cursor - 1)
        self._window.free_through(self.cursor - 1)
    return frames


def _no_patience(self: RoundTrip) -> float:
    return 0.0005


def _keep_all(self: HopSender, step: int) -> int:
    self.acked = max(self.acked, step)
    return 0


def _ignore_time(self: HopSender, now: float, *, draw: float = 1.0) -> None:
    """No timer, no silence."""


def _always_fits(self: InflightWindow, size: int) -> bool:
    return True


def _part_anywhere(self: PartAssembler, part: Any) -> StepFrame | None:
    data = bytes(part.data)
    end = min(len(self._buffer), self._filled + len(data))
    self._buffer[self._filled : end] = data[: end - self._filled]
    self._filled = end
    self._index += 1
    return self._whole() if self._index >= self.parted.part_count else None


def _trust_tokens(self: TokenTransferValidator, frame: StepFrame) -> None:
    """Whatever token comes, under whatever label."""


# Stages


_echo_row = EchoStage._row


def _any_position(self: EchoStage, frame: StepFrame, row: StepRow, hidden: list[int] | None) -> Any:
    cache = self.caches.get(row.request)
    if cache is not None and row.status is RowStatus.OK and frame.kind in _CONSUMING:
        while cache.length > row.first_position:
            cache.trim(cache.length - 1)
        cache.token_ids += [0] * (row.first_position - cache.length)
    return _echo_row(self, frame, row, hidden)


_CONSUMING = frozenset({FrameKind.PREFILL, FrameKind.DECODE})


def _no_trim(self: EchoCache, length: int) -> None:
    """The cache stays as it is."""


_echo_sample = EchoStage._sample


def _draws_counted(
    self: EchoStage, frame: StepFrame, row: StepRow, cache: EchoCache, hidden: int
) -> StepRow:
    """The generator is advanced per draw since the request was opened here, as a library's would
    be."""
    cache.reserved = (cache.reserved or cache.prompt_length) + 1
    token_id, margin = echo.draw(hidden, cache.sampling, cache.reserved - 1)
    done = _echo_sample(self, frame, row, cache, hidden)
    chain = chain_next(cache.chain_before, row.end_position, token_id)
    cache.chain = chain
    if done.token is None:
        return done
    token = replace(done.token, token_id=token_id, margin=margin, chain=chain).sealed()
    return replace(done, token=token)


def _no_worker_fence(self: SimWorker, epoch: int) -> None:
    """The order to fence is not heeded."""


def _any_weights(self: SimWorker, order: do.OpenRoute) -> None:
    """The worker takes any place."""


def _registered_weights(self: SimWorker) -> str:
    return self.info.fingerprint


def _any_step(self: SimWorker, stage: EchoStage, frame: StepFrame) -> bool:
    return True


# Routes


def _anybody_is_everybody(self: Barrier) -> tuple[Any, ...]:
    return () if self._arrived else self.participants


def _facts_do_not_matter(self: Barrier, worker: Any, facts: Any, now: float) -> bool:
    return True


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


def _no_fault_ends_a_route(self: Any, event: Any, now: float) -> list[Loss]:
    return []


# Requests


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


_finish = RequestDesk._finish


def _finish_twice(self: RequestDesk, session: Session, reason: str, now: float) -> None:
    _finish(self, session, reason, now)
    ended = next(one for one in reversed(self.state.out) if isinstance(one, do.FinishRequest))
    self.state.emit(ended)


def _finish_silently_when_cancelled(
    self: RequestDesk, session: Session, reason: str, now: float
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


def _settle_anything(self: RouteScheduler, step: int, now: float) -> SentStep | None:
    oldest = next(iter(self.outstanding), None)
    return _settle(self, oldest, now) if oldest is not None else None


_settle = RouteScheduler.settle
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


_FRAMES = (
    Bug("header checksum not checked", ((hop_receiver, "check_header", _header_unchecked),)),
    Bug("payload checksum not checked", ((hop_receiver, "check_payload", _payload_unchecked),)),
    Bug("checksum covers the payload only", ((StepFrame, "pack_header", _payload_only),)),
    Bug(
        "frames of other epochs accepted",
        ((SequenceGate, "judge", _judge_any_epoch), (SequenceGate, "admit", _admit_any_epoch)),
    ),
    Bug(
        "no de-duplication",
        ((SequenceGate, "judge", _take_again),),
    ),
    Bug("a gap is accepted", ((HopReceiver, "_hold", _gap_is_next),)),
    Bug("frames of other hops accepted", ((HopReceiver, "_judge_label", _any_hop),)),
    Bug(
        "acknowledged before accepted",
        ((HopReceiver, "_judge_content", _acknowledge_before_accepting),),
    ),
    Bug("duplicates are not answered", ((HopReceiver, "_answer_again", _no_answer_again),)),
    Bug("every refusal is final", ((HopReceiver, "_nack", _forget_nack),)),
    Bug(
        "dropped from the ledger before the ack", ((HopSender, "transmissions", _drop_before_ack),)
    ),
    Bug("the timer does not adapt", ((RoundTrip, "wait_s", property(_no_patience)),)),
    Bug("the ledger is never freed", ((HopSender, "_free_through", _keep_all),)),
    Bug("no timer", ((HopSender, "on_time", _ignore_time),)),
    Bug("the window is unbounded", ((InflightWindow, "fits", _always_fits),)),
    Bug(
        "parts and payloads not checked",
        (
            (PartAssembler, "add", _part_anywhere),
            (hop_receiver, "check_payload", _payload_unchecked),
        ),
        pair=True,
    ),
)

_ANSWERS = (
    Bug(
        "answers of a hop not checked",
        ((Ack, "checksum", _answer_unchecked), (Nack, "checksum", _answer_unchecked)),
    ),
)

_STAGES = (
    Bug("no position check", ((EchoStage, "_row", _any_position),)),
    Bug("generator not keyed by position", ((EchoStage, "_sample", _draws_counted),)),
    Bug(
        "rewind does not trim, position not checked",
        ((EchoCache, "trim", _no_trim), (EchoStage, "_row", _any_position)),
        pair=True,
    ),
    Bug(
        "a worker does not heed fences, nor looks at the epoch",
        ((SimWorker, "fence", _no_worker_fence), (SimWorker, "may_compute", _any_step)),
        pair=True,
    ),
)

_ROUTES = (
    Bug("the barrier passes early", ((Barrier, "absent", property(_anybody_is_everybody)),)),
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
            (HopSender, "on_time", _ignore_time),
        ),
        pair=True,
    ),
    Bug("a lost worker is not noticed", ((Membership, "lose", _never_lost),)),
)

_REQUESTS = (
    Bug("reroute off by one", ((Session, "attach", _attach_off_by_one),)),
    Bug("reroute repeats the last token", ((Session, "attach", _attach_behind),)),
    Bug("a token is emitted again on reroute", ((RequestDesk, "_accept", _emit_again),)),
    Bug("goes on behind the end", ((RequestDesk, "_accept", _overshoot),)),
    Bug("two terminals", ((RequestDesk, "_finish", _finish_twice),)),
    Bug("no terminal", ((RequestDesk, "_finish", _finish_silently_when_cancelled),)),
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
            (RouteScheduler, "settle", _settle_anything),
            (HopReceiver, "_hold", _gap_is_next),
        ),
        pair=True,
    ),
)

# What outlives the coordinator

_perform = MeshDriver._perform
_submit = RequestDesk.submit
_begin_mesh = Mesh.__init__


def _show_first(self: MeshDriver, instruction: do.Instruction, now: float) -> None:
    if isinstance(instruction, ClientInstruction):
        self._deliver(instruction)
        self._journal.commit(instruction, lambda _: None)
    else:
        _perform(self, instruction, now)


def _begin_anew(self: RequestDesk, demand: GenerationRequested, now: float) -> None:
    _submit(self, replace(demand, accepted=()) if demand.recovered else demand, now)


def _first_epoch_again(self: Mesh, policy: Any = None, *, first_epoch: int = 1) -> None:
    _begin_mesh(self, policy)


_RESTARTS = (
    Bug("tokens are shown before they are kept", ((MeshDriver, "_perform", _show_first),)),
    Bug("a kept answer is begun anew", ((RequestDesk, "submit", _begin_anew),)),
    Bug("epochs begin again after a restart", ((Mesh, "__init__", _first_epoch_again),)),
)

BUGS: tuple[Bug, ...] = (*_FRAMES, *_ANSWERS, *_STAGES, *_ROUTES, *_REQUESTS, *_RESTARTS)
BUGS_BY_NAME: Mapping[str, Bug] = {bug.name: bug for bug in BUGS}
