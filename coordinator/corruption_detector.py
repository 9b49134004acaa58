"""What can be found wrong, tier by tier, and when a reference's scores say that a token is.

    T0 transport   checksums, lengths: damaged on the way. Retransmitted.
    T1 protocol    labels, order, cache accounts: a true frame in the wrong place, a cache that is
    off.
    T2 envelope    not finite, or outside the band learnt at load.
    T3 shadow      the full worker, made to consume the emitted tokens, would have chosen otherwise.
    T4 text        advisory signals. Never more than that.

T0 to T2 see what is wrong with a frame, where it is received; T3 alone sees a stage that computes
wrongly and plausibly, and is decided here. A score counts as a mismatch only if its ``gap`` (the
reference's best score minus its score for the emitted token) is over the tolerance: 0 where kernels
are bit-exact, else the tolerance measured for that pair. A gap that is not finite is always a
mismatch.

Who it adds up against is ``RecoveryManager``'s to count. Nothing here acts.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.token_validator import Corruption, Finding
from stagemesh.frame import Score
from stagemesh.guards import Counters


class Tier(enum.IntEnum):
    TRANSPORT = 0
    PROTOCOL = 1
    ENVELOPE = 2
    SHADOW = 3
    TEXT = 4


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
    """See the module. One per mesh. ``tolerance``: score units (logits, or perturbed logits)."""

    def __init__(self, tolerance: float = 0.0, *, counters: Counters | None = None) -> None:
        self.tolerance = tolerance
        self.counters = Counters() if counters is None else counters

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

        ``worker`` is who sampled the tokens; until it is known who was wrong, the finding names it.
        ``tolerance``: in the scores' own unit, if it is not the mesh's.
        """
        allowed = self.tolerance if tolerance is None else tolerance
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


def _mismatches(score: Score, tolerance: float) -> bool:
    if not math.isfinite(score.gap):
        return True
    if score.token_id == score.reference_token_id:
        return False
    return score.gap > tolerance or tolerance == 0.0
