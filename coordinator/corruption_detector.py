"""What was found wrong, tier by tier; who it adds up against; and where a wrong computation began.

    T0 transport   checksums, lengths: damaged on the way. Retransmitted; weighs little.
    T1 protocol    labels, order, cache accounts: a true frame in the wrong place, a cache that is
    off.
    T2 envelope    not finite, or outside the band learnt at load.
    T3 shadow      the full worker, made to consume the emitted tokens, would have chosen otherwise.
    T4 text        advisory signals. Counted. Never more than that.

T0 to T2 see what is wrong with a frame, T3 alone sees a stage that computes wrongly and plausibly.
A score counts as a mismatch only if its ``gap`` (the reference's best score minus its score for the
emitted token) is over the tolerance: 0 where kernels are bit-exact, else the tolerance measured for
that pair. A gap that is not finite is always a mismatch.

Findings of T0 to T3 add to a worker's count of *consecutive* corruptions; clean work takes it back
to 0. At the limit the detector advises quarantine. Time and randomness are parameters; nothing here
acts."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.token_validator import Corruption, Finding
from stagemesh.frame import Score
from stagemesh.guards import Counters
from stagemesh.token import StageMark
from stagemesh.topology import Route, WorkerName

CONSECUTIVE_CORRUPTIONS_MAX = 3
"""Corruptions of one worker without clean work between them before quarantine is advised."""
CLEAN_STEPS_TO_FORGET = 200
"""Clean steps that end a series: a stage that damages one frame in a hundred is not well."""
AUDIT_BUDGET = 0.02
"""Share of measured compute that sampled auditing may take."""
AUDIT_CREDIT_S_MAX = 30.0
"""Unused audit time that is kept for later, seconds of compute."""


class Tier(enum.IntEnum):
    TRANSPORT = 0
    PROTOCOL = 1
    ENVELOPE = 2
    SHADOW = 3
    TEXT = 4


_TIER_OF = {
    Corruption.TRANSFER: Tier.TRANSPORT,
    Corruption.ENCODING: Tier.PROTOCOL,
    Corruption.ORDERING: Tier.PROTOCOL,
    Corruption.DUPLICATION: Tier.PROTOCOL,
    Corruption.LOSS: Tier.PROTOCOL,
    Corruption.NUMERIC: Tier.ENVELOPE,
    Corruption.SEMANTIC_SUSPICION: Tier.SHADOW,
}

TRANSPORT_REASONS = frozenset({"CHECKSUM_MISMATCH", "FRAME_MALFORMED", "FRAME_TOO_LARGE"})
"""Hop fault reasons of tier 0; NON_FINITE_ACTIVATION is tier 2, everything else tier 1."""


@dataclass(frozen=True, slots=True)
class DetectorSettings:
    """``tolerance``: score units (logits, or perturbed logits). ``audit_budget``: share of
    compute."""

    tolerance: float = 0.0
    consecutive_max: int = CONSECUTIVE_CORRUPTIONS_MAX
    clean_steps_to_forget: int = CLEAN_STEPS_TO_FORGET
    audit_budget: float = AUDIT_BUDGET


@dataclass(slots=True)
class WorkerRecord:
    """What stands against one worker. ``consecutive``: since it last worked cleanly for long
    enough."""

    by_tier: list[int]
    consecutive: int = 0
    clean: int = 0
    quarantine: bool = False


@dataclass(frozen=True, slots=True)
class ShadowResult:
    """Outcome of one scored piece. ``verified_to``: the position up to which (exclusive) every
    token is confirmed; ``mismatch``: the first score that is not."""

    verified_to: int
    checked: int
    mismatch: Score | None = None
    near_ties: int = 0

    @property
    def agrees(self) -> bool:
        return self.mismatch is None


class CorruptionDetector:
    """See the module. One per mesh."""

    def __init__(
        self, settings: DetectorSettings | None = None, *, counters: Counters | None = None
    ) -> None:
        self.settings = settings or DetectorSettings()
        self.counters = Counters() if counters is None else counters
        self._workers: dict[WorkerName, WorkerRecord] = {}
        self._hops: dict[tuple[WorkerName, WorkerName], int] = {}

    # What was found

    def note(self, findings: Iterable[Finding]) -> tuple[WorkerName, ...]:
        """Take findings into account; returns workers for which quarantine is advised *now*.

        Of several findings about one row only the first counts against a worker: stages behind a
        wrong one are wrong because of it."""
        first = next(iter(findings), None)
        if first is None:
            return ()
        return self._against(WorkerName(first.worker), _TIER_OF[first.corruption])

    def note_hop_fault(
        self, sender: WorkerName, receiver: WorkerName, reason: str
    ) -> tuple[WorkerName, ...]:
        """A hop's receiver refused a frame; counts against the sender and the hop."""
        self._hops[sender, receiver] = self._hops.get((sender, receiver), 0) + 1
        if reason == "NON_FINITE_ACTIVATION":
            return self._against(sender, Tier.ENVELOPE)
        tier = Tier.TRANSPORT if reason in TRANSPORT_REASONS else Tier.PROTOCOL
        return self._against(sender, tier)

    def note_clean(self, workers: Iterable[WorkerName]) -> None:
        """A step came back and everything about it agreed."""
        for worker in workers:
            record = self._workers.get(worker)
            if record is None or record.consecutive == 0:
                continue
            record.clean += 1
            if record.clean >= self.settings.clean_steps_to_forget:
                record.consecutive = record.clean = 0

    def note_text(self, signals: Sequence[str]) -> None:
        """Advisory only: counted, against nobody."""
        if signals:
            self.counters.count("text_signals", len(signals))

    def reinstate(self, worker: WorkerName) -> None:
        """The worker was reinitialised and has passed its probe: the series starts over."""
        record = self._record(worker)
        record.consecutive = record.clean = 0
        record.quarantine = False

    # Shadow verification

    def check_scores(
        self,
        scores: Sequence[Score],
        emitted: Sequence[int],
        *,
        first_position: int,
        worker: str,
        request: bytes,
        tolerance: float | None = None,
    ) -> tuple[ShadowResult, tuple[Finding, ...]]:
        """Compare a scored piece with what was emitted at consecutive positions from
        ``first_position``. A score for another position or another token confirms nothing: the
        piece is then confirmed only up to there.

        ``worker`` is who sampled the tokens; until a bisection says more, the finding names it.
        ``tolerance``: in the scores' own unit, if it is not the one of the settings.
        """
        allowed = self.settings.tolerance if tolerance is None else tolerance
        near_ties = checked = 0
        position = first_position
        for score, token_id in zip(scores, emitted, strict=False):
            if score.position != position or score.token_id != token_id:
                break
            checked += 1
            if _mismatches(score, allowed):
                self.counters.count("scores_checked", checked)
                self.counters.count("shadow_mismatches")
                self.counters.count("tokens_rejected.semantic_suspicion")
                found = Finding(
                    Corruption.SEMANTIC_SUSPICION,
                    -1,
                    -1,
                    worker,
                    request,
                    score.position,
                    f"reference chose {score.reference_token_id}, not {score.token_id}: "
                    f"gap {score.gap:.4g} over tolerance {allowed:.4g}",
                )
                return ShadowResult(position, checked, score, near_ties), (found,)
            near_ties += score.token_id != score.reference_token_id
            position += 1
        self.counters.count("scores_checked", checked)
        return ShadowResult(position, checked, None, near_ties), ()

    # What it adds up to

    def forget(self, worker: WorkerName) -> None:
        """Nobody of this name is expected back."""
        self._workers.pop(worker, None)

    def record(self, worker: WorkerName) -> WorkerRecord:
        """What stands against ``worker``."""
        return self._record(worker)

    def hop_faults(self) -> dict[tuple[WorkerName, WorkerName], int]:
        """Refused frames by (sender, receiver)."""
        return dict(self._hops)

    def _record(self, worker: WorkerName) -> WorkerRecord:
        return self._workers.setdefault(worker, WorkerRecord([0] * len(Tier)))

    def _against(self, worker: WorkerName, tier: Tier) -> tuple[WorkerName, ...]:
        record = self._record(worker)
        record.by_tier[tier] += 1
        record.consecutive += 1
        record.clean = 0
        if tier is Tier.ENVELOPE:
            self.counters.count("envelope_exceeded")
        if record.consecutive < self.settings.consecutive_max or record.quarantine:
            return ()
        record.quarantine = True
        self.counters.count("quarantines_advised")
        return (worker,)


def _mismatches(score: Score, tolerance: float) -> bool:
    if not math.isfinite(score.gap):
        return True
    if score.token_id == score.reference_token_id:
        return False
    return score.gap > tolerance or tolerance == 0.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """Where two routes part: the activation leaving layer ``layer`` - 1 differs, and none before
    it."""

    worker: WorkerName
    stage: int
    layer: int
    other: WorkerName


def bisect(
    route_a: Route,
    marks_a: Sequence[StageMark],
    route_b: Route,
    marks_b: Sequence[StageMark],
) -> Suspect | None:
    """The first boundary at which two routes, made to consume the same tokens, differ.

    ``marks_a[i].output_crc32c`` is of the activation as it left stage i of ``route_a``, for the
    same row (first position and tokens) on both routes. Boundaries are compared where both routes
    have one (behind the same layer); the last stage has none. The suspect is the stage of
    ``route_a`` that ends at the first differing boundary; if all boundaries agree, its last stage.
    None if the routes share no boundary at all: then nothing can be told between them.

    A difference proves that one of the two is wrong, not which; the caller knows which it trusts,
    and kernels must be bit-exact for the two, else equal work differs too."""
    ends_b = {
        worker.span.last: (worker.name, mark)
        for worker, mark in zip(route_b.workers[:-1], marks_b, strict=False)
    }
    shared = False
    for stage, (worker, mark) in enumerate(zip(route_a.workers[:-1], marks_a, strict=False)):
        other = ends_b.get(worker.span.last)
        if other is None:
            continue
        shared = True
        if other[1].output_crc32c != mark.output_crc32c:
            return Suspect(worker.name, stage, worker.span.last, other[0])
    if not shared:
        return None
    last = route_a.workers[-1]
    return Suspect(last.name, len(route_a.workers) - 1, last.span.last, route_b.workers[-1].name)


class AuditBudget:
    """Which pieces to audit so that auditing takes at most a share of compute. All times in
    seconds.

    Credit grows with measured compute and is spent by audits; a piece is drawn with the probability
    that would spend the credit evenly. The random value is a parameter.
    """

    def __init__(self, share: float = AUDIT_BUDGET) -> None:
        self.share = share
        self.computed_s = 0.0
        self.audited_s = 0.0
        self._credit_s = 0.0

    def earn(self, compute_s: float) -> None:
        """Compute was done for requests."""
        self.computed_s += compute_s
        self._credit_s = min(self._credit_s + self.share * compute_s, AUDIT_CREDIT_S_MAX)

    def spend(self, audit_s: float) -> None:
        """An audit took this long; the credit may go below zero and is then paid back first."""
        self.audited_s += audit_s
        self._credit_s -= audit_s

    def draws(self, value: float, *, piece_s: float, audit_s: float, must: bool = False) -> bool:
        """Whether to audit a piece that took ``piece_s`` and would take ``audit_s`` to audit.

        ``value``: uniform in [0, 1). ``must``: a new stage's first streams and streams that had a
        recovery are audited whatever the draw says, as long as there is credit.
        """
        if audit_s <= 0.0:
            return True
        if self._credit_s < audit_s:
            return False
        return must or value < self.share * piece_s / audit_s

    @property
    def used(self) -> float:
        """Audit time as a share of compute so far."""
        return self.audited_s / self.computed_s if self.computed_s else 0.0
