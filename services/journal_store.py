"""What a journal's file says: records in transactions, and digests over everything there is.

A commit is a row of the log, which holds the records of all generations that it is about. A
generation that ends gets a row of its own with all of its records, and the log is emptied now and
then by giving one to whatever still runs (``fold``): when it has grown longer than everything that
runs, when there is nothing else to do, and when the file is closed. Until then what runs is in the
log and in memory; a coordinator that died is followed by one that replays the log.

Each generation's records are chained (``journal_rows``), the log's rows are chained
(``journal_contents``), and ``meta`` holds the sum of a digest over each generation's row. All of it
is verified when the file is opened, and an ended generation again when it is read: what does not
verify is JournalError, never an answer. (A damaged tail of SQLite's own write-ahead log is
different: SQLite takes it for a write that was not finished, and the journal is then what it was
some commits earlier, which is a state it has been in. So is one whose log lost its last rows.)

One thread at a time writes; ``read`` opens its own connection and may be called from any thread.
What a transaction does is planned by ``journal_contents``; one that fails changes nothing, in the
file or here. ``journal_file`` is the file itself: its tables, its owner, SQLite's log.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from services.journal_contents import (
    Batch,
    Contents,
    JournalLimits,
    LogRow,
    Replay,
    Write,
    log_digest,
)
from services.journal_file import FILE_FACTOR, JournalFile, unusable
from services.journal_rows import (
    Row,
    StoredGeneration,
    check_chain,
    epoch_bytes,
    epoch_of,
    joined,
    log_place,
    log_place_of,
    row_of,
    split,
    verified,
)
from stagemesh.errors import InvalidConfiguration, JournalError

LOG_BYTES_IDLE = 1 << 19
"""A log longer than this is emptied when there is nothing else to do."""
LOG_BYTES_MAX = 16 << 20
"""One longer than this, and than everything that runs, is emptied in the middle of work. Tokens
wait for that, some 50 ms where 256 streams run, so it should be rare; a coordinator that died
leaves as much to replay."""
EPOCH_BLOCK = 1024
"""Epochs are reserved in blocks, so that opening a route never waits for the journal."""

_ROWS = "SELECT id, request, records, bytes, head, ended, ended_unix_ns, bodies FROM generations"
_APPEND = "INSERT INTO log VALUES (?, ?, ?, ?)"


class JournalStore:
    """See the module. Made by ``open``; ``close`` it."""

    def __init__(self, path: Path, limits: JournalLimits, *, wall_ns: int) -> None:
        self.path = path
        self.limits = limits
        self.first_epoch = 1
        """Above every epoch that an earlier owner may have used."""
        self.commits = 0
        self.retired = 0
        self._contents = Contents()
        self._stale = False
        self.file = JournalFile(path)
        self._connection = self.file.connection
        self._opened_ns = wall_ns

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        model: str,
        wall_ns: int,
        limits: JournalLimits | None = None,
        full_sync: bool = False,
    ) -> Self:
        """Open or make the journal of ``model`` (its identity) and verify every byte of it.

        Raises InvalidConfiguration (cannot be opened, in use, another model's), JournalError
        (damaged, full, not a journal).
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            store = cls(path, limits or JournalLimits(), wall_ns=wall_ns)
        except (OSError, sqlite3.Error) as error:
            raise InvalidConfiguration(
                f"the journal {path} cannot be opened: {error}", setting="journal"
            ) from None
        try:
            store._prepare(model, full_sync=full_sync)
        except (sqlite3.Error, UnicodeError) as error:
            store.close()
            raise JournalError(unusable(path, error)) from None
        except BaseException:
            store.close()
            raise
        return store

    # -- facts ----------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Generations that have not ended."""
        return len(self._contents.running)

    @property
    def ended(self) -> int:
        """Ended generations that are kept."""
        return len(self._contents.ended)

    @property
    def size(self) -> int:
        """What all records take, about."""
        return self._contents.size

    def holds(self, request: bytes) -> bool:
        """Whether a generation is (likely still) in the file; costs nothing. From any thread."""
        return self._contents.holds(request)

    def is_crowded_by(self, request: bytes) -> bool:
        """Whether a generation runs in a file that holds more than it may: once it has ended, it
        can be retired."""
        return self.size > self.limits.bytes_max and request in self._contents.running

    # -- opening --------------------------------------------------------------------------------

    def _prepare(self, model: str, *, full_sync: bool) -> None:
        self.file.prepare(model, bytes_max=self.limits.bytes_max, full_sync=full_sync)
        said = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if said != "ok":
            raise JournalError(f"{self.path} is damaged: {said}")
        theirs = self.file.meta("model").decode(errors="replace")
        if theirs != model:
            raise InvalidConfiguration(
                f"{self.path} is the journal of another model ({theirs}); give another --journal",
                setting="journal",
            )
        self._load()
        with contextlib.suppress(JournalError):  # No room: the log stays.
            self.fold()
        self.file.checkpoint()
        self._reserve_first()

    def _load(self) -> None:
        """What the file holds now: every row, every record and every sum agrees. Raises
        JournalError, sqlite3.Error."""
        number, digest = log_place_of(self.file.meta("log"))
        contents = Contents(
            reserved_epoch=epoch_of(self.file.meta("epoch")),
            digest=int.from_bytes(self.file.meta("digest"), "little"),
            log_number=number,
            log_digest=digest,
        )
        replay = Replay(self._saved_rows(), lambda row: self._bodies(self._connection, row))
        self._replay(contents, replay)
        for row in sorted(replay.rows.values(), key=lambda row: (row.ended_unix_ns, row.id)):
            contents.load(row)
        contents.next_id = max(contents.next_id, replay.last_id + 1)
        if not contents.adds_up:
            raise JournalError(f"{self.path} is damaged: its generations do not add up")
        self._contents, self._stale = contents, False

    def _saved_rows(self) -> dict[int, Row]:
        rows: dict[int, Row] = {}
        for *facts, stored in self._connection.execute(_ROWS):
            row, bodies = row_of(facts), split(stored)
            check_chain(row, bodies)
            if not row.ended:
                row.bodies = bodies
            rows[row.id] = row
        return rows

    def _replay(self, contents: Contents, replay: Replay) -> None:
        rows = self._connection.execute(
            "SELECT number, wall_ns, entries, digest FROM log ORDER BY number"
        )
        for number, wall_ns, entries, digest in rows:
            is_typed = isinstance(wall_ns, int) and isinstance(entries, bytes)
            if not is_typed or digest != log_digest(contents.log_digest, number, wall_ns, entries):
                raise JournalError(f"{self.path} is damaged: its log does not verify")
            contents.note_log(LogRow(number, wall_ns, entries, digest))
            replay.add(entries)
        replay.close()

    def _reserve_first(self) -> None:
        """Epochs from the wall clock on, but never one that may have been used: a clock may have
        been set back."""
        first = max(1, self._opened_ns // 10**9, self._contents.reserved_epoch)
        self.first_epoch = first
        self.reserve_epochs(first + EPOCH_BLOCK)

    def reserve_epochs(self, through: int) -> None:
        """A later owner begins at or above ``through``. Raises sqlite3.Error."""
        if through > self._contents.reserved_epoch:
            self._connection.execute(
                "UPDATE meta SET value = ? WHERE name = 'epoch'", (epoch_bytes(through),)
            )
            self._contents.reserved_epoch = through

    # -- writing --------------------------------------------------------------------------------

    def write(self, writes: Sequence[Write], *, wall_ns: int) -> None:
        """Append all of it in one transaction, and retire what is over a limit.

        Raises JournalError, and nothing has happened: the disk is full or gone, a request is not
        known or has ended (or, where it should begin, is known).
        """
        try:
            self._look_again()
            for one in writes:
                row = self._contents.ended_row(one.request) if one.resumes else None
                if row is not None:
                    row.bodies = self._bodies(self._connection, row)
            batch = self._contents.plan(writes, self.limits, wall_ns=wall_ns)
            try:
                self._commit(batch)
            except sqlite3.OperationalError:  # full: the log's room is room for what it holds
                self.file.roll_back()
                batch = self._contents.folded(batch)
                self._commit(batch)
        except sqlite3.Error as error:
            self._stale = True
            self.file.roll_back()
            raise JournalError(f"the journal cannot be written: {error}") from None
        self._apply(batch)
        self.commits += 1

    def fold(self, *, above_bytes: int = 0) -> None:
        """Empty a log that is longer: whatever runs gets a row. Raises JournalError: no room; the
        log stays."""
        if self._contents.log_bytes <= above_bytes:
            return
        try:
            self._look_again()
            planned = self._contents.plan((), self.limits, wall_ns=0)
            batch = self._contents.folded(planned)
            self._commit(batch)
        except sqlite3.Error as error:
            self._stale = True
            self.file.roll_back()
            raise JournalError(f"the journal's log cannot be emptied: {error}") from None
        self._apply(batch)

    def shorten(self, *, is_busy: bool) -> None:
        """Fold if it is time. In the middle of work that is when the log is as long as what it
        would write."""
        limit = min(LOG_BYTES_MAX, self.limits.bytes_max // FILE_FACTOR)
        if not is_busy:
            limit = min(limit, LOG_BYTES_IDLE)
        elif self._contents.log_bytes > limit:
            limit = max(limit, self._contents.running_bytes)
        with contextlib.suppress(JournalError):  # The next commit says what is wrong.
            self.fold(above_bytes=limit)

    def _apply(self, batch: Batch) -> None:
        log_bytes = len(batch.log.entries) if batch.log is not None else 0
        saved_bytes = sum(row.size for row in batch.saves)
        self.file.wrote(log_bytes + saved_bytes, rows=len(batch.saves))
        self._contents.apply(batch)
        self.retired += len(batch.over)

    def _look_again(self) -> None:
        """After a failure it is not known whether the file has what was to be written."""
        if self._stale and not self._is_as_known():
            self._load()
        self._stale = False

    def _is_as_known(self) -> bool:
        known, digest = self._contents, self.file.meta("digest")
        (last,) = self._connection.execute("SELECT max(number) FROM log").fetchone()
        expected = known.log_number if known.log_bytes else None
        return last == expected and int.from_bytes(digest, "little") == known.digest

    def _commit(self, batch: Batch) -> None:
        run, many = self._connection.execute, self._connection.executemany
        log = batch.log
        if log is not None and not batch.saves and not batch.over:  # what nearly every commit is
            run(_APPEND, (log.number, log.wall_ns, log.entries, log.digest))
            return
        run("BEGIN IMMEDIATE")
        # What goes, goes first, so that a full file has room again.
        many("DELETE FROM generations WHERE id = ?", [(row.id,) for row in batch.over])
        if log is None:
            run("DELETE FROM log")
            place = log_place(self._contents.log_number, self._contents.log_digest)
            run("UPDATE meta SET value = ? WHERE name = 'log'", (place,))
        else:
            run(_APPEND, (log.number, log.wall_ns, log.entries, log.digest))
        many(
            "INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            ((*row.values, joined(batch.bodies(row))) for row in batch.saves),
        )
        digest = batch.digest.to_bytes(32, "little")
        run("UPDATE meta SET value = ? WHERE name = 'digest'", (digest,))
        run("COMMIT")

    # -- reading --------------------------------------------------------------------------------

    def unfinished(self) -> list[StoredGeneration]:
        """What was running when the file was last written, oldest first."""
        rows = sorted(self._contents.running.values(), key=lambda row: row.id)
        return [verified(row, row.bodies[: row.records]) for row in rows]

    def read(self, request: bytes) -> StoredGeneration | None:
        """A generation, verified; None if it is not (or no longer) there. From any thread.

        Raises JournalError.
        """
        running = self._contents.running.get(request)
        if running is not None:  # committed, and not yet in a row of its own
            return verified(running, running.bodies[: running.records])
        try:
            with contextlib.closing(self.file.connect("ro")) as reader:
                found = reader.execute(f"{_ROWS} WHERE request = ?", (request,)).fetchone()
        except (sqlite3.Error, UnicodeError) as error:
            raise JournalError(f"the journal cannot be read: {error}") from None
        return None if found is None else verified(row_of(found[:-1]), split(found[-1]))

    @staticmethod
    def _bodies(connection: sqlite3.Connection, row: Row) -> list[bytes]:
        """The records of a row that is in the file, verified. Raises JournalError,
        sqlite3.Error."""
        found = connection.execute("SELECT bodies FROM generations WHERE id = ?", (row.id,))
        (stored,) = found.fetchone() or (None,)
        bodies = split(stored)
        check_chain(row, bodies)
        return bodies

    def close(self) -> None:
        """Let go of the file."""
        with contextlib.suppress(JournalError):
            self.fold()
        self.file.close()
