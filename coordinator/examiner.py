"""Finds out who computed wrongly, once a full worker has rejected a token, and counts it.

Where kernels are bit-exact the checksums that came with the tokens tell (``shadow.Lines``): the
first boundary at which a stage and the full worker differ, or, if all agree, the last stage. Where
they are not, or say nothing, the route and the full worker are asked to compute the same tokens
once more, and their digests at every boundary are compared by size and direction: an
*examination*. A full worker is the reference by declaration; what it says of a boundary is not
doubted here.

A corruption counts against the worker, and one too many is quarantine: its route is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from coordinator.membership import Loss
from coordinator.mesh_state import INTEGRITY, MeshState
from coordinator.route import LiveRoute
from coordinator.session import Session
from coordinator.shadow import SHADOW_MISMATCH, Difference, Shadow
from stagemesh.frame import BoundaryDigest, RowStatus, StepFrame
from stagemesh.topology import WorkerInfo, WorkerName

EXAMINATIONS_MAX = 4
"""Examinations under way; more mismatches than that at once have one cause."""


@dataclass(slots=True)
class Examination:
    """The same tokens computed by a pipeline and by the full worker, digests at every boundary.

    ``tolerance`` is relative to the reference's root mean square. ``answers`` by epoch: digests,
    and the token chosen behind them."""

    token_ids: tuple[int, ...]
    workers: tuple[WorkerInfo, ...]
    epochs: tuple[int, int]
    tolerance: float
    request: bytes
    position: int
    answers: dict[int, tuple[tuple[BoundaryDigest, ...], int]] = field(default_factory=dict)

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(worker.span.last for worker in self.workers[:-1])

    def culprit(self) -> str | None:
        """The first stage whose output is not the reference's; the last stage if only the token
        differs; "" if all agree, and nothing can be told; None while an answer is missing."""
        if any(epoch not in self.answers for epoch in self.epochs):
            return None
        ours, theirs = (self.answers[epoch] for epoch in self.epochs)
        reference = {(d.layer, d.position): d for d in theirs[0]}
        wrong = {
            digest.layer
            for digest in ours[0]
            if self._differs(digest, reference.get((digest.layer, digest.position)))
        }
        for worker in self.workers[:-1]:
            if worker.span.last in wrong:
                return worker.name
        return self.workers[-1].name if ours[1] != theirs[1] else ""

    def _differs(self, digest: BoundaryDigest, reference: BoundaryDigest | None) -> bool:
        if reference is None or digest.crc32c == reference.crc32c:
            return False
        allowed = self.tolerance * reference.rms
        pairs = ((digest.rms, reference.rms), (digest.projection, reference.projection))
        return not all(abs(ours - theirs) <= allowed for ours, theirs in pairs)  # NaN differs


class Examiner:
    """See the module."""

    def __init__(self, state: MeshState) -> None:
        self._state = state
        self._examinations: list[Examination] = []

    # By checksums

    def difference(self, shadow: Shadow, position: int) -> Difference | None:
        """Who the checksums say it was. All boundaries equal: the last stage, behind the last
        boundary."""
        lines = shadow.lines
        if not shadow.boundaries:
            return None
        if lines.first is not None:
            return lines.first
        # Of the line that yielded the token, or one near it.
        source = lines.last_line(position - 1) or lines.last_line(position)
        if source is None or lines.compared < position - 1:
            return None
        return Difference(position, source.workers[-1].name, source.epoch, source.step)

    def blame(self, worker: str, epoch: int, step: int, detail: str) -> list[Loss]:
        """Count it against the worker; one too many ends its route. Its route's next streams are
        audited."""
        live = self._state.routes.get(epoch)
        if live is not None:
            live.audited = 0
        if not self._state.recovery.corrupted(WorkerName(worker), epoch, step):
            return []
        return [Loss(epoch, "QUARANTINED", worker, detail)] if live is not None else []

    # By computing again, where checksums cannot tell

    def examine(self, full: LiveRoute, session: Session, position: int) -> None:
        """Have both routes compute the beginning of the answer again, if both can say enough."""
        live = self._state.routes.get(session.epoch) if session.epoch else None
        if live is None or live.is_full or len(self._examinations) >= EXAMINATIONS_MAX:
            return
        if "boundaries" not in full.route.workers[0].capabilities:
            return
        policy = self._state.policy
        token_ids = session.stream.tokens(0, min(position, policy.examine_tokens_max))
        one = Examination(
            token_ids=token_ids,
            workers=live.route.workers,
            epochs=(live.epoch, full.epoch),
            tolerance=policy.boundary_tolerance,
            request=session.request,
            position=position,
        )
        self._examinations.append(one)
        for route in (live, full):
            route.scheduler.probe(token_ids, one.boundaries)
            self._state.work_changed.add(route.epoch)

    def answered(self, live: LiveRoute, frame: StepFrame) -> list[Loss]:
        """One route's account of an examination. Where one could not compute it (there is no room
        for it in its cache), nothing can be told."""
        row = frame.rows[0]
        for one in self._examinations:
            is_missing = live.epoch in one.epochs and live.epoch not in one.answers
            if not is_missing or row.token_ids != one.token_ids:
                continue
            if row.status is not RowStatus.OK or row.token is None:
                self._examinations.remove(one)
                return self._concluded(
                    one, "", frame.step, f"{row.status.name}: {row.fault_detail}"
                )
            one.answers[live.epoch] = (row.digests, row.token.token_id)
            culprit = one.culprit()
            if culprit is None:
                return []
            self._examinations.remove(one)
            said = "" if culprit else "computed again, every stage agrees with the full worker"
            return self._concluded(one, culprit, frame.step, said)
        return []

    def route_closed(self, live: LiveRoute) -> None:
        """It will not answer any more."""
        self._examinations = [e for e in self._examinations if live.epoch not in e.epochs]

    def _concluded(self, one: Examination, culprit: str, step: int, said: str) -> list[Loss]:
        self._state.publish(
            INTEGRITY,
            "ShadowExamined",
            request=one.request,
            worker=culprit,
            epoch=one.epochs[0],
            position=one.position,
            detail=said,
        )
        if not culprit:
            return []
        self._name_culprit(one.request, culprit)
        return self.blame(culprit, one.epochs[0], step, "computes otherwise than the full worker")

    def _name_culprit(self, request: bytes, culprit: str) -> None:
        """Into the recovery record that this mismatch began."""
        session = self._state.sessions.get(request) or self._state.ended.get(request)
        if session is None:
            return
        pending = session.recovering
        if pending is not None and pending.cause == SHADOW_MISMATCH and not pending.worker:
            pending.worker = culprit
        for index, record in enumerate(session.recoveries):
            if record.cause == SHADOW_MISMATCH and not record.worker:
                session.recoveries[index] = replace(record, worker=culprit)
