"""The journal's file: one owner, nobody else's business, and a log that is moved when told."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.journal_file import JournalFile
from stagemesh.errors import InvalidConfiguration
from tests.services.journal_helpers import keep, open_store, tokens_of


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
