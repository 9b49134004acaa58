"""The journal's file: SQLite in WAL mode, owned by one process.

    meta          model, highest epoch reserved, digest of all generations, where the log begins
    log           what was committed since the log was last empty, a row per commit: records of many
                  generations in one blob, so that a commit is one statement and a page or two
    generations   one row each, with all of its records: what has ended, and what ran when the log
                  was last emptied

One process owns the file (an exclusive lock beside it, which the kernel drops with the process);
nobody else may read it. A file of the schema before becomes one of this (``journal_upgrade``); one
of another, or one that is not a journal, is left alone: JournalError. What the tables say is
``journal_store``'s business.

Synchronous NORMAL: a commit is in the file system before it is reported, so ``kill -9`` loses
nothing; a power failure may lose the last commits, never their order. FULL waits for the disk.

A commit goes into the write-ahead log. A checkpoint moves the log into the file and waits for the
disk, so when it is made is the owner's choice (``journal``): SQLite makes none by itself. Behind
one that moved everything the next commit begins the log from its start, over what was there. To
give the room back as well takes some twenty times as long (13 ms where 0.6 would do), so that is
for when nobody waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import urllib.parse
from pathlib import Path

from services.journal_rows import epoch_bytes, log_place
from services.journal_upgrade import SCHEMA_BEFORE, upgrade
from stagemesh.errors import InvalidConfiguration, JournalError

APPLICATION_ID = 0x534D4A4C
"""``SMJL``: what file(1) and this module know a journal by."""
SCHEMA_VERSION = 3
PAGE_BYTES = 4096
WAL_PAGES_IDLE = 8192
"""Above this (32 MiB) a checkpoint is made: at once when there is nothing else to do, in the middle
of work behind a ``flush``. It waits for the disk, and so does the first commit behind it, so it
must not be made after every request."""
WAL_PAGES_MAX = 16_384
"""Above this (64 MiB) it is made in any case."""
FILE_FACTOR = 4
"""The file may grow to this many times ``bytes_max``: what runs cannot be retired."""
READ_WAIT_S = 5.0

_META = "CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
_LOG = """
CREATE TABLE log (
    number INTEGER PRIMARY KEY,
    wall_ns INTEGER NOT NULL,
    entries BLOB NOT NULL,
    digest BLOB NOT NULL
)"""
_GENERATIONS = """
CREATE TABLE generations (
    id INTEGER PRIMARY KEY,
    request BLOB NOT NULL UNIQUE,
    records INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    head BLOB NOT NULL,
    ended INTEGER NOT NULL,
    ended_unix_ns INTEGER NOT NULL,
    bodies BLOB NOT NULL
)"""


class JournalFile:
    """See the module. Owned until ``close``. ``connection`` is for one thread at a time, once
    ``prepare`` has found the file fit.

    Raises OSError, sqlite3.Error, InvalidConfiguration (in use)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_pages = 0
        """How long the write-ahead log is, about: its file may be longer than what it holds."""
        self._lock = _take_lock(path)
        try:
            _make_private(path)
            # The writer is one thread at a time, but not always the one that opens the file.
            self.connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=READ_WAIT_S
            )
        except BaseException:
            os.close(self._lock)
            raise

    def prepare(self, model: str, *, bytes_max: int, full_sync: bool) -> None:
        """Recognise a journal, or make an empty one of ``model``. Raises JournalError,
        sqlite3.Error."""
        run = self.connection.execute
        run(f"PRAGMA page_size = {PAGE_BYTES}")
        known = self._pragma("application_id"), self._pragma("user_version")
        if known == (0, 0) and not run("SELECT 1 FROM sqlite_master").fetchone():
            self._create(model)
        elif known[0] != APPLICATION_ID:
            raise JournalError(f"{self.path} is not a journal of this program")
        elif known[1] == SCHEMA_BEFORE:
            upgrade(self.connection, (_LOG, _GENERATIONS), SCHEMA_VERSION)
        elif known[1] != SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} has schema {known[1]}, this program writes {SCHEMA_VERSION}"
            )
        self.log_pages = self._log_file_pages()
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA synchronous = {'FULL' if full_sync else 'NORMAL'}")
        run("PRAGMA wal_autocheckpoint = 0")
        run(f"PRAGMA journal_size_limit = {WAL_PAGES_MAX * PAGE_BYTES}")
        pages_max = max(64, bytes_max * FILE_FACTOR // PAGE_BYTES)
        run(f"PRAGMA max_page_count = {pages_max}")

    def _create(self, model: str) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        for statement in (_META, _LOG, _GENERATIONS):
            run(statement)
        empty = (0).to_bytes(32, "little")
        for name, value in (
            ("model", model.encode()),
            ("digest", empty),
            ("epoch", epoch_bytes(0)),
            ("log", log_place(0, bytes(32))),
        ):
            run("INSERT INTO meta VALUES (?, ?)", (name, value))
        run(f"PRAGMA application_id = {APPLICATION_ID}")
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")

    def _pragma(self, name: str) -> int:
        return int(self.connection.execute(f"PRAGMA {name}").fetchone()[0])

    def meta(self, name: str) -> bytes:
        """One fact about the whole journal. Raises JournalError, sqlite3.Error."""
        row = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is None or not isinstance(row[0], bytes):
            raise JournalError(f"{self.path} is damaged: it has no {name}")
        return row[0]

    def connect(self, mode: str) -> sqlite3.Connection:
        """Another connection, for one thread. Raises sqlite3.Error."""
        name = urllib.parse.quote(str(self.path.absolute()))
        return sqlite3.connect(
            f"file:{name}?mode={mode}", uri=True, isolation_level=None, timeout=READ_WAIT_S
        )

    def roll_back(self) -> None:
        """Undo what a transaction that failed has done."""
        with contextlib.suppress(sqlite3.Error):
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")

    def close(self) -> None:
        """Let go of the file and of the lock."""
        self.connection.close()
        os.close(self._lock)

    # -- the log --------------------------------------------------------------------------------

    def wrote(self, byte_count: int, *, rows: int) -> None:
        """A commit was made, of so many bytes and so many generations' own rows. What that is in
        pages is known about: 0.8 to 1.8 times what it was in measurements."""
        self.log_pages += 2 + 2 * rows + 3 * byte_count // (2 * PAGE_BYTES)

    def _log_file_pages(self) -> int:
        try:
            return self.path.with_name(self.path.name + "-wal").stat().st_size // PAGE_BYTES
        except OSError:
            return 0

    def checkpoint(self, *, above_pages: int = 0, shrink: bool = True) -> None:
        """Move the log into the file if it has grown beyond ``above_pages`` (it may wait for the
        disk), and give its room back if that is wanted, or too much for it not to be."""
        if self.log_pages <= above_pages:
            return
        try:
            self._checkpoint("TRUNCATE" if shrink else "PASSIVE")
            if self.log_pages > WAL_PAGES_MAX and not shrink:
                self._checkpoint("TRUNCATE")
        except sqlite3.Error:
            return  # The log stays as it is; the next commit will tell what is wrong.

    def _checkpoint(self, mode: str) -> None:
        made = self.connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        is_busy, pages, moved = made
        if not is_busy:
            self.log_pages = pages if pages > WAL_PAGES_MAX or moved < pages else 0

    def flush(self) -> None:
        """Copy what the log holds into the file while others go on writing. From any thread; a
        ``checkpoint`` has little left to do afterwards."""
        with contextlib.suppress(sqlite3.Error), contextlib.closing(self.connect("rw")) as beside:
            beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()


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


def unusable(path: Path, error: Exception) -> str:
    """UnicodeError is what Python makes of damaged text, even in a message of SQLite's."""
    return f"the journal {path} cannot be used: {error}; move it away, or start with --journal none"
