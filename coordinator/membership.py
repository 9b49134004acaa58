"""Workers come, report, fall silent, are drained, quarantined and taken back.

    JOINING -served on a verified route->  READY
    JOINING, READY -late->  SUSPECT -in time again->  what it was
    any -lost, silent->     FAILED  -registers, or reports again->  JOINING
    any but DRAINING -series of corruptions->  QUARANTINED -reloaded, same fingerprint->  JOINING
    any but FAILED -operator, or itself->  DRAINING -its route is empty->  told to leave

One that is to leave never serves again: it is neither healed nor taken back. One that has failed
and is still connected is asked to leave when it reports again.

The first worker decides which model the mesh serves; a worker of another one is turned away. A
worker that registers under a known name with another *instance* is another process: the first one
is lost, whatever its connection says. Judgements come from ``FailureDetector``; this module acts on
them.

Methods return ``Loss`` records: routes that cannot go on. The caller closes those.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.barrier import Barrier, BarrierState
from coordinator.events import CommandFinished, WorkerProgressed
from coordinator.failure_detector import Health
from coordinator.instructions import (
    AnnounceBarrier,
    DrainWorker,
    MeetWorker,
    ReinitialiseWorker,
)
from coordinator.mesh_state import (
    MEMBERSHIP,
    MeshState,
    ModelIdentity,
    WorkerRecord,
    WorkerState,
)
from coordinator.route import RoutePhase
from stagemesh.topology import WorkerInfo, WorkerName

DRAIN_BARRIER = "drain"
"""Name of the rendezvous of the coordinator with a worker that leaves: it arrives when it has no
step in flight and holds no cache."""
DRAIN_GRACE_S = 2.0
"""Beyond the time to drain, for the arrival's own way."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A route that cannot go on, why, and the worker held responsible ("" if none)."""

    epoch: int
    cause: str
    worker: str
    detail: str = ""


class Membership:
    """See the module."""

    def __init__(self, state: MeshState) -> None:
        self.state = state
        self._commands = 0
        self._drains = 0

    def register(self, info: WorkerInfo, now: float) -> list[Loss]:
        """A worker dialled in."""
        state = self.state
        refusal = self._refusal(info)
        if refusal:
            state.count("workers_refused")
            state.emit(MeetWorker(info, admitted=False, reason=refusal))
            state.publish(MEMBERSHIP, "WorkerRefused", worker=info.name, reason=refusal)
            return []
        losses: list[Loss] = []
        known = state.workers.get(info.name)
        if known is not None and known.connected and known.info.instance != info.instance:
            losses = self.lose(info.name, known.info.instance, "replaced by a new process", now)
        if known is not None and known.connected and not losses:
            known.info = (
                info  # the same process dialled again: nothing is lost, and no state changes
            )
        else:
            record = WorkerRecord(info, joined_at=now, heard_at=now)
            state.workers[info.name] = record
            state.detector.watch(info.name, now)
            if known is not None and known.info.instance == info.instance:
                record.drain_deadline, record.distrusted = known.drain_deadline, known.distrusted
                record.reinitialisations = known.reinitialisations
        state.model = state.model or ModelIdentity.of(info)
        state.first_worker_at = now if state.first_worker_at is None else state.first_worker_at
        state.emit(MeetWorker(info, admitted=True))
        state.publish(
            MEMBERSHIP,
            "WorkerJoined",
            worker=info.name,
            span=info.span,
            instance=info.instance,
            fingerprint=info.fingerprint[:16],
        )
        self._back_to_its_duties(state.workers[info.name], now)
        self._plan_when_allowed(info.name, now)
        return losses

    def lose(self, name: WorkerName, instance: str, reason: str, now: float) -> list[Loss]:
        """A worker's process or control stream is gone."""
        record = self.state.workers.get(name)
        if record is None or record.info.instance != instance or not record.connected:
            return []
        record.connected = False
        self.state.detector.forget(name)
        for barrier in self.state.barriers.depart(name, reason, now):
            if barrier.name == DRAIN_BARRIER:
                self.state.publish_barrier(barrier)
        had_failed = record.state is WorkerState.FAILED
        if record.left or (had_failed and record.drain_deadline is not None):
            del self.state.workers[name]
            self.state.publish(MEMBERSHIP, "WorkerLeft", worker=name, reason=reason)
            return []
        if had_failed:  # it was silent before, and that was counted; its route has ended
            record.evidence = reason
            cause = "STAGE_UNREACHABLE"
            self.state.publish(MEMBERSHIP, "WorkerLost", worker=name, cause=cause, evidence=reason)
            return []
        return self._fail(record, "STAGE_UNREACHABLE", reason, now, kind="WorkerLost")

    def progressed(self, event: WorkerProgressed, now: float) -> None:
        """A report: evidence of life, and perhaps of progress."""
        record = self.state.workers.get(event.worker)
        if record is None or event.instance != record.info.instance or not record.connected:
            self.state.count("reports_ignored")
            return
        before, record.progress, record.heard_at = record.progress, event, now
        if record.state is WorkerState.FAILED:
            self._welcome_back(record, now)
        idle = event.queued == 0 and event.computing_step == 0
        moved = before is None or (event.epoch, event.computed_step, event.accepted_step) != (
            before.epoch,
            before.computed_step,
            before.accepted_step,
        )
        starved_s = event.starved_s - before.starved_s if before is not None else 0.0
        if moved:
            self.state.detector.progress(event.worker, now, starved_s=starved_s)
        else:
            self.state.detector.alive(event.worker, now, idle=idle, starved_s=starved_s)
        if self.state.barriers.forming:
            said = f"epoch {event.epoch}, computed step {event.computed_step}"
            self.state.barriers.note_progress(event.worker, said, now)

    def judge(self, now: float) -> list[Loss]:
        """Look at every worker's deadlines. On a route only the one to blame is held to be late: a
        worker behind a stopped one is late too, through no fault of its own."""
        losses: list[Loss] = []
        for record in self.state.workers.values():
            if not record.connected or record.state is WorkerState.FAILED:
                continue
            verdict = self.state.detector.verdict(record.name, now)
            if verdict.health is not Health.HEALTHY and self._is_another_to_blame(record, now):
                continue
            if verdict.health is Health.FAILED:
                losses += self._fail(record, verdict.cause.name, verdict.evidence, now)
            elif verdict.health is Health.SUSPECT and record.state in _CALM:
                record.state, record.evidence = WorkerState.SUSPECT, verdict.evidence
                self._doubt(record)
                self.state.publish(
                    MEMBERSHIP, "WorkerSuspect", worker=record.name, evidence=verdict.evidence
                )
            elif verdict.health is Health.HEALTHY and record.state is WorkerState.SUSPECT:
                record.state = WorkerState.READY if record.has_served else WorkerState.JOINING
                record.evidence = ""
                self._doubt(record)
                self.state.publish(MEMBERSHIP, "WorkerHealthy", worker=record.name)
                self.state.plan_changed = True
        return losses

    def forget_gone(self, now: float) -> None:
        """Take workers off the list that have been away for long.

        Where every process has a name of its own, the list would otherwise grow with each restart.
        """
        state = self.state
        longest_s = state.policy.gone_worker_kept_s
        gone = [
            record.name
            for record in state.workers.values()
            if not record.connected
            and not record.epoch
            and not record.distrusted
            and now - record.heard_at > longest_s
        ]
        for name in gone:
            del state.workers[name]
            state.recovery.forget(name)
            state.publish(MEMBERSHIP, "WorkerLeft", worker=name, reason="away for too long")

    def quarantine(self, name: WorkerName, reason: str, now: float) -> list[Loss]:
        """Out of service until it has reloaded and proved itself."""
        record = self.state.workers.get(name)
        if record is None or record.state is WorkerState.QUARANTINED or not record.connected:
            return []
        if record.state is WorkerState.DRAINING:  # its route ends, and with that it leaves
            return self._route_loss(record, "QUARANTINED", reason)
        record.state, record.evidence = WorkerState.QUARANTINED, reason
        record.distrusted = reason
        self.state.count("quarantines")
        self.state.publish(MEMBERSHIP, "WorkerQuarantined", worker=name, reason=reason)
        self._reinitialise(record, reason, now)
        return self._route_loss(record, "QUARANTINED", reason)

    def command_finished(self, event: CommandFinished, now: float) -> None:
        """A quarantined worker has reloaded, or could not."""
        record = self.state.workers.get(event.worker)
        if record is None or event.command_id != record.command_id or not record.command_id:
            self.state.count("reports_ignored")
            return
        record.command_id = ""
        info = event.info
        same = info is None or ModelIdentity.of(info) == self.state.model
        if event.ok and same:
            record.info = info or record.info
            self._begin_anew(record)
            record.reinitialisations, record.distrusted = 0, ""
            self.state.recovery.cleared(record.name)
            self.state.detector.watch(record.name, now)
            self.state.publish(MEMBERSHIP, "WorkerReinitialised", worker=record.name)
            self._plan_when_allowed(record.name, now)
            return
        detail = event.detail if not event.ok else "came back with other weights"
        self.state.publish(MEMBERSHIP, "ReinitialisationFailed", worker=record.name, detail=detail)
        self._reinitialise_again(record, detail, now)

    def drain(self, name: WorkerName, timeout_s: float, now: float) -> bool:
        """An operator wants it out of service; False if there is no such worker."""
        record = self.state.workers.get(name)
        if record is None:
            return False
        if not record.connected:  # nothing is left to be moved, and nobody to be told
            del self.state.workers[name]
            self.state.publish(MEMBERSHIP, "WorkerLeft", worker=name, reason="drained while away")
            return True
        if record.state is not WorkerState.DRAINING:
            record.drain_deadline = now + timeout_s
            self.state.wake(record.drain_deadline)
            self.state.publish(MEMBERSHIP, "WorkerDraining", worker=name, timeout_s=timeout_s)
            if record.state is WorkerState.FAILED:  # it hears nothing; see ``_back_to_its_duties``
                return True
            record.state, record.command_id = WorkerState.DRAINING, ""
            live = self.state.route_of(record)
            if live is not None and live.phase is RoutePhase.OPEN:
                live.phase = RoutePhase.DRAINING
                self.state.publish(MEMBERSHIP, "RouteDraining", epoch=live.epoch)
        return True

    def drained(self, now: float) -> list[Loss]:
        """Let go of draining workers whose route nobody needs, and end the routes whose time is
        over."""
        losses: list[Loss] = []
        for record in self.state.workers.values():
            if record.state is not WorkerState.DRAINING or record.left:
                continue
            live = self.state.route_of(record)
            overdue = record.drain_deadline is not None and now >= record.drain_deadline
            if live is not None and live.phase is RoutePhase.DRAINING and live.scheduler.is_needed:
                if overdue:
                    losses.append(
                        Loss(live.epoch, "STAGE_DRAINING", record.name, "drain time over")
                    )
            elif live is not None:
                losses.append(Loss(live.epoch, "STAGE_DRAINING", record.name, "drained"))
            else:
                self._leave(record, now)
        return losses

    def check_commands(self, now: float) -> None:
        """Try again (or give up) reinitialisations that were not answered in time."""
        for record in self.state.workers.values():
            if record.command_id and now >= record.command_deadline:
                record.command_id = ""
                self._reinitialise_again(record, "no answer in time", now)

    def _refusal(self, info: WorkerInfo) -> str:
        """Why this worker may not join; "" if it may."""
        if info.span.last > info.layer_count:
            return f"span {info.span} is outside the model's {info.layer_count} layers"
        ours, theirs = self.state.model, ModelIdentity.of(info)
        if ours is None or ours == theirs:
            return ""
        others = [r for r in self.state.workers.values() if r.connected and r.name != info.name]
        begun = any(session.accepted_count for session in self.state.sessions.values())
        if not others and not begun:
            # The last worker of the old model is gone, and no answer has begun with it. Requests
            # that merely wait must not hold the mesh to a model that nobody has any more.
            self.state.model = None
            return ""
        for field in ("fingerprint", "dtype", "layer_count"):
            if getattr(ours, field) != getattr(theirs, field):
                said, wanted = getattr(theirs, field), getattr(ours, field)
                return f"other weights than the mesh: {field} is {said}, not {wanted}"
        return ""

    def _fail(
        self,
        record: WorkerRecord,
        cause: str,
        evidence: str,
        now: float,
        *,
        kind: str = "WorkerFailed",
    ) -> list[Loss]:
        record.state, record.evidence = WorkerState.FAILED, evidence
        record.command_id = ""
        held_until = self.state.recovery.failed(record.name, now)
        self.state.count("workers_failed_total")
        self.state.publish(MEMBERSHIP, kind, worker=record.name, cause=cause, evidence=evidence)
        self.state.wake(held_until)
        return self._route_loss(record, cause, evidence)

    def _route_loss(self, record: WorkerRecord, cause: str, detail: str) -> list[Loss]:
        return [Loss(record.epoch, cause, record.name, detail)] if record.epoch else []

    def _doubt(self, record: WorkerRecord) -> None:
        """Its route is in doubt while any worker of it is."""
        live = self.state.route_of(record)
        if live is not None:
            members = (self.state.workers.get(name) for name in live.route.names)
            live.suspect = any(one and one.state is WorkerState.SUSPECT for one in members)

    def _is_another_to_blame(self, record: WorkerRecord, now: float) -> bool:
        live = self.state.route_of(record)
        if live is None:
            return False
        blamed = self.state.detector.blame(live.route.names, now)
        return blamed is not None and blamed.worker != record.name

    def _welcome_back(self, record: WorkerRecord, now: float) -> None:
        """A worker given up as silent reports again: its old epochs are fenced, so it may start
        anew."""
        self._begin_anew(record)
        self.state.detector.watch(record.name, now)
        self.state.publish(MEMBERSHIP, "WorkerReturned", worker=record.name)
        self._back_to_its_duties(record, now)
        self._plan_when_allowed(record.name, now)

    def _begin_anew(self, record: WorkerRecord) -> None:
        record.state, record.evidence, record.has_served = WorkerState.JOINING, "", False

    def _back_to_its_duties(self, record: WorkerRecord, now: float) -> None:
        """The same process was away: what an operator or the mesh had decided about it stands."""
        if record.state is not WorkerState.JOINING or record.command_id:
            return
        if record.drain_deadline is not None:
            record.state = WorkerState.DRAINING
            self.state.wake(now)
        elif record.distrusted:
            record.state, record.evidence = WorkerState.QUARANTINED, record.distrusted
            self._reinitialise_again(record, record.distrusted, now)

    def _plan_when_allowed(self, name: WorkerName, now: float) -> None:
        held_until = self.state.recovery.history(name).held_until
        if held_until > now:
            self.state.wake(held_until)
        self.state.plan_changed = True

    def _reinitialise(self, record: WorkerRecord, reason: str, now: float) -> None:
        self._commands += 1
        record.reinitialisations += 1
        record.command_id = f"reinitialise-{self.state.next_epoch}-{self._commands}"
        record.command_deadline = now + self.state.policy.reinitialise_timeout_s
        self.state.wake(record.command_deadline)
        self.state.emit(ReinitialiseWorker(record.name, reason, record.command_id))

    def _reinitialise_again(self, record: WorkerRecord, reason: str, now: float) -> None:
        if record.reinitialisations < self.state.policy.reinitialise_attempts_max:
            self._reinitialise(record, reason, now)
            return
        record.evidence = f"given up after {record.reinitialisations} reinitialisations: {reason}"
        self.state.publish(
            MEMBERSHIP, "WorkerGivenUp", worker=record.name, evidence=record.evidence
        )

    def _leave(self, record: WorkerRecord, now: float) -> None:
        """Its routes are gone: meet once more, when nothing is in flight and nothing is held."""
        record.left = True
        left_s = max((record.drain_deadline or now) - now, 0.0)
        self._drains += 1
        epoch = self.state.next_epoch - 1
        barrier = self.state.barriers.form(
            DRAIN_BARRIER,
            epoch,
            (record.name,),
            now,
            timeout_s=left_s + DRAIN_GRACE_S,
            generation=self._drains,
            expect={"in_flight": "0", "kv_tokens": "0"},
        )
        self.state.wake(barrier.deadline)
        self.state.publish_barrier(barrier)
        self.state.emit(DrainWorker(record.name, left_s, epoch, self._drains))

    def drain_ended(self, barrier: Barrier) -> None:
        """The drain barrier of a worker has ended: tell it, and everybody."""
        complete = barrier.state is BarrierState.COMPLETE
        self.state.emit(
            AnnounceBarrier(
                barrier.name,
                barrier.epoch,
                barrier.generation,
                barrier.participants,
                complete,
                barrier.absent,
            )
        )
        self.state.publish_barrier(barrier)
        if complete:
            self.state.publish(MEMBERSHIP, "WorkerDrained", worker=barrier.participants[0])


_CALM = frozenset({WorkerState.JOINING, WorkerState.READY})
