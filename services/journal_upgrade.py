"""A journal of schema 2 becomes one of schema 3, in one transaction.

Schema 2 had a row per record and no log: ``generations`` (id, request, records, bytes, head, ended,
ended_unix_ns) and ``records`` (generation, number, body). Chains and heads are the same, so every
generation is verified on its way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from services.journal_rows import RECORD_OVERHEAD_BYTES, check_chain, joined, log_place, row_of
from stagemesh.errors import JournalError

SCHEMA_BEFORE = 2
_DIGEST_MODULUS = 1 << 256


def upgrade(connection: sqlite3.Connection, tables: Sequence[str], schema: int) -> None:
    """``tables``: the statements that make ``log`` and ``generations``. Nothing is changed if
    anything is wrong. Raises JournalError (damaged), sqlite3.Error."""
    run = connection.execute
    run("BEGIN IMMEDIATE")
    try:
        run("ALTER TABLE generations RENAME TO generations_before")
        for statement in tables:
            run(statement)
        digest = _copy(connection)
        run("DROP TABLE records")
        run("DROP TABLE generations_before")
        stored = digest.to_bytes(32, "little")
        run("UPDATE meta SET value = ? WHERE name = 'digest'", (stored,))
        run("INSERT INTO meta VALUES ('log', ?)", (log_place(0, bytes(32)),))
        run(f"PRAGMA user_version = {schema}")
        run("COMMIT")
    except BaseException:
        run("ROLLBACK")
        raise


def _copy(connection: sqlite3.Connection) -> int:
    """Every generation, with its records; the sum of their digests as it is now."""
    run, before, after, copied = connection.execute, 0, 0, 0
    for found in run("SELECT * FROM generations_before").fetchall():
        row = row_of(found)
        before += row.saved
        bodies = [
            body
            for (body,) in run(
                "SELECT body FROM records WHERE generation = ? ORDER BY number", (row.id,)
            )
        ]
        if not all(isinstance(body, bytes) for body in bodies):
            raise JournalError("the journal is damaged: a record is no bytes")
        check_chain(row, bodies)
        row.size = sum(len(body) + RECORD_OVERHEAD_BYTES for body in bodies)
        after += row.digest
        copied += len(bodies)
        values = (*row.values, joined(bodies))
        run("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    (stored,) = run("SELECT value FROM meta WHERE name = 'digest'").fetchone() or (b"",)
    (records,) = run("SELECT count(*) FROM records").fetchone()
    if before % _DIGEST_MODULUS != int.from_bytes(stored, "little") or records != copied:
        raise JournalError("the journal is damaged: its generations do not add up")
    return after % _DIGEST_MODULUS
