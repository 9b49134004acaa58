"""What a journal's file holds, as far as writing needs to know it, and what one commit makes of it.

``Contents.plan`` turns records that are to be written into a ``Batch``: the rows and records of one
transaction, what has to be retired to stay within the limits, and the digest of everything that is
then there. ``apply`` takes the batch over once the file has it; a batch that was never committed
changes nothing here. No I/O: see ``journal_store`` for the file.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.journal_rows import Row
from stagemesh.errors import JournalError

RETIRED_PER_COMMIT_MAX = 64
_DIGEST_MODULUS = 1 << 256


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """What is kept. Beyond any of these the oldest ended generations are retired; what runs never
    is."""

    generations_max: int = 10_000
    bytes_max: int = 256 << 20
    age_s_max: float = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Write:
    """One record for one generation; its place is the end of what is there. ``resumes``: it goes
    on, although it may have ended."""

    request: bytes
    body: bytes
    begins: bool = False
    ends: bool = False
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction. ``fresh``: of ``touched``, those not in the file yet. ``records``:
    (generation, number, body). ``over``: retired, the oldest of ``ended`` and then of what ends
    with this batch; ``ended``: the others that had ended before it."""

    fresh: list[Row]
    touched: list[Row]
    records: list[tuple[int, int, bytes]]
    over: list[Row]
    ended: deque[Row]
    digest: int
    next_id: int
    size: int


@dataclass(slots=True)
class Contents:
    """See the module. ``digest``: of all generations together."""

    next_id: int = 1
    digest: int = 0
    size: int = 0
    reserved_epoch: int = 0
    running: dict[bytes, Row] = field(default_factory=dict)
    ended: deque[Row] = field(default_factory=deque)
    """Oldest first."""
    ended_requests: set[bytes] = field(default_factory=set)

    def load(self, row: Row) -> None:
        """A row that is in the file; ended ones in the order in which they ended."""
        self.next_id = max(self.next_id, row.id + 1)
        self.size += row.size
        if row.ended:
            self.ended.append(row)
            self.ended_requests.add(row.request)
        else:
            self.running[row.request] = row

    @property
    def rows(self) -> Iterable[Row]:
        return itertools.chain(self.running.values(), self.ended)

    @property
    def adds_up(self) -> bool:
        """Whether ``digest`` is that of the rows."""
        return sum(row.digest for row in self.rows) % _DIGEST_MODULUS == self.digest

    def holds(self, request: bytes) -> bool:
        return request in self.running or request in self.ended_requests

    def plan(self, writes: Sequence[Write], limits: JournalLimits, *, wall_ns: int) -> Batch:
        """All of ``writes`` appended, and what is over a limit retired. Changes nothing.

        Raises JournalError: a request is not known or has ended (or, where it should begin, is
        begun twice).
        """
        touched: dict[bytes, Row] = {}
        fresh: list[Row] = []
        records: list[tuple[int, int, bytes]] = []
        digest, size, next_id = self.digest, self.size, self.next_id
        for one in writes:
            row = touched.get(one.request)
            if row is None:
                row = touched[one.request] = self._row_for(one, next_id)
                if one.begins:
                    next_id += 1
                    fresh.append(row)
                else:
                    digest -= row.digest
                    size -= row.size
            elif one.begins or (row.ended and not one.resumes):
                raise JournalError("a record where none belongs", request_id=one.request.hex())
            if one.resumes:
                row.ended, row.ended_unix_ns = False, 0
            records.append((row.id, row.records, one.body))
            row.append(one.body)
            if one.ends:
                row.ended, row.ended_unix_ns = True, wall_ns
        rows = list(touched.values())
        digest += sum(row.digest for row in rows)
        size += sum(row.size for row in rows)
        ended = self.ended
        if any(one.resumes for one in writes):
            ended = deque(row for row in ended if row.request not in touched)
        ending = [row for row in rows if row.ended]
        over = _over_limits(limits, ended, ending, size, wall_ns)
        digest -= sum(row.digest for row in over)
        size -= sum(row.size for row in over)
        return Batch(fresh, rows, records, over, ended, digest % _DIGEST_MODULUS, next_id, size)

    def _row_for(self, one: Write, next_id: int) -> Row:
        known = self.running.get(one.request)
        if one.begins:
            return Row(next_id, one.request)
        if one.resumes and known is None:
            known = next((row for row in self.ended if row.request == one.request), None)
        if known is None:
            raise JournalError("a record of an unknown generation", request_id=one.request.hex())
        return known.copy()

    def apply(self, batch: Batch) -> None:
        """The file holds what was planned."""
        self.digest, self.next_id, self.size = batch.digest, batch.next_id, batch.size
        self.ended = batch.ended
        for row in batch.touched:
            self.running[row.request] = row
            self.ended_requests.discard(row.request)
            if row.ended:
                del self.running[row.request]
                self.ended.append(row)
                self.ended_requests.add(row.request)
        for _ in batch.over:
            self.ended_requests.discard(self.ended.popleft().request)


def _over_limits(
    limits: JournalLimits, ended: deque[Row], ending: Sequence[Row], size: int, wall_ns: int
) -> list[Row]:
    """The oldest ended generations, as many as have to go (a bounded number at a time)."""
    over: list[Row] = []
    count = len(ended) + len(ending)
    oldest_ns = wall_ns - int(limits.age_s_max * 1e9)
    for row in itertools.chain(ended, ending):
        fits = count <= limits.generations_max and size <= limits.bytes_max
        if (fits and row.ended_unix_ns >= oldest_ns) or len(over) >= RETIRED_PER_COMMIT_MAX:
            return over
        over.append(row)
        count -= 1
        size -= row.size
    return over
