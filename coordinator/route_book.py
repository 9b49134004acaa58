"""Routes: planned from free workers, opened step by step, closed once.

Opening is four agreements, each with a deadline: every worker arrives at the barrier with the right
fingerprint; the coordinator's own link is up; the probe prompts come back whole, with every stage's
marks as they must be; and they continue as they do on the other open route, if there is one. A
disagreement between a pipeline and a full route refuses the *pipeline*: the full worker computed
alone.

Every attempt has a new epoch. Closing fences the epoch on all its workers, so that whatever one of
them may still do or send for it is refused everywhere.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.barrier import Arrival, BarrierState
from coordinator.events import BarrierArrived
from coordinator.instructions import (
    AnnounceBarrier,
    CloseLink,
    FenceEpoch,
    OpenLink,
    OpenRoute,
)
from coordinator.membership import Loss
from coordinator.mesh_state import MEMBERSHIP, MeshState, WorkerState
from coordinator.route import (
    OPEN_ROUTE_BARRIER,
    PROBE_PROMPTS,
    LiveRoute,
    ProbeAnswer,
    RoutePhase,
    plan_pipeline,
    probes_agree,
)
from coordinator.scheduler import RouteScheduler
from coordinator.step_book import SentStep
from stagemesh.errors import TokenRejected
from stagemesh.frame import RowStatus, StepFrame
from stagemesh.topology import Epoch, Route, WorkerInfo, WorkerName


class RouteBook:
    """See the module. Methods that can end a route return ``Loss`` records; ``close`` ends one."""

    def __init__(self, state: MeshState) -> None:
        self.state = state
        self._generation = 0

    def plan(self, now: float) -> None:
        """Open every route that free workers can form and the mesh lacks."""
        state = self.state
        if state.is_draining and not state.sessions:
            return
        free = [
            record.info
            for record in state.workers.values()
            if record.may_be_planned
            and record.epoch == 0
            and state.recovery.may_serve(record.name, now)
        ]
        while (cover := plan_pipeline(free, cost=state.recovery.cost(now))) is not None:
            taken = {info.name for info in cover}
            free = [info for info in free if info.name not in taken]
            self._begin(cover, now)
        for info in free:
            if info.is_full:
                self._begin((info,), now)

    def _begin(self, workers: tuple[WorkerInfo, ...], now: float) -> None:
        state = self.state
        route = Route(Epoch(state.next_epoch), workers)
        state.next_epoch += 1
        self._generation += 1
        timeout_s = state.policy.barrier_timeout_s
        live = LiveRoute(
            route,
            RouteScheduler(route, state.policy),
            generation=self._generation,
            deadline=now + timeout_s,
            began_at=now,
        )
        state.routes[route.epoch] = live
        for name in route.names:
            state.workers[name].epoch = route.epoch
        barrier = state.barriers.form(
            OPEN_ROUTE_BARRIER,
            route.epoch,
            route.names,
            now,
            timeout_s=timeout_s,
            generation=self._generation,
            expect={
                "fingerprint": workers[0].fingerprint,
                "dtype": workers[0].dtype,
                "layer_count": str(workers[0].layer_count),
            },
        )
        state.wake(live.deadline)
        state.emit(OpenRoute(route, self._generation, timeout_s))
        state.publish(MEMBERSHIP, "RouteOpening", epoch=route.epoch, workers=" ".join(route.names))
        state.publish_barrier(barrier)

    def arrived(self, event: BarrierArrived, now: float) -> list[Loss]:
        """A worker is at a barrier, or refuses."""
        state = self.state
        record = state.workers.get(event.worker)
        span, fenced = event.facts.get("span"), event.facts.get("fenced")
        if record is not None and span is not None and span != str(record.info.span):
            said = f"hosts span {span}, registered with {record.info.span}"
            event = replace(event, refusal=said)
        elif fenced is not None and fenced != str(event.epoch - 1):
            said = f"has fenced epochs through {fenced}, not through {event.epoch - 1}"
            event = replace(event, refusal=said)
        barrier, arrival = state.barriers.arrive(event, now)
        if barrier is None or arrival not in (Arrival.COUNTED, Arrival.BROKE):
            state.count("arrivals_ignored")
            return []
        live = state.routes.get(barrier.epoch)
        if live is None or live.phase is not RoutePhase.OPENING:
            return []
        if barrier.state is BarrierState.BROKEN:
            return self._barrier_broken(live, barrier.culprits, barrier.detail, now)
        if barrier.state is BarrierState.COMPLETE:
            self._announce(live, complete=True, absent=())
            live.phase = RoutePhase.LINKING
            live.deadline = now + state.policy.link_timeout_s
            state.wake(live.deadline)
            state.emit(OpenLink(live.route))
        return []

    def link_opened(self, epoch: int, now: float) -> None:
        """The coordinator's own hop is up: ask the probe questions."""
        live = self.state.routes.get(epoch)
        if live is None or live.phase is not RoutePhase.LINKING:
            return
        live.phase = RoutePhase.PROBING
        live.deadline = now + self.state.policy.probe_timeout_s
        self.state.wake(live.deadline)
        for prompt in PROBE_PROMPTS:
            live.scheduler.probe(prompt)
        self.state.work_changed.add(epoch)

    def probe_returned(
        self, live: LiveRoute, sent: SentStep, frame: StepFrame, now: float
    ) -> list[Loss]:
        """One probe answer; behind the last one the route is compared and opened."""
        row, asked = frame.rows[0], sent.rows[0]
        if row.status is not RowStatus.OK:
            culprit = _stage_name(live, row.fault_stage)
            return [Loss(live.epoch, row.status.name, culprit, f"probe failed: {row.fault_detail}")]
        fault = self._probe_fault(live, row.marks, asked.row.end_position, asked.digest)
        if fault is not None:
            return [fault]
        if row.token is None:
            culprit = live.route.names[-1]
            return [Loss(live.epoch, "TOKEN_REJECTED", culprit, "probe came back without a token")]
        try:
            row.token.verify()
        except TokenRejected as error:
            return [Loss(live.epoch, "TOKEN_REJECTED", live.route.names[-1], str(error))]
        answer = ProbeAnswer(row.token.token_id, row.token.margin)
        if live.phase is not RoutePhase.PROBING:
            return self._canary_returned(live, answer)
        live.probe_answers.append(answer)
        if len(live.probe_answers) < len(PROBE_PROMPTS):
            return []
        return self._compare(live, now)

    def _canary_returned(self, live: LiveRoute, answer: ProbeAnswer) -> list[Loss]:
        """An idle route has answered the first probe again: as it did when it opened?"""
        tolerance = self.state.policy.probe_margin_tolerance * self.state.rounding
        facts = probes_agree([answer], live.probe_answers[:1], margin_tolerance=tolerance)
        if not facts:
            return []
        self.state.count("probes_disagreed")
        return [Loss(live.epoch, "ROUTE_REFUSED", "", f"canary: {facts}")]

    def _probe_fault(
        self, live: LiveRoute, marks: tuple[object, ...], end: int, digest: int
    ) -> Loss | None:
        if len(marks) != live.route.stage_count:
            detail = f"{len(marks)} marks from {live.route.stage_count} stages"
            return Loss(live.epoch, "ROUTE_REFUSED", "", detail)
        for stage, mark in enumerate(marks):
            said = (getattr(mark, "cache_length", -1), getattr(mark, "history_digest", -1))
            if said != (end, digest):
                detail = f"probe: stage {stage} holds {said[0]} positions, expected {end}"
                return Loss(live.epoch, "POSITION_MISMATCH", live.route.names[stage], detail)
        return None

    def _compare(self, live: LiveRoute, now: float) -> list[Loss]:
        """Does this route answer as the other open ones do? If not, pipelines are refused: this
        one, or, by a full worker, each that differs."""
        tolerance = self.state.policy.probe_margin_tolerance * self.state.rounding
        losses: list[Loss] = []
        for other in self.state.routes.values():
            if other.phase is not RoutePhase.OPEN or other.is_full == live.is_full:
                continue
            facts = probes_agree(
                live.probe_answers, other.probe_answers, margin_tolerance=tolerance
            )
            if not facts:
                continue
            self.state.count("probes_disagreed")
            if not live.is_full:
                return [Loss(live.epoch, "ROUTE_REFUSED", "", facts)]
            losses.append(Loss(other.epoch, "ROUTE_REFUSED", "", facts))
        self._opened(live, now)
        return losses

    def _opened(self, live: LiveRoute, now: float) -> None:
        live.phase, live.opened_at = RoutePhase.OPEN, now
        self.state.had_pipeline |= not live.is_full
        for name in live.route.names:
            record = self.state.workers[name]
            record.has_served = True
            if record.state is WorkerState.JOINING:
                record.state = WorkerState.READY
        self.state.placement_changed = True
        self.state.publish(
            MEMBERSHIP,
            "RouteOpened",
            epoch=live.epoch,
            workers=" ".join(live.route.names),
            seconds=f"{now - live.began_at:.3f}",
        )

    def check_deadlines(self, now: float) -> list[Loss]:
        """Openings that took too long, and open routes on which frames vanish."""
        losses: list[Loss] = []
        for live in self.state.routes.values():
            if live.phase is RoutePhase.OPENING and now >= live.deadline:
                barrier = self.state.barriers.get(OPEN_ROUTE_BARRIER, live.epoch, live.generation)
                culprits = barrier.culprits if barrier else ()
                detail = barrier.detail if barrier else "barrier expired"
                losses += self._barrier_broken(live, culprits, detail, now)
            elif live.phase is RoutePhase.LINKING and now >= live.deadline:
                losses.append(Loss(live.epoch, "STAGE_UNREACHABLE", live.route.names[0], "link"))
            elif live.phase is RoutePhase.PROBING and now >= live.deadline:
                losses.append(Loss(live.epoch, "STAGE_UNREACHABLE", "", "probe not answered"))
            else:
                losses += self._stalled(live, now)
        return losses

    def _stalled(self, live: LiveRoute, now: float) -> list[Loss]:
        """A route that owes a step, on which nobody computes and nothing returns, has a black
        hole."""
        oldest, policy = live.scheduler.steps.oldest, self.state.policy
        if oldest is None:
            self._send_canary(live, now)
            return []
        waited = now - max(oldest.sent_at, live.scheduler.steps.last_returned_at)
        if waited < max(policy.stall_s_min, policy.stall_factor * oldest.expected_s):
            return []
        reports = [self.state.workers[name].progress for name in live.route.names]
        fresh = [r for r in reports if r is not None and r.epoch == live.epoch]
        if len(fresh) < len(reports) or any(report.computing_step for report in fresh):
            return []
        self.state.count("routes_stalled")
        step = oldest.frame.step
        behind = [r.worker for r in fresh if r.computed_step < step]
        culprit = behind[0] if behind else ""
        detail = f"step {step} vanished after {waited:.3f} s before {culprit or 'the coordinator'}"
        return [Loss(live.epoch, "STAGE_UNREACHABLE", culprit, detail)]

    def _send_canary(self, live: LiveRoute, now: float) -> None:
        """A route that has been idle for a while proves that it still makes tokens."""
        idle_s = now - live.scheduler.steps.last_returned_at
        if live.phase is RoutePhase.OPEN and idle_s >= self.state.policy.canary_interval_s:
            live.scheduler.probe(PROBE_PROMPTS[0])
            self.state.work_changed.add(live.epoch)

    def close(self, loss: Loss, now: float) -> LiveRoute | None:
        """End a route: fence its epoch, free its workers. None if it is closed already."""
        state = self.state
        live = state.routes.pop(loss.epoch, None)
        if live is None:
            return None
        was = live.phase
        live.phase, live.reason = RoutePhase.CLOSED, loss.cause
        state.emit(FenceEpoch(live.route.names, live.epoch))
        # Also while opening: the last stage may have dialled in already.
        state.emit(CloseLink(live.epoch))
        barrier = state.barriers.get(OPEN_ROUTE_BARRIER, live.epoch, live.generation)
        if barrier is not None and barrier.state is BarrierState.FORMING:
            state.barriers.abandon(barrier, loss.cause, now)
        if was is RoutePhase.OPENING:
            culprits = (WorkerName(loss.worker),) if loss.worker else ()
            self._announce(live, complete=False, absent=culprits)
        self._hold_to_account(live, loss, now)
        for name in live.route.names:
            record = state.workers.get(name)
            if record is None or record.epoch != live.epoch:
                continue
            record.epoch = 0
            if record.connected and record.state is not WorkerState.FAILED:
                state.detector.watch(name, now)
        state.plan_changed = True
        state.placement_changed = True
        kind = "RouteRefused" if loss.cause == "ROUTE_REFUSED" else "RouteClosed"
        state.publish(
            MEMBERSHIP,
            kind,
            worker=loss.worker,
            epoch=live.epoch,
            cause=loss.cause,
            detail=loss.detail,
        )
        return live

    def _hold_to_account(self, live: LiveRoute, loss: Loss, now: float) -> None:
        """Open the breakers of those responsible, so that the same route is not tried in a tight
        loop. One that has failed was counted then; so was a process that another has replaced."""
        if loss.cause in ("STAGE_DRAINING", "QUARANTINED"):
            return
        blamed: tuple[WorkerName, ...] = (
            (WorkerName(loss.worker),) if loss.worker else live.route.names
        )
        for name in blamed:
            record = self.state.workers.get(name)
            if record is None or record.epoch != live.epoch or record.state is WorkerState.FAILED:
                continue
            self.state.wake(self.state.recovery.failed(name, now))

    def _barrier_broken(
        self, live: LiveRoute, culprits: tuple[WorkerName, ...], detail: str, now: float
    ) -> list[Loss]:
        culprit = culprits[0] if culprits else ""
        for name in culprits[1:]:
            self.state.wake(self.state.recovery.failed(name, now))
        return [Loss(live.epoch, "BARRIER_BROKEN", culprit, detail)]

    def _announce(self, live: LiveRoute, *, complete: bool, absent: tuple[WorkerName, ...]) -> None:
        self.state.emit(
            AnnounceBarrier(
                OPEN_ROUTE_BARRIER,
                live.epoch,
                live.generation,
                live.route.names,
                complete,
                absent,
            )
        )
        barrier = self.state.barriers.get(OPEN_ROUTE_BARRIER, live.epoch, live.generation)
        if barrier is not None:
            self.state.publish_barrier(barrier)


def _stage_name(live: LiveRoute, stage: int) -> str:
    names = live.route.names
    return names[stage] if 0 <= stage < len(names) else ""
