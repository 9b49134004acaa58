"""The journal's file: one owner, nobody else's business, and a log that is moved when told."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import journal_file
from services.journal_file import JournalFile
from stagemesh.errors import InvalidConfiguration
from tests.services.journal_helpers import NOW_NS, keep, key, open_store, token_write, tokens_of


def test_nobody_else_may_read_the_files(tmp_path: Path):
    path = tmp_path / "state" / "journal.db"
    store = open_store(path)
    keep(store, 1, 2, ends=False)
    files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert set(files.values()) == {0o600}
    assert "journal.db-wal" in files
    assert path.parent.stat().st_mode & 0o777 == 0o700
    store.close()


def test_a_journal_has_one_owner_at_a_time(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    with pytest.raises(InvalidConfiguration, match="in use by another coordinator"):
        open_store(path)
    store.close()
    open_store(path).close()


def test_whoever_cannot_open_a_file_leaves_its_lock_free(tmp_path: Path):
    path = tmp_path / "journal.db"
    path.mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match="Is a directory"):
            JournalFile(path)
    path.rmdir()
    JournalFile(path).close()


def test_the_log_grows_until_it_is_moved_into_the_file(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    request = keep(store, 1, 30, ends=False)
    pages = store.file.log_pages
    assert pages > 30  # no commit moved it
    store.file.checkpoint(above_pages=pages)
    assert store.file.log_pages == pages
    store.file.flush()
    size = path.stat().st_size
    assert store.file.log_pages == pages  # copied, and still there
    store.file.checkpoint()
    assert (store.file.log_pages, path.stat().st_size) == (0, size)
    assert tokens_of(store.read(request)) == list(range(30))
    store.close()


def log_file_bytes(path: Path) -> int:
    return path.with_name(f"{path.name}-wal").stat().st_size


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Somebody who began to read and has not done so to the end."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM log").fetchone()
        yield


def test_a_log_that_keeps_its_room_begins_anew_in_it(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    request = keep(store, 1, 30, ends=False)
    room = log_file_bytes(path)
    store.file.checkpoint(shrink=False)
    assert (store.file.log_pages, log_file_bytes(path)) == (0, room)
    for index in range(30, 40):
        store.write([token_write(request, index)], wall_ns=NOW_NS)
    assert 0 < store.file.log_pages < 30
    assert log_file_bytes(path) == room  # what it says now is at its start
    assert tokens_of(store.read(request)) == list(range(40))
    store.close()
    again = open_store(path)
    assert tokens_of(again.read(request)) == list(range(40))
    again.close()


def test_a_log_that_somebody_reads_is_not_taken_for_an_empty_one(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    request = keep(store, 1, 20, ends=False)
    with reading(path):
        store.write([token_write(request, 20)], wall_ns=NOW_NS)
        store.file.checkpoint(shrink=False)
        assert store.file.log_pages > 20  # what came behind the reader has to wait for it
    store.file.checkpoint(shrink=False)
    assert store.file.log_pages == 0
    store.close()


def test_a_log_that_outgrew_its_bound_gives_its_room_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "journal.db"
    store = open_store(path)
    keep(store, 1, 30, ends=False)
    monkeypatch.setattr(journal_file, "WAL_PAGES_MAX", 20)
    store.file.checkpoint(shrink=False)
    assert (store.file.log_pages, log_file_bytes(path)) == (0, 0)
    store.close()


def test_the_log_is_known_about_as_long_as_it_is(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    store.file.checkpoint()
    for number in range(1, 9):
        keep(store, number, 20, ends=number % 2 == 0)
    real = log_file_bytes(path) / journal_file.PAGE_BYTES
    assert 0.5 * real < store.file.log_pages < 3 * real
    assert tokens_of(store.read(key(1))) == list(range(20))
    store.close()


def test_a_log_that_a_killed_owner_left_counts(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    keep(store, 1, 30, ends=False)
    for name in ("journal.db", "journal.db-wal"):
        (tmp_path / f"left-{name}").write_bytes((tmp_path / name).read_bytes())
    store.close()
    left = JournalFile(tmp_path / "left-journal.db")
    left.prepare("echo", bytes_max=1 << 20, full_sync=False)
    assert left.log_pages > 30
    left.checkpoint()
    assert left.log_pages == 0
    left.close()
