"""Shadow verification of one request: a full worker consumes what was accepted, behind the stream.

A *shadow* is a request's second life on a full worker's route. Its cache there is fed from the same
tokens the client gets: the prompt as PREFILL rows, then the accepted tokens as SCORE rows of at
most ``chunk`` tokens, whose answers say what the full worker would have chosen at each place. So
verification costs a prefill of the answer, not a second generation, and when the request itself has
to move, its cache is already there.

    fed        positions sent to the full worker
    held       positions that it has confirmed to hold
    verified   answer tokens its scores agree with (kept by the request's own stream)

One row of a shadow is under way at a time. ``taking_over`` is the last stage of a shadow's life:
the request has lost its route and goes on here, once everything accepted so far has been scored.

*Evidence*: every accepted token came with a mark of each stage, and so with the checksum of the
activation each stage sent on. A SCORE row brings back the full worker's checksums at the same layer
boundaries. Where kernels are bit-exact the first boundary that differs names the stage that
computed wrongly, without computing anything again (``Lines``). Where they are not, it takes an
examination (``examiner``).

Pure: nothing here acts.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.session import Session
from stagemesh.checksum import chain_start, history_digest
from stagemesh.errors import VerificationUnavailable
from stagemesh.frame import BoundaryDigest, FrameKind, StepRow
from stagemesh.sampling import RowOpening
from stagemesh.token import StageMark
from stagemesh.topology import WorkerInfo

SHADOW_MISMATCH = "SHADOW_MISMATCH"
"""Cause of the recovery that a rejected token begins."""
LINES_KEPT_MAX = 4096
"""Positions of one request whose marks wait to be compared."""


class Why(enum.Enum):
    """Why a request is shadowed. Only what was ASKED for may delay an answer."""

    ASKED = "asked"
    NEW_ROUTE = "new_route"
    RECOVERED = "recovered"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True)
class Line:
    """Who computed the activation of one position alone, and what each stage said of it."""

    workers: tuple[WorkerInfo, ...]
    marks: tuple[StageMark, ...]
    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Difference:
    """The first boundary at which a stage's activation was not the reference's."""

    position: int
    worker: str
    epoch: int
    step: int


@dataclass(slots=True)
class Lines:
    """The two accounts of each position, compared as soon as both are there. For bit-exact kernels.

    ``first``: the earliest difference seen. ``compared``: the highest position compared."""

    first: Difference | None = None
    compared: int = -1
    _ours: dict[int, Line] = field(default_factory=dict)
    _theirs: dict[int, dict[int, int]] = field(default_factory=dict)

    def note_line(self, position: int, line: Line) -> None:
        """A route computed the line at ``position`` by itself (a row of one token)."""
        while len(self._ours) >= LINES_KEPT_MAX:
            del self._ours[next(iter(self._ours))]
        self._ours[position] = line
        self._compare(position)

    def note_digests(self, digests: Iterable[BoundaryDigest]) -> None:
        """The reference's account of some positions."""
        touched: dict[int, None] = {}
        for digest in digests:
            self._theirs.setdefault(digest.position, {})[digest.layer] = digest.crc32c
            touched[digest.position] = None
        for position in touched:
            self._compare(position)

    def forget_before(self, position: int) -> None:
        """Positions below are settled."""
        for kept in (self._ours, self._theirs):
            for old in [at for at in kept if at < position]:
                del kept[old]

    def withdraw(self, position: int) -> None:
        """Tokens from ``position`` on are computed anew."""
        self.first = None
        self.compared = min(self.compared, position - 1)
        for kept in (self._ours, self._theirs):
            for gone in [at for at in kept if at >= position]:
                del kept[gone]

    def last_line(self, position: int) -> Line | None:
        return self._ours.get(position)

    def _compare(self, position: int) -> None:
        line, reference = self._ours.get(position), self._theirs.get(position)
        if line is None or not reference:
            return
        self.compared = max(self.compared, position)
        if self.first is not None and self.first.position <= position:
            return
        for worker, mark in zip(line.workers[:-1], line.marks, strict=False):
            theirs = reference.get(worker.span.last)
            if theirs is not None and theirs != mark.output_crc32c:
                self.first = Difference(position, worker.name, line.epoch, line.step)
                return


@dataclass(slots=True, eq=False)
class Shadow:
    """See the module. ``epoch`` is the full worker's route; ``ended``: its rows say nothing any
    more."""

    session: Session
    epoch: int
    why: Why
    lines: Lines = field(default_factory=Lines)
    fed: int = 0
    held: int = 0
    digest: int = 0
    attempt: int = 0
    in_flight: bool = False
    taking_over: bool = False
    taken_at: int = 0
    restarts: int = 0
    ended: bool = False
    reserve_tokens: int = 0
    boundaries: tuple[int, ...] = ()
    """Layers behind which the full worker is asked for digests; none where they could not be
    compared."""

    def __post_init__(self) -> None:
        self.reserve_tokens = self.session.reserve_tokens

    @property
    def request(self) -> bytes:
        return self.session.request

    @property
    def limit(self) -> int:
        """Position up to which (exclusive) tokens have to be scored."""
        session = self.session
        if session.kept is None:
            return session.stream.next_position
        return min(session.prompt_length + session.kept, session.stream.next_position)

    @property
    def is_urgent(self) -> bool:
        """A client waits for this: as good as live work."""
        return self.taking_over

    @property
    def is_asked(self) -> bool:
        """The client asked for it."""
        return self.why is Why.ASKED

    @property
    def is_done(self) -> bool:
        """Everything there is has been scored."""
        return not self.in_flight and self.held >= max(self.limit, self.session.prompt_length)

    def is_due(self, chunk: int) -> bool:
        """Whether a row should go out: a whole chunk, or the rest of what is complete."""
        if self.in_flight or self.ended:
            return False
        if self.fed < self.session.prompt_length:
            return True
        left = self.limit - self.fed
        return left >= chunk or (left > 0 and (self.taking_over or not self.session.may_grow))

    def next_row(self, *, chunk: int, prefill_chunk: int) -> tuple[FrameKind, StepRow]:
        """The next piece of the prompt, or the next tokens to be scored; it is then under way."""
        session, first = self.session, self.fed
        if first < session.prompt_length:
            kind, last = FrameKind.PREFILL, min(session.prompt_length, first + prefill_chunk)
        else:
            # What a takeover waits for may be long: as large pieces as a prefill's.
            size = prefill_chunk if self.taking_over else chunk
            kind, last = FrameKind.SCORE, min(self.limit, first + max(size, chunk))
        token_ids = session.stream.tokens(first, last)
        opening = None
        if first == 0:
            prompt = session.demand.prompt
            opening = RowOpening(
                sampling=session.demand.sampling,
                prompt_length=len(prompt),
                chain=chain_start(session.request, prompt),
                reserve_tokens=self.reserve_tokens,
            )
        self.fed, self.in_flight = last, True
        self.digest = history_digest(token_ids, self.digest)
        return kind, StepRow(
            request=session.request,
            first_position=first,
            token_ids=token_ids,
            opening=opening,
            boundaries=self.boundaries if kind is FrameKind.SCORE else (),
        )

    def marks_fit(self, marks: Sequence[StageMark], end: int) -> bool:
        """Whether the full worker holds what it was given."""
        return [(m.cache_length, m.history_digest) for m in marks] == [(end, self.digest)]

    def start_over(self) -> None:
        """Its cache is lost: everything is fed again."""
        self.attempt += 1
        self.restarts += 1
        self.fed = self.held = self.digest = 0
        self.in_flight = False


def unavailable(position: int) -> VerificationUnavailable:
    """No full worker could confirm the answer in time."""
    return VerificationUnavailable(
        "no full worker could verify the answer in time", position=position
    )
