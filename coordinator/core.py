"""The mesh as a machine without I/O: events in, instructions out.

``Mesh.handle(event, now)`` is the only door. It calls the parts in a fixed order: the part the
event is for; then whatever follows from it until nothing more does (routes that were lost are
closed, displaced and waiting requests are placed, free workers are planned, steps are formed).
Nothing here waits, draws or reads a clock: ``now`` is seconds on one monotonic clock, and the same
events at the same times give the same instructions, in production, in transcripts and in the
simulator.

    Membership    workers: who is there, and in what state
    RouteBook     routes: planned, opened, probed, closed
    RequestDesk   requests: admitted, verified, recovered, ended

Invariants of the whole, asserted by ``check``: a worker is on at most one route, and a route's
workers know it; a request is in exactly one of queue, displaced line and one route; every live
request will have exactly one terminal instruction because only ``Endings`` takes it out of
``sessions``.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coordinator.barrier import Arrival
from coordinator.events import (
    BarrierArrived,
    CancelRequested,
    CommandFinished,
    DrainAllRequested,
    DrainRequested,
    Event,
    FrameReturned,
    GenerationRequested,
    HopFaultSeen,
    LinkBroken,
    LinkOpened,
    RequestFailed,
    StopMatched,
    TimePassed,
    WorkerLost,
    WorkerProgressed,
    WorkerRegistered,
)
from coordinator.instructions import Instruction, SendStep, WakeAt
from coordinator.membership import DRAIN_BARRIER, Loss, Membership
from coordinator.mesh_state import DIAGNOSTICS, INTEGRITY, MeshState
from coordinator.recovery import KIND_OF_STATUS, SUSPICIOUS
from coordinator.requests import RequestDesk
from coordinator.route import LiveRoute
from coordinator.route_book import RouteBook
from coordinator.row_labels import answers, changed_ahead_of, hop_behind
from coordinator.session import SessionPhase
from coordinator.settings import MeshPolicy
from coordinator.snapshot import MeshSnapshot, take_snapshot
from coordinator.step_book import SentStep
from stagemesh import errors
from stagemesh.errors import InvalidConfiguration, StageDraining, by_reason
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.topology import COORDINATOR_HOP, WorkerName

_REASONS = frozenset(by_reason())
_MADE_WRONG = frozenset(
    {
        errors.TokenRejected.reason,
        errors.NonFiniteActivation.reason,
        errors.FrameCorrupted.reason,
        errors.FrameMalformed.reason,
        *(status.name for status, kind in KIND_OF_STATUS.items() if kind in SUSPICIOUS),
    }
)
"""Causes of a loss that say that what a worker sent was wrong, however often it was sent."""
IDLE_TICK_S = 1.0
"""How often idle workers' reports are looked at."""


class Mesh:
    """See the module. ``first_epoch`` must be above every epoch of an earlier coordinator."""

    def __init__(self, policy: MeshPolicy | None = None, *, first_epoch: int = 1) -> None:
        policy = policy or MeshPolicy()
        policy.check()
        self.state = MeshState(policy, next_epoch=first_epoch)
        self.membership = Membership(self.state)
        self.routes = RouteBook(self.state)
        self.requests = RequestDesk(self.state)
        self._wake_at: float | None = None
        self._tick_at: float | None = None
        self._drain_deadline: float | None = None
        self._handlers: dict[type[Event], Callable[[Any, float], list[Loss]]] = {
            GenerationRequested: _quiet(self.requests.submit),
            CancelRequested: _quiet(self.requests.cancel),
            RequestFailed: _quiet(self.requests.give_up),
            StopMatched: _quiet(self.requests.stop_matched),
            WorkerRegistered: lambda e, now: self.membership.register(e.worker, now),
            WorkerLost: lambda e, now: self.membership.lose(e.worker, e.instance, e.reason, now),
            WorkerProgressed: _quiet(self.membership.progressed),
            BarrierArrived: self._barrier_arrived,
            LinkOpened: _quiet(lambda e, now: self.routes.link_opened(e.epoch, now)),
            LinkBroken: self._link_broken,
            HopFaultSeen: self._hop_fault,
            FrameReturned: self._frame_returned,
            CommandFinished: _quiet(self.membership.command_finished),
            DrainRequested: self._drain,
            DrainAllRequested: _quiet(self._drain_all),
            TimePassed: self._time_passed,
        }

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Everything to be done because of ``event``, in order."""
        out: list[Instruction] = []
        self.state.out = out
        handler = self._handlers.get(type(event))
        if handler is None:
            raise InvalidConfiguration("no such event", event=type(event).__name__)
        self._follow(handler(event, now), now)
        self._ask_to_be_woken(now)
        return out

    def knows(self, request: bytes) -> bool:
        """Whether this request id is taken: live, or ended and still described.

        One that failed may be asked again, or gone on with.
        """
        ended = self.state.ended.get(request)
        has_failed = ended is not None and ended.phase is SessionPhase.FAILED
        return request in self.state.sessions or (ended is not None and not has_failed)

    def snapshot(self, now: float) -> MeshSnapshot:
        """The mesh at this moment, for operators."""
        return take_snapshot(
            self.state,
            now,
            finished=self.requests.endings.finished,
            failed=self.requests.endings.failed,
            running=self.requests.running,
            not_ready_reason=self.requests.why_not_ready(),
        )

    # What follows from an event

    def _follow(self, losses: list[Loss], now: float) -> None:
        state = self.state
        while losses:
            loss = self._judged(losses.pop(0))
            if loss.cause == "QUARANTINED":
                self.membership.quarantine(WorkerName(loss.worker), loss.detail, now)
            live = self.routes.close(loss, now)
            if live is not None:
                self.requests.route_closed(live, loss, now)
            if not losses:
                losses = self.membership.drained(now)
        if state.plan_changed:
            state.plan_changed = False
            self.routes.plan(now)
        if state.placement_changed:
            state.placement_changed = False
            self.requests.place(now)
        while state.work_changed:
            live = state.routes.get(state.work_changed.pop())
            if live is not None:
                self._send(live, now)

    def _judged(self, loss: Loss) -> Loss:
        """A route that ended because a worker sent what was wrong counts against that worker, also
        when a link or a probe found it; one time too many is quarantine."""
        live = self.state.routes.get(loss.epoch)
        if live is None or loss.cause not in _MADE_WRONG or loss.worker not in live.route.names:
            return loss
        name, step = WorkerName(loss.worker), live.scheduler.steps.next_step
        if not self.state.recovery.corrupted(name, loss.epoch, step):
            return loss
        return replace(loss, cause="QUARANTINED")

    def _send(self, live: LiveRoute, now: float) -> None:
        detector = self.state.detector
        for frame in live.scheduler.form(now):
            self.state.emit(SendStep(frame))
            sent = live.scheduler.steps.outstanding[frame.step]
            phase, work = frame.kind.name, frame.token_count
            for name in live.route.names:
                detector.owe(name, frame.step, now, sent.expected_s, phase=phase, work=work)

    # Events that concern several parts

    def _frame_returned(self, event: FrameReturned, now: float) -> list[Loss]:
        frame = event.frame
        live = self.state.routes.get(frame.epoch)
        if live is None:
            self.state.count("frames_fenced")
            self.state.publish(INTEGRITY, "FrameFenced", epoch=frame.epoch, step=frame.step)
            return []
        sent = live.scheduler.steps.settle(frame.step, now)
        if sent is None:
            return self._frame_unexpected(live, frame)
        for name in live.route.names:
            self.state.detector.settle(name, frame.step, now)
        self.state.work_changed.add(live.epoch)
        if not answers(frame, sent):
            return self._frame_mislabelled(live, sent, frame)
        if sent.kind is FrameKind.PROBE and sent.rows[0].row.boundaries:
            return self.requests.verifier.examiner.answered(live, frame)
        if sent.kind is FrameKind.PROBE:
            return self.routes.probe_returned(live, sent, frame, now)
        if sent.kind is FrameKind.CLOSE:
            return self.membership.drained(now) if self.state.workers else []
        return self.requests.step_returned(live, sent, frame, now)

    def _frame_mislabelled(self, live: LiveRoute, sent: SentStep, frame: StepFrame) -> list[Loss]:
        """Other rows than were sent, under true checksums: the route ends, and the stage that sent
        them on is to blame (none, if the first one received them so)."""
        names = live.route.names
        ahead_of = changed_ahead_of(frame, sent, len(names))
        worker = names[ahead_of - 1] if ahead_of else ""
        self.state.count("frames_mislabelled")
        detail = f"step {frame.step} came back with other rows than were sent"
        self.state.publish(
            INTEGRITY,
            "FrameMislabelled",
            worker=worker,
            epoch=frame.epoch,
            step=frame.step,
            hop=hop_behind(ahead_of - 1, len(names)),
            detail=detail,
        )
        return [Loss(live.epoch, "FRAME_MALFORMED", worker, detail)]

    def _frame_unexpected(self, live: LiveRoute, frame: StepFrame) -> list[Loss]:
        """A step that is not the oldest outstanding one: a repeat is dropped, a gap ends the
        route."""
        oldest = live.scheduler.steps.oldest
        self.state.count("frames_unexpected")
        expected = oldest.frame.step if oldest else live.scheduler.steps.next_step
        self.state.publish(
            INTEGRITY, "FrameUnexpected", epoch=frame.epoch, step=frame.step, expected=expected
        )
        if frame.step < expected:
            return []
        detail = f"step {frame.step} came back before step {expected}"
        return [Loss(live.epoch, "SEQUENCE_GAP", live.route.names[-1], detail)]

    def _link_broken(self, event: LinkBroken, now: float) -> list[Loss]:
        live = self.state.routes.get(event.epoch)
        if live is None:
            return []
        first = live.route.names[0]
        return [Loss(live.epoch, event.reason or "STAGE_UNREACHABLE", first, event.detail)]

    def _hop_fault(self, event: HopFaultSeen, now: float) -> list[Loss]:
        """A hop saw damage. The links repair what they can; a fatal fault ends the route."""
        state = self.state
        known = event.reason if event.reason in _REASONS else "other"
        state.count(f"hop_faults.{known.lower()}")
        state.publish(
            INTEGRITY,
            "HopFault",
            worker=event.worker,
            epoch=event.epoch,
            step=event.step,
            hop=f"{event.hop_from}→{event.hop_to}",
            reason=event.reason,
            detail=event.detail,
            fatal=event.fatal,
        )
        live = state.routes.get(event.epoch)
        if live is None or not event.fatal:
            return []
        names = live.route.names
        ends = [names[hop] for hop in (event.hop_to, event.hop_from) if 0 <= hop < len(names)]
        peer = next((name for name in ends if name != event.worker), "")
        is_ours = COORDINATOR_HOP in (event.hop_from, event.hop_to)
        culprit = peer or (event.worker if is_ours and event.worker in names else "")
        return [Loss(live.epoch, event.reason, culprit, event.detail)]

    def _barrier_arrived(self, event: BarrierArrived, now: float) -> list[Loss]:
        """A worker is where others wait for it: where a route opens, or where it leaves."""
        if event.name != DRAIN_BARRIER:
            return self.routes.arrived(event, now)
        barrier, arrival = self.state.barriers.arrive(event, now)
        if barrier is not None and arrival in (Arrival.COUNTED, Arrival.BROKE):
            self.membership.drain_ended(barrier)
        else:
            self.state.count("arrivals_ignored")
        return []

    def _drain(self, event: DrainRequested, now: float) -> list[Loss]:
        self.membership.drain(event.worker, event.timeout_s, now)
        self.state.placement_changed = True
        return self.membership.drained(now)

    def _drain_all(self, event: DrainAllRequested, now: float) -> None:
        state = self.state
        state.is_draining = True
        self._drain_deadline = now + event.timeout_s
        state.wake(self._drain_deadline)
        state.publish(DIAGNOSTICS, "MeshDraining", timeout_s=event.timeout_s)
        self.requests.fail_everything(_shutting_down(), now, only_waiting=True)

    def _time_passed(self, event: TimePassed, now: float) -> list[Loss]:
        state = self.state
        self._wake_at = self._tick_at = None
        while state.timers and state.timers[0] <= now:
            heapq.heappop(state.timers)
        losses = self.membership.judge(now)
        for barrier in state.barriers.expire(now):
            if barrier.name == DRAIN_BARRIER:
                self.membership.drain_ended(barrier)
        losses += self.routes.check_deadlines(now)
        losses += self.membership.drained(now)
        self.membership.check_commands(now)
        self.membership.forget_gone(now)
        self.requests.expire(now)
        if self._drain_deadline is not None and now >= self._drain_deadline:
            self._drain_deadline = None
            self.requests.fail_everything(_shutting_down(), now, only_waiting=False)
        state.plan_changed = True
        state.placement_changed = True
        return losses

    # Time

    def _ask_to_be_woken(self, now: float) -> None:
        """One pending wake-up: the next timer, or the next tick while there is something to
        watch."""
        state = self.state
        busy = bool(state.sessions) or any(
            r.scheduler.steps.outstanding for r in state.routes.values()
        )
        if busy or state.workers:
            tick_at = now + (state.policy.check_interval_s if busy else IDLE_TICK_S)
            if self._tick_at is None or tick_at < self._tick_at:
                self._tick_at = tick_at
        wanted = self._tick_at
        if state.timers and (wanted is None or state.timers[0] < wanted):
            wanted = state.timers[0]
        if wanted is not None and (self._wake_at is None or wanted < self._wake_at):
            self._wake_at = wanted
            state.emit(WakeAt(wanted))

    # Invariants

    def check(self) -> None:
        """Raise InvalidConfiguration naming every broken invariant; tests call it behind each
        event."""
        state = self.state
        broken: list[str] = []
        placed = [*state.queue, *state.fallback.displaced, *state.settling.values()]
        for live in state.routes.values():
            broken += live.scheduler.check()
            placed += live.scheduler.sessions.values()
            strangers = [n for n in live.route.names if state.workers[n].epoch != live.epoch]
            if strangers:
                broken.append(f"route epoch={live.epoch}: {strangers} do not know it")
        if len(placed) != len(state.sessions) or {s.request for s in placed} != set(state.sessions):
            broken.append(f"{len(placed)} requests are placed, {len(state.sessions)} are live")
        for session in placed:
            broken += session.check()
        for record in state.workers.values():
            if record.epoch and record.epoch not in state.routes:
                broken.append(f"worker {record.name} is on a closed route")
        if broken:
            raise InvalidConfiguration("; ".join(broken))


def _quiet(
    handler: Callable[[Any, float], None],
) -> Callable[[Any, float], list[Loss]]:
    """A handler that never ends a route."""

    def handle(event: Any, now: float) -> list[Loss]:
        handler(event, now)
        return []

    return handle


def _shutting_down() -> StageDraining:
    return StageDraining("the mesh is shutting down")
