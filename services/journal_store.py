"""What a journal's file says: records in transactions, and a digest over everything there is.

Each generation's records are chained (``journal_rows``), and ``meta`` holds the sum of a digest
over each generation's row. All of it is verified when the file is opened, and a generation again
when it is read: what does not verify is JournalError, never an answer. (A damaged tail of the
write-ahead log is different: SQLite takes it for a write that was not finished, and the journal is
then what it was some commits earlier, which is a state it has been in.)

One thread at a time writes; ``read`` opens its own connection and may be called from any thread.
What a transaction does is planned by ``journal_contents``; one that fails changes nothing, in the
file or here. ``journal_file`` is the file itself: its tables, its owner, its log.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from services.journal_contents import Batch, Contents, JournalLimits, Write
from services.journal_file import JournalFile, unusable
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

EPOCH_BLOCK = 1024
"""Epochs are reserved in blocks, so that opening a route never waits for the journal."""


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
        self._verify(model)
        self.file.checkpoint()
        self._reserve_first()

    def _verify(self, model: str) -> None:
        """Raise unless every structure, every record and every sum agrees."""
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
            reserved_epoch=epoch_of(self.file.meta("epoch")),
            digest=int.from_bytes(self.file.meta("digest"), "little"),
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
            self.file.roll_back()
            raise JournalError(f"the journal cannot be written: {error}") from None
        except JournalError:
            self._stale = True
            self.file.roll_back()
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
            with contextlib.closing(self.file.connect("ro")) as reader:
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
        """Let go of the file."""
        self.file.close()
