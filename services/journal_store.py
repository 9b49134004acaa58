"""The journal's file: SQLite in WAL mode, with a digest over everything it holds.

    meta          schema, model, highest epoch reserved, digest of all generations
    generations   one row each: how many records, the head of their chain, whether it has ended
    records       (generation, number) → a serialized JournalRecord, in the order of arrival:
                  a step's tokens of many generations lie on one page, not each on its own

Each generation's records are chained (``journal_rows``), and ``meta`` holds the sum of a digest
over each generation's row. All of it is verified when the file is opened, and a generation again
when it is read: what does not verify is JournalError, never an answer. (A damaged tail of the
write-ahead log is different: SQLite takes it for a write that was not finished, and the journal is
then what it was some commits earlier, which is a state it has been in.)

One process owns the file (an exclusive lock beside it, which the kernel drops with the process).
One thread at a time writes; ``read`` opens its own connection and may be called from any thread.
What a transaction does is planned by ``journal_contents``; one that fails changes nothing, in the
file or here.

Synchronous NORMAL: a commit is in the file system before it is reported, so ``kill -9`` loses
nothing; a power failure may lose the last commits, never their order. FULL waits for the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from services.journal_contents import Batch, Contents, JournalLimits, Write
from services.journal_rows import (
    Row,
    StoredGeneration,
    check_chain,
    epoch_bytes,
    epoch_of,
    row_of,
    verified,
)
from stagemesh.errors import InvalidConfiguration, JournalError

APPLICATION_ID = 0x534D4A4C
"""``SMJL``: what file(1) and this module know a journal by."""
SCHEMA_VERSION = 2
EPOCH_BLOCK = 1024
"""Epochs are reserved in blocks, so that opening a route never waits for the journal."""
PAGE_BYTES = 4096
WAL_PAGES_IDLE = 4096
"""Above this (16 MiB) a checkpoint is made: at once when there is nothing else to do, in the middle
of work behind a ``flush``. It waits for the disk, and so does the first commit behind it, so it
must not be made after every request."""
WAL_PAGES_MAX = 16_384
"""Above this (64 MiB) it is made in any case."""
FILE_FACTOR = 4
"""The file may grow to this many times ``bytes_max``: what runs cannot be retired."""
READ_WAIT_S = 5.0

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE generations (
    id INTEGER PRIMARY KEY,
    request BLOB NOT NULL UNIQUE,
    records INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    head BLOB NOT NULL,
    ended INTEGER NOT NULL,
    ended_unix_ns INTEGER NOT NULL
);
CREATE TABLE records (
    generation INTEGER NOT NULL,
    number INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE UNIQUE INDEX places ON records (generation, number);
"""


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
        self._lock = _take_lock(path)
        try:
            _make_private(path)
            # The writer is one thread at a time, but not always the one that opens the file.
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=READ_WAIT_S
            )
        except BaseException:
            os.close(self._lock)
            raise
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
            raise JournalError(_said(path, error)) from None
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
        run = self._connection.execute
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        known = self._pragma("application_id"), self._pragma("user_version")
        if known == (0, 0) and not run("SELECT 1 FROM sqlite_master").fetchone():
            self._create(model)
        elif known[0] != APPLICATION_ID:
            raise JournalError(f"{self.path} is not a journal of this program")
        elif known[1] != SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} has schema {known[1]}, this program writes {SCHEMA_VERSION}"
            )
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA synchronous = {'FULL' if full_sync else 'NORMAL'}")
        run("PRAGMA wal_autocheckpoint = 0")
        run(f"PRAGMA journal_size_limit = {WAL_PAGES_MAX * PAGE_BYTES}")
        pages_max = max(64, self.limits.bytes_max * FILE_FACTOR // PAGE_BYTES)
        run(f"PRAGMA max_page_count = {pages_max}")
        self._verify(model)
        self.checkpoint()
        self._reserve_first()

    def _create(self, model: str) -> None:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        for statement in _TABLES.split(";\n"):
            run(statement)
        empty = (0).to_bytes(32, "little")
        for name, value in (
            ("model", model.encode()),
            ("digest", empty),
            ("epoch", epoch_bytes(0)),
        ):
            run("INSERT INTO meta VALUES (?, ?)", (name, value))
        run(f"PRAGMA application_id = {APPLICATION_ID}")
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")

    def _pragma(self, name: str) -> int:
        return int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])

    def _meta(self, name: str) -> bytes:
        row = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None or not isinstance(row[0], bytes):
            raise JournalError(f"{self.path} is damaged: it has no {name}")
        return row[0]

    def _verify(self, model: str) -> None:
        """Raise unless every structure, every record and every sum agrees."""
        said = self._connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if said != "ok":
            raise JournalError(f"{self.path} is damaged: {said}")
        theirs = self._meta("model").decode(errors="replace")
        if theirs != model:
            raise InvalidConfiguration(
                f"{self.path} is the journal of another model ({theirs}); give another --journal",
                setting="journal",
            )
        self._load()
        if not self._contents.adds_up:
            raise JournalError(f"{self.path} is damaged: its generations do not add up")
        kept = {row.id: row for row in self._contents.rows}
        count = 0
        for row, bodies in self._bodies(kept):
            count += 1
            check_chain(row, bodies)
        if count != len(kept):
            raise JournalError(f"{self.path} is damaged: a generation has no records")

    def _bodies(self, rows: dict[int, Row]) -> Iterator[tuple[Row, list[bytes]]]:
        """Each generation's records in order."""
        found = self._connection.execute(
            "SELECT generation, number, body FROM records ORDER BY 1, 2"
        )
        current, bodies = 0, list[bytes]()
        for generation, number, body in found:
            if generation not in rows:
                raise JournalError(f"{self.path} is damaged: records of no generation")
            if generation != current:
                if bodies:
                    yield rows[current], bodies
                current, bodies = generation, []
            if number != len(bodies) or not isinstance(body, bytes):
                raise JournalError(f"{self.path} is damaged: a record is missing")
            bodies.append(body)
        if bodies:
            yield rows[current], bodies

    def _load(self) -> None:
        """What the file holds now. Raises JournalError, sqlite3.Error."""
        contents = Contents(
            reserved_epoch=epoch_of(self._meta("epoch")),
            digest=int.from_bytes(self._meta("digest"), "little"),
        )
        rows = self._connection.execute(
            "SELECT id, request, records, bytes, head, ended, ended_unix_ns FROM generations"
            " ORDER BY ended_unix_ns, id"
        )
        for found in rows:
            contents.load(row_of(found))
        self._contents, self._stale = contents, False

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
            if self._stale:
                self._load()
            self._transaction(writes, wall_ns)
        except sqlite3.Error as error:
            self._stale = True
            self._roll_back()
            raise JournalError(f"the journal cannot be written: {error}") from None
        except JournalError:
            self._stale = True
            self._roll_back()
            raise
        self.commits += 1

    def _transaction(self, writes: Sequence[Write], wall_ns: int) -> None:
        batch = self._contents.plan(writes, self.limits, wall_ns=wall_ns)
        self._commit(batch)
        self._contents.apply(batch)
        self.retired += len(batch.over)

    def _commit(self, batch: Batch) -> None:
        run, many = self._connection.execute, self._connection.executemany
        run("BEGIN IMMEDIATE")
        over = [(row.id,) for row in batch.over]
        if over:  # first, so that a full file has room again
            many("DELETE FROM records WHERE generation = ?", over)
        if batch.fresh:
            many(
                "INSERT INTO generations VALUES (?, ?, 0, 0, x'', 0, 0)",
                [(row.id, row.request) for row in batch.fresh],
            )
        many("INSERT INTO records VALUES (?, ?, ?)", batch.records)
        many(
            "UPDATE generations SET records = ?, bytes = ?, head = ?, ended = ?, ended_unix_ns = ?"
            " WHERE id = ?",
            [row.values for row in batch.touched],
        )
        if over:
            many("DELETE FROM generations WHERE id = ?", over)
            many("DELETE FROM records WHERE generation = ?", over)
        digest = batch.digest.to_bytes(32, "little")
        run("UPDATE meta SET value = ? WHERE name = 'digest'", (digest,))
        run("COMMIT")

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def checkpoint(self, *, above_pages: int = 0) -> None:
        """Move the log into the file if it has grown beyond ``above_pages`` (it may wait for the
        disk)."""
        try:
            if self.log_pages > above_pages:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error:
            return  # The log stays as it is; the next commit will tell what is wrong.

    @property
    def log_pages(self) -> int:
        """How long the write-ahead log is; 0 if there is none."""
        try:
            return self.path.with_name(self.path.name + "-wal").stat().st_size // PAGE_BYTES
        except OSError:
            return 0

    def flush(self) -> None:
        """Copy what the log holds into the file while others go on writing. From any thread; a
        ``checkpoint`` has little left to do afterwards."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self._connect("rw")) as beside:
            beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def _connect(self, mode: str) -> sqlite3.Connection:
        """Another connection, for one thread. Raises sqlite3.Error."""
        name = urllib.parse.quote(str(self.path.absolute()))
        return sqlite3.connect(
            f"file:{name}?mode={mode}", uri=True, isolation_level=None, timeout=READ_WAIT_S
        )

    # -- reading --------------------------------------------------------------------------------

    def unfinished(self) -> list[StoredGeneration]:
        """What was running when the file was last written, oldest first."""
        rows = sorted(self._contents.running.values(), key=lambda row: row.id)
        return [verified(row, self._read_bodies(self._connection, row)) for row in rows]

    def read(self, request: bytes) -> StoredGeneration | None:
        """A generation, verified; None if it is not (or no longer) there. From any thread.

        Raises JournalError.
        """
        try:
            with contextlib.closing(self._connect("ro")) as reader:
                reader.execute("BEGIN")
                found = reader.execute(
                    "SELECT id, request, records, bytes, head, ended, ended_unix_ns"
                    " FROM generations WHERE request = ?",
                    (request,),
                ).fetchone()
                if found is None:
                    return None
                row = row_of(found)
                return verified(row, self._read_bodies(reader, row))
        except (sqlite3.Error, UnicodeError) as error:
            raise JournalError(f"the journal cannot be read: {error}") from None

    @staticmethod
    def _read_bodies(connection: sqlite3.Connection, row: Row) -> list[bytes]:
        found = connection.execute(
            "SELECT body FROM records WHERE generation = ? ORDER BY number", (row.id,)
        )
        bodies = [body for (body,) in found]
        if not all(isinstance(body, bytes) for body in bodies):  # a flipped bit
            raise JournalError(
                "the journal is damaged: a record is no bytes", request_id=row.request.hex()
            )
        return bodies

    def close(self) -> None:
        """Let go of the file and of the lock."""
        self._connection.close()
        os.close(self._lock)


def _take_lock(path: Path) -> int:
    """The descriptor that holds the lock. Raises OSError, InvalidConfiguration."""
    lock = os.open(
        path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InvalidConfiguration(
            f"the journal {path} is in use by another coordinator", setting="journal"
        ) from None
    return lock


def _make_private(path: Path) -> None:
    """Prompts are nobody else's business; the log files inherit these permissions."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


def _said(path: Path, error: Exception) -> str:
    """UnicodeError is what Python makes of damaged text, even in a message of SQLite's."""
    return f"the journal {path} cannot be used: {error}; move it away, or start with --journal none"
