"""Every step of one route that was sent and has not come back.

Each step has exactly one answer, in order: steps are numbered one after the other, and only the
oldest that is out can be settled. ``SentStep`` keeps what was asked, with what every stage's mark
must say; the frame that comes back is compared with it, never believed by itself.

The book also counts what is under way, for whoever forms the next step (see ``scheduler``), and
times what returns. A route computes its steps one behind the other, so a step has had the route
since it was sent or since the one before it came back, whichever was later.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.session import Session
from coordinator.shadow import Shadow
from coordinator.step_size import StepSize
from coordinator.step_times import StepTimes
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.topology import COORDINATOR_HOP, Route

CLEANING = (FrameKind.CLOSE, FrameKind.REWIND)
"""Kinds that compute nothing: they take no place beside the others."""


@dataclass(frozen=True, slots=True)
class SentRow:
    """One row as sent. ``session`` is None for a probe, a close, or a row of a ``shadow``.
    ``digest``: what every stage must report behind a probe."""

    row: StepRow
    session: Session | None
    attempt: int
    digest: int = 0
    shadow: Shadow | None = None


@dataclass(frozen=True, slots=True)
class SentStep:
    """A step that has not come back, or just did."""

    frame: StepFrame
    rows: tuple[SentRow, ...]
    sent_at: float
    expected_s: float

    @property
    def kind(self) -> FrameKind:
        return self.frame.kind

    @property
    def is_live_prefill(self) -> bool:
        """Whether it is a chunk of a live request's prompt, not a shadow's."""
        return self.kind is FrameKind.PREFILL and self.rows[0].shadow is None


class StepBook:
    """See the module. ``in_flight``: steps that compute something and have not come back;
    ``prefills_in_flight`` and ``decodes_in_flight``: those of live requests among them.
    ``last_step_s``: what the last step that returned took of the route's time."""

    def __init__(self, route: Route, times: StepTimes, size: StepSize) -> None:
        self.outstanding: dict[int, SentStep] = {}
        self.next_step = 1
        self.in_flight = 0
        self.prefills_in_flight = 0
        self.decodes_in_flight = 0
        self.last_returned_at = 0.0
        self.last_step_s = 0.0
        self._route = route
        self._times = times
        self._size = size

    @property
    def oldest(self) -> SentStep | None:
        """The outstanding step the route owes first."""
        for sent in self.outstanding.values():
            return sent
        return None

    def send(self, kind: FrameKind, rows: tuple[SentRow, ...], now: float) -> StepFrame:
        """Number a step and write it down; the frame is for the route's first stage."""
        frame = StepFrame(
            kind=kind,
            fingerprint=self._route.fingerprint8,
            epoch=self._route.epoch,
            step=self.next_step,
            hop_from=COORDINATOR_HOP,
            hop_to=0,
            rows=tuple(sent.row for sent in rows),
            traceparent=rows[0].session.demand.traceparent if rows[0].session else "",
        )
        expected_s = self._times.expected_s(kind, frame.token_count)
        sent = SentStep(frame, rows, now, expected_s)
        self.outstanding[self.next_step] = sent
        self.next_step += 1
        self._count(sent, 1)
        for row in rows:
            if row.session is not None:
                row.session.in_flight += 1
        return frame

    def settle(self, step: int, now: float) -> SentStep | None:
        """The step that has come back; None if it is not the oldest outstanding one."""
        oldest = next(iter(self.outstanding), None)
        if oldest != step:
            return None
        sent = self.outstanding.pop(step)
        seconds = now - max(sent.sent_at, self.last_returned_at)
        self._times.add(sent.kind, sent.frame.token_count, seconds)
        if sent.kind is FrameKind.DECODE:
            self._size.add(len(sent.rows), seconds)
        self.last_returned_at = now
        self.last_step_s = seconds
        self._count(sent, -1)
        for row in sent.rows:
            if row.session is not None and row.attempt == row.session.attempt:
                row.session.in_flight -= 1
        return sent

    def _count(self, sent: SentStep, change: int) -> None:
        self.in_flight += 0 if sent.kind in CLEANING else change
        self.prefills_in_flight += change if sent.is_live_prefill else 0
        self.decodes_in_flight += change if sent.kind is FrameKind.DECODE else 0

    def check(self) -> list[str]:
        """Broken invariants, in words."""
        steps, sent = list(self.outstanding), self.outstanding.values()
        computing = sum(one.kind not in CLEANING for one in sent)
        prefills = sum(one.is_live_prefill for one in sent)
        decodes = sum(one.kind is FrameKind.DECODE for one in sent)
        rules = (
            ("steps outstanding are consecutive", steps == sorted(steps)),
            ("last sent is newest", not steps or steps[-1] == self.next_step - 1),
            ("in flight is what was sent", self.in_flight == computing),
            ("prefill in flight is what was sent", self.prefills_in_flight == prefills),
            ("decodes in flight are what was sent", self.decodes_in_flight == decodes),
        )
        return [rule for rule, holds in rules if not holds]
