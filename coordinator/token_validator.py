"""Is what came back for a row what this route was asked for? If not: what is wrong, where, and by
whom.

The coordinator knows everything about a row before it returns: request, epoch, step, positions, the
digest of every token id the stages should have consumed, the chain digest before the new token. So
a row is not judged by how it looks but compared with what it must be. Each stage's mark is compared
too, which names the stage: the first one whose account differs is where it went wrong, because
marks are made in stage order.

Nothing here reads the meaning of a token. Emoji, CJK, combining marks, control characters, tokens
that are not valid UTF-8 alone: any id below the vocabulary size is legal output.

A clean row takes the short way (a handful of comparisons); only a row that fails one of them is
examined for findings. ``check_row`` keeps no state: the same row checked twice gives the same
findings."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stagemesh.checksum import chain_next
from stagemesh.errors import TokenRejected
from stagemesh.frame import RowStatus, StepRow
from stagemesh.guards import Counters
from stagemesh.token import TokenChunk, ValidationStatus
from stagemesh.topology import COORDINATOR_HOP, WorkerName

LOGPROB_MAX = 0.125
"""A log probability is at most 0; low-precision sums of exponentials overshoot it by less than
this."""


class Corruption(enum.Enum):
    """What kind of wrong. ``stagemesh.guards.CORRUPTIONS`` lists the same values for the
    counters."""

    ENCODING = "encoding"
    """A field cannot be what it says: an id outside the vocabulary, a length or number out of
    range."""
    ORDERING = "ordering"
    """A true item in the wrong place: other position, step or epoch, other history behind it."""
    DUPLICATION = "duplication"
    """Again what was there already: a token repeated, a step applied twice to a cache."""
    LOSS = "loss"
    """Something that should be there is not: a token, a mark, cached positions."""
    TRANSFER = "transfer"
    """Changed or relabelled on its way: checksum, request or source differ."""
    NUMERIC = "numeric"
    """A number no forward pass may yield: not finite, out of its range or of its envelope."""
    SEMANTIC_SUSPICION = "semantic_suspicion"
    """A reference would not have chosen this token. The only class that can be about legal
    output."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong. ``hop_from`` → ``hop_to`` are stage indices (-1 coordinator): where it was
    seen."""

    corruption: Corruption
    hop_from: int
    hop_to: int
    worker: str
    request: bytes
    position: int
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.corruption.value} stage {self.hop_from}→{self.hop_to} worker={self.worker} "
            f"req={self.request.hex()[:4]} pos={self.position}: {self.detail}"
        )

    def attributes(self) -> dict[str, str]:
        """As event attributes."""
        return {
            "corruption": self.corruption.value,
            "hop_from": str(self.hop_from),
            "hop_to": str(self.hop_to),
            "worker": self.worker,
            "position": str(self.position),
            "detail": self.detail,
        }


class ExpectedRow(NamedTuple):
    """What the coordinator knows of a row before it returns.

    ``end_position``: cache length of every stage behind it, and the position of the token if it
    ``samples``. ``end_digest``: rolling history digest of all ids up to there. ``previous_chain``:
    chain digest behind the token before. ``stages``: names in stage order."""

    request: bytes
    epoch: int
    step: int
    first_position: int
    end_position: int
    end_digest: int
    samples: bool
    previous_chain: bytes
    stages: tuple[WorkerName, ...]


_BY_STATUS = {
    RowStatus.POSITION_MISMATCH: Corruption.ORDERING,
    RowStatus.CACHE_LOST: Corruption.LOSS,
    RowStatus.CACHE_EXHAUSTED: Corruption.LOSS,
    RowStatus.NON_FINITE: Corruption.NUMERIC,
    RowStatus.OUT_OF_ENVELOPE: Corruption.NUMERIC,
    RowStatus.CORRUPTED: Corruption.TRANSFER,
    RowStatus.COMPUTE_FAILED: Corruption.LOSS,
    RowStatus.INVALID: Corruption.ENCODING,
}


class TokenValidator:
    """Checks rows and tokens of one model. ``vocab_size``: token ids are below it."""

    def __init__(self, vocab_size: int, *, counters: Counters | None = None) -> None:
        self.vocab_size = vocab_size
        self.counters = Counters() if counters is None else counters

    def check_row(self, row: StepRow, expected: ExpectedRow) -> tuple[Finding, ...]:
        """Everything wrong with a returned row, in the order of the stages; empty if it is as it
        must be.

        A row that a stage marked as failed is reported as such; its token, if any, is never good.
        """
        self.counters.count("tokens_checked" if expected.samples else "marks_checked")
        if self._row_fits(row, expected) and (
            not expected.samples or (row.token is not None and self._token_fits(row, expected))
        ):
            return ()
        findings = _examine_row(row, expected)
        if not findings and row.token is not None:
            findings = self._examine_token(row.token, row, expected)
        return self.counted(tuple(findings))

    def require(self, row: StepRow, expected: ExpectedRow) -> None:
        """``check_row``, or raise TokenRejected with the findings."""
        findings = self.check_row(row, expected)
        if findings:
            raise rejection(findings)

    def counted(self, findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        """Count findings by class; returns them."""
        for finding in findings:
            self.counters.count(f"tokens_rejected.{finding.corruption.value}")
        return findings

    def _row_fits(self, row: StepRow, expected: ExpectedRow) -> bool:
        end, digest = expected.end_position, expected.end_digest
        if (
            row.request != expected.request
            or row.first_position != expected.first_position
            or row.first_position + len(row.token_ids) != end
            or row.status is not RowStatus.OK
            or row.samples is not expected.samples
            or (row.token is not None) is not expected.samples
            or len(row.marks) != len(expected.stages)
        ):
            return False
        for mark in row.marks:  # a generator would double the cost of the usual way
            if mark.cache_length != end or mark.history_digest != digest:
                return False
        return True

    def _token_fits(self, row: StepRow, expected: ExpectedRow) -> bool:
        token = row.token
        if token is None:
            return False
        return (
            token.position == expected.end_position
            and token.request == expected.request
            and token.epoch == expected.epoch
            and token.step == expected.step
            and token.status is ValidationStatus.UNVERIFIED
            and token.token_id < self.vocab_size
            and math.isfinite(token.margin)
            and token.margin >= 0.0
            and math.isfinite(token.logprob)
            and token.logprob <= LOGPROB_MAX
            and not token.alternatives
            and (not token.marks or token.marks == row.marks)
            and token.source == expected.stages[-1]
            and _seal_holds(token)
            and chain_next(expected.previous_chain, token.position, token.token_id) == token.chain
        )

    def _examine_token(
        self, token: TokenChunk, row: StepRow, expected: ExpectedRow
    ) -> list[Finding]:
        """Findings on the token alone; the worst first. Empty: legal (alternatives took the long
        way)."""
        problems = list(_identity_problems(token, expected))
        if not problems:
            problems = [*self._value_problems(token), *_link_problems(token, row, expected)]
        last = len(expected.stages) - 1
        return [
            _finding(kind, expected, last, COORDINATOR_HOP, detail, position=token.position)
            for kind, detail in problems
        ]

    def _value_problems(self, token: TokenChunk) -> list[tuple[Corruption, str]]:
        problems = []
        ids = (token.token_id, *(token_id for token_id, _ in token.alternatives))
        if any(not 0 <= token_id < self.vocab_size for token_id in ids):
            said = f"token id {token.token_id} of {self.vocab_size} (or an alternative's)"
            problems.append((Corruption.ENCODING, said))
        values = (token.logprob, token.margin, *(value for _, value in token.alternatives))
        if not all(math.isfinite(value) for value in values):
            problems.append((Corruption.NUMERIC, "logprob or margin is not finite"))
        elif token.margin < 0.0 or token.logprob > LOGPROB_MAX:
            said = f"margin {token.margin} is negative or logprob {token.logprob} positive"
            problems.append((Corruption.NUMERIC, said))
        return problems


def rejection(findings: Sequence[Finding]) -> TokenRejected:
    """The error that carries ``findings``, which must not be empty; its metadata is the first
    one's."""
    first = findings[0]
    return TokenRejected(
        first.detail,
        findings=tuple(findings),
        corruption=first.corruption.value,
        worker=first.worker,
        hop=f"{first.hop_from}→{first.hop_to}",
        request=first.request.hex(),
        position=first.position,
    )


def _seal_holds(token: TokenChunk) -> bool:
    """The checksum matches; False also for a token whose fields do not even fit their places."""
    try:
        return token.checksum_holds()
    except TokenRejected:
        return False


def _finding(
    kind: Corruption,
    expected: ExpectedRow,
    hop_from: int,
    hop_to: int,
    detail: str,
    *,
    position: int | None = None,
) -> Finding:
    """A finding on the hop; blamed on the stage that wrote what is wrong (``hop_from``)."""
    worker = expected.stages[hop_from] if 0 <= hop_from < len(expected.stages) else "coordinator"
    at = expected.end_position if position is None else position
    return Finding(kind, hop_from, hop_to, worker, expected.request, at, detail)


def _examine_row(row: StepRow, expected: ExpectedRow) -> list[Finding]:
    """Findings on labels, status and marks of a row."""
    last = len(expected.stages) - 1
    if row.request != expected.request:
        said = f"row of request {row.request.hex()[:8]} in the place of another"
        return [_finding(Corruption.TRANSFER, expected, last, COORDINATOR_HOP, said)]
    if row.status is not RowStatus.OK:
        kind = _BY_STATUS[row.status]
        stage = row.fault_stage if 0 <= row.fault_stage <= last else last
        said = f"{row.status.name.lower()}: {row.fault_detail}"
        return [_finding(kind, expected, stage, stage + 1 if stage < last else -1, said)]
    if row.first_position != expected.first_position or row.end_position != expected.end_position:
        said = (
            f"row covers {row.first_position}-{row.end_position}, "
            f"expected {expected.first_position}-{expected.end_position}"
        )
        return [_finding(Corruption.ORDERING, expected, last, COORDINATOR_HOP, said)]
    findings = _examine_marks(row, expected)
    if not findings and expected.samples and row.token is None:
        findings = [_finding(Corruption.LOSS, expected, last, COORDINATOR_HOP, "no token")]
    if not findings and row.samples is not expected.samples:
        said = "the row's samples flag changed"
        findings = [_finding(Corruption.TRANSFER, expected, last, COORDINATOR_HOP, said)]
    if not findings and row.token is not None and not expected.samples:
        said = "a token nobody asked for"
        findings = [_finding(Corruption.DUPLICATION, expected, last, COORDINATOR_HOP, said)]
    return findings


def _examine_marks(row: StepRow, expected: ExpectedRow) -> list[Finding]:
    """Findings on the stages' accounts; the first is where it went wrong."""
    last = len(expected.stages) - 1
    if len(row.marks) != len(expected.stages):
        few = len(row.marks) < len(expected.stages)
        stage = min(len(row.marks), last)
        said = f"{len(row.marks)} marks of {len(expected.stages)} stages"
        kind = Corruption.LOSS if few else Corruption.DUPLICATION
        return [_finding(kind, expected, stage, COORDINATOR_HOP, said)]
    findings = []
    for stage, mark in enumerate(row.marks):
        if mark.cache_length != expected.end_position:
            short = mark.cache_length < expected.end_position
            said = f"cache holds {mark.cache_length} positions, expected {expected.end_position}"
            kind = Corruption.LOSS if short else Corruption.DUPLICATION
        elif mark.history_digest != expected.end_digest:
            said = (
                f"history digest {mark.history_digest:08x}, expected {expected.end_digest:08x}: "
                "it consumed other tokens, or in another order"
            )
            kind = Corruption.ORDERING
        else:
            continue
        hop_to = stage + 1 if stage < last else COORDINATOR_HOP
        findings.append(_finding(kind, expected, stage, hop_to, said))
    return findings


def _identity_problems(token: TokenChunk, expected: ExpectedRow) -> list[tuple[Corruption, str]]:
    """Whether it is the token it claims to be, and the one asked for. At most one problem."""
    try:
        if not token.checksum_holds():
            return [(Corruption.TRANSFER, "token checksum does not match")]
    except TokenRejected as error:
        return [(Corruption.ENCODING, str(error))]
    if token.request != expected.request:
        return [(Corruption.TRANSFER, f"token of request {token.request.hex()[:8]}")]
    if token.source != expected.stages[-1]:
        return [(Corruption.TRANSFER, f"token of worker {token.source!r}")]
    if token.status is not ValidationStatus.UNVERIFIED:
        return [(Corruption.TRANSFER, f"token arrived as {token.status.name}")]
    if token.epoch != expected.epoch or token.step != expected.step:
        said = f"token of epoch {token.epoch} step {token.step}, expected {expected.epoch}"
        return [(Corruption.ORDERING, f"{said} step {expected.step}")]
    if token.position != expected.end_position:
        repeated = token.position < expected.end_position
        said = f"token for position {token.position}, expected {expected.end_position}"
        return [(Corruption.DUPLICATION if repeated else Corruption.LOSS, said)]
    return []


def _link_problems(
    token: TokenChunk, row: StepRow, expected: ExpectedRow
) -> list[tuple[Corruption, str]]:
    """Whether it continues what was accepted before."""
    problems = []
    if chain_next(expected.previous_chain, token.position, token.token_id) != token.chain:
        problems.append((Corruption.ORDERING, "token chain does not continue the accepted one"))
    if token.marks and token.marks != row.marks:
        problems.append((Corruption.TRANSFER, "the token's marks are not the row's"))
    return problems
