"""What a journal's file holds, as far as writing needs to know it, and what one commit makes of it.

``Contents.plan`` turns records that are to be written into a ``Batch``: one row of the log, the
generations that end with it and get a row of their own, what has to be retired to stay within the
limits, and the digest of all rows that are then there. ``Contents.folded`` makes of it a commit
after which the log is empty: what still runs gets rows as well. ``apply`` takes a batch over once
the file has it; a batch that was never committed changes nothing here. ``replay`` is the way back:
a row of the log, read again. No I/O: see ``journal_store`` for the file.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from services.journal_rows import Row
from stagemesh.errors import JournalError
from stagemesh.token import REQUEST_BYTES

RETIRED_PER_COMMIT_MAX = 64
LOG_ROW_OVERHEAD_BYTES = 64
"""What a row of the log costs in the file beyond its entries, about."""
_DIGEST_MODULUS = 1 << 256
_ENTRY = struct.Struct("<QQIB")
"""Generation, number of the record, its length, flags; then the request of one that begins, then
the record."""
_PLACE = struct.Struct("<Qq")
_BEGINS, _RESUMES, _RETIRED = 1, 4, 8
"""An end needs none: its generation has a row, or is retired further on."""


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

    @property
    def flags(self) -> int:
        return self.begins * _BEGINS | self.resumes * _RESUMES


@dataclass(frozen=True, slots=True)
class LogRow:
    """A row of the log. ``digest``: ``log_digest`` of it and the one before."""

    number: int
    wall_ns: int
    entries: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """One transaction. ``log``: its row of the log; None: the log is emptied instead. ``saves``:
    rows that have to be in the file as they are now; ``added``: records that ``touched`` get behind
    those they have. ``over``: retired, the oldest of ``ended`` and then of what ends with this
    batch; ``ended``: the others that had ended before it."""

    log: LogRow | None
    touched: list[Row]
    added: dict[bytes, list[bytes]]
    saves: list[Row]
    over: list[Row]
    ended: deque[Row]
    digest: int
    next_id: int
    size: int

    def bodies(self, row: Row) -> list[bytes]:
        """All records of a touched or saved row, this batch's as well."""
        return [*row.bodies, *self.added.get(row.request, ())]


@dataclass(slots=True)
class Contents:
    """See the module. ``digest``: of all rows of generations together; ``log_number`` and
    ``log_digest``: of the last row of the log."""

    next_id: int = 1
    digest: int = 0
    size: int = 0
    reserved_epoch: int = 0
    log_number: int = 0
    log_digest: bytes = bytes(32)
    log_bytes: int = 0
    running: dict[bytes, Row] = field(default_factory=dict)
    """With their records."""
    ended: deque[Row] = field(default_factory=deque)
    """Oldest first; their records are in the file only."""
    ended_requests: set[bytes] = field(default_factory=set)

    def load(self, row: Row) -> None:
        """A row that is in the file, or what the log made of it; ended ones in the order in which
        they ended."""
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
        """Whether ``digest`` is that of the rows in the file."""
        return sum(row.saved for row in self.rows) % _DIGEST_MODULUS == self.digest

    @property
    def running_bytes(self) -> int:
        """What the records of everything that runs take."""
        return sum(row.size for row in self.running.values())

    def holds(self, request: bytes) -> bool:
        return request in self.running or request in self.ended_requests

    def ended_row(self, request: bytes) -> Row | None:
        """The row of a generation that has ended."""
        if request not in self.ended_requests:
            return None
        return next((row for row in self.ended if row.request == request), None)

    def plan(self, writes: Sequence[Write], limits: JournalLimits, *, wall_ns: int) -> Batch:
        """All of ``writes`` appended, and what is over a limit retired. Changes nothing. Whoever
        resumes an ended generation has given its row its records before.

        Raises JournalError: a request is not known or has ended (or, where it should begin, is
        known).
        """
        touched: dict[bytes, Row] = {}
        added: dict[bytes, list[bytes]] = {}
        entries: list[bytes] = []
        size, next_id, resumed = self.size, self.next_id, False
        for one in writes:
            row = touched.get(one.request)
            if row is None:
                row = touched[one.request] = self._row_for(one, next_id)
                added[one.request] = []
                next_id += one.begins
                size -= row.size
            elif one.begins or (row.ended and not one.resumes):
                raise JournalError("a record where none belongs", request_id=one.request.hex())
            if one.resumes:
                resumed, row.ended, row.ended_unix_ns = True, False, 0
            entries += (
                _ENTRY.pack(row.id, row.records, len(one.body), one.flags),
                one.request if one.begins else b"",
                one.body,
            )
            row.append(one.body)
            added[one.request].append(one.body)
            if one.ends:
                row.ended, row.ended_unix_ns = True, wall_ns
        rows = list(touched.values())
        size += sum(row.size for row in rows)
        ended = self.ended
        if resumed:
            ended = deque(row for row in ended if row.request not in touched)
        ending = [row for row in rows if row.ended]
        over = _over_limits(limits, ended, ending, size, wall_ns)
        size -= sum(row.size for row in over)
        gone = {row.id for row in over}
        entries += (_ENTRY.pack(row.id, 0, 0, _RETIRED) for row in over)
        saves = [row for row in ending if row.id not in gone]
        log = self._next_log_row(b"".join(entries), wall_ns)
        digest = self._digest(saves, over)
        return Batch(log, rows, added, saves, over, ended, digest, next_id, size)

    def folded(self, batch: Batch) -> Batch:
        """The same, and the log is empty behind it: whatever runs gets a row."""
        changed = {row.request for row in batch.touched}
        running = [row for row in self.running.values() if row.request not in changed]
        running += [row for row in batch.touched if not row.ended]
        saves = batch.saves + [row for row in running if row.digest != row.saved]
        return replace(batch, log=None, saves=saves, digest=self._digest(saves, batch.over))

    def note_log(self, row: LogRow) -> None:
        """It is the log's last row now."""
        self.log_number, self.log_digest = row.number, row.digest
        self.log_bytes += len(row.entries) + LOG_ROW_OVERHEAD_BYTES

    def _next_log_row(self, entries: bytes, wall_ns: int) -> LogRow:
        number = self.log_number + 1
        return LogRow(
            number, wall_ns, entries, log_digest(self.log_digest, number, wall_ns, entries)
        )

    def _digest(self, saves: Sequence[Row], over: Sequence[Row]) -> int:
        if not saves and not over:
            return self.digest
        digest = self.digest - sum(row.saved for row in itertools.chain(saves, over))
        return (digest + sum(row.digest for row in saves)) % _DIGEST_MODULUS

    def _row_for(self, one: Write, next_id: int) -> Row:
        known = self.running.get(one.request)
        if one.begins:
            if known is not None or one.request in self.ended_requests:
                raise JournalError("a generation begins twice", request_id=one.request.hex())
            return Row(next_id, one.request)
        if one.resumes and known is None:
            known = self.ended_row(one.request)
        if known is None:
            raise JournalError("a record of an unknown generation", request_id=one.request.hex())
        return known.copy()

    def apply(self, batch: Batch) -> None:
        """The file holds what was planned."""
        self.digest, self.next_id, self.size = batch.digest, batch.next_id, batch.size
        self.ended = batch.ended
        if batch.log is None:
            self.log_bytes = 0
        else:
            self.note_log(batch.log)
        for row in batch.saves:
            row.saved = row.digest
        for row in batch.touched:
            row.bodies += batch.added[row.request]
            self.running[row.request] = row
            self.ended_requests.discard(row.request)
            if row.ended:
                del self.running[row.request]
                row.bodies = []
                self.ended.append(row)
                self.ended_requests.add(row.request)
        for _ in batch.over:
            self.ended_requests.discard(self.ended.popleft().request)


class Replay:
    """What the log makes of ``rows``, the saved ones by generation. ``fetch`` gives the records of
    one that has ended."""

    def __init__(self, rows: dict[int, Row], fetch: Callable[[Row], list[bytes]]) -> None:
        self.rows = rows
        self.last_id = max(rows, default=0)
        """The highest that was ever given: the log may speak of what is gone."""
        self._fetch = fetch
        self._lost: set[int] = set()
        """Generations that the log speaks of and has to retire."""

    def add(self, entries: bytes) -> None:
        """One row of the log, verified. Raises JournalError."""
        for generation, number, flags, request, body in _parsed(entries):
            self.last_id = max(self.last_id, generation)
            if flags & _RETIRED:
                self.rows.pop(generation, None)
                self._lost.discard(generation)
            else:
                self._record(generation, number, flags, request, body)

    def _record(
        self, generation: int, number: int, flags: int, request: bytes, body: bytes
    ) -> None:
        row = self.rows.get(generation)
        if row is None and flags & _BEGINS:
            row = self.rows[generation] = Row(generation, request)
        if row is None:
            self._lost.add(generation)
        elif number > row.records:
            raise JournalError("the journal is damaged: its log has a gap")
        elif number == row.records:
            if flags & _RESUMES and row.ended:
                row.bodies = self._fetch(row)
                row.ended, row.ended_unix_ns = False, 0
            row.append(body)
            row.bodies.append(body)

    def close(self) -> None:
        """Raise JournalError if the log speaks of generations that are nowhere."""
        if self._lost:
            raise JournalError("the journal is damaged: a generation of its log is missing")


def _parsed(entries: bytes) -> Iterator[tuple[int, int, int, bytes, bytes]]:
    at = 0
    while at < len(entries):
        generation, number, length, flags = _ENTRY.unpack_from(entries, at)
        at += _ENTRY.size
        request = entries[at : at + REQUEST_BYTES] if flags & _BEGINS else b""
        at += len(request)
        yield generation, number, flags, request, entries[at : at + length]
        at += length


def log_digest(before: bytes, number: int, wall_ns: int, entries: bytes) -> bytes:
    """The log's chain: the next link (32 bytes)."""
    return hashlib.sha256(before + _PLACE.pack(number, wall_ns) + entries).digest()


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
