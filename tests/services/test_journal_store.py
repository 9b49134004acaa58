"""The journal's file: what was written is there, whatever stopped the writer; damage is found."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.instructions import RecoveryEnded, RecoveryRecord
from services.journal_codec import (
    accepted_tokens,
    demand_of,
    fingerprint_of,
    instruction_record,
    instructions_of,
    request_record,
)
from services.journal_contents import Batch, JournalLimits, Write
from services.journal_rows import Row
from services.journal_store import EPOCH_BLOCK, JournalStore
from stagemesh.errors import InvalidConfiguration, JournalError
from tests.services.journal_helpers import (
    NOW_NS,
    PROMPT,
    accept,
    begin_write,
    content,
    demand,
    end_write,
    failure,
    keep,
    key,
    open_store,
    resume_write,
    summary,
    token_write,
    tokens_of,
)

ROOT = Path(__file__).parents[2]
relaxed = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_what_was_written_is_there_after_it_was_closed_and_opened_again(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    done, running = keep(store, 1, 3), keep(store, 2, 2, ends=False)
    store.close()
    again = open_store(path)
    assert (again.ended, again.running) == (1, 1)
    assert content(again) == {done: ([0, 1, 2], True), running: ([0, 1], False)}
    assert [one.request for one in again.unfinished()] == [running]
    assert again.read(key(9)) is None
    again.close()


def test_requests_tokens_and_ends_come_back_as_they_were(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    asked = demand(key(1), deadline=110.0, traceparent="00-ab-cd-01")
    opening = request_record(asked, now=100.0, wall_ns=NOW_NS)
    kept = [accept(key(1), 0), accept(key(1), 1), failure(key(1), 2)]
    records = [
        instruction_record(one, wall_ns=NOW_NS + 7, fingerprint="f:f32" if index == 0 else "")
        for index, one in enumerate(kept)
    ]
    store.write(
        [
            Write(key(1), opening.SerializeToString(), begins=True),
            *(Write(key(1), one.SerializeToString()) for one in records[:-1]),
            Write(key(1), records[-1].SerializeToString(), ends=True),
        ],
        wall_ns=NOW_NS,
    )
    stored = store.read(key(1))
    assert stored is not None
    found = [instruction for instruction, _ in instructions_of(stored)]
    assert found[:2] == kept[:2]
    assert [at for _, at in instructions_of(stored)][:2] == [NOW_NS + 7] * 2
    assert (found[2].error.reason, found[2].error.message) == ("ROUTE_UNAVAILABLE", "gone")
    assert found[2].summary == failure(key(1), 2).summary
    back = demand_of(stored, now=50.0, wall_ns=NOW_NS + 4 * 10**9)
    assert (back.prompt, back.sampling, back.max_tokens) == (PROMPT, asked.sampling, 1000)
    assert (back.stop_token_ids, back.traceparent) == (asked.stop_token_ids, asked.traceparent)
    assert back.deadline == pytest.approx(56.0)
    assert (back.accepted, back.recovered, back.fingerprint) == ((0, 1), True, "f:f32")
    assert (accepted_tokens(stored), fingerprint_of(stored)) == ((0, 1), "f:f32")
    store.close()


def test_an_end_that_was_gone_on_from_no_longer_counts(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    request = keep(store, 1, 2, ends=False)
    failed = failure(request, 2)
    record = instruction_record(failed, wall_ns=NOW_NS)
    store.write([Write(request, record.SerializeToString(), ends=True)], wall_ns=NOW_NS)
    store.write([resume_write(request), token_write(request, 2)], wall_ns=NOW_NS)
    stored = store.read(request)
    assert stored is not None
    assert [one for one, _ in instructions_of(stored)] == [accept(request, n) for n in range(3)]
    back = demand_of(stored, now=10.0, wall_ns=NOW_NS)
    assert back.accepted == (0, 1, 2)
    assert back.recoveries == failed.summary.recoveries
    assert back.deadline == pytest.approx(12.0)  # the new one
    store.close()


def test_recoveries_of_what_still_runs_are_kept_and_follow_those_of_an_earlier_end(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    request = keep(store, 1, 1, ends=False)
    (told,) = summary(1).recoveries
    first, overtaken = replace(told, cause="CACHE_LOST"), replace(told, seconds=None)

    def keep_recovery(one: RecoveryRecord) -> Write:
        record = instruction_record(RecoveryEnded(request, one), wall_ns=NOW_NS)
        return Write(request, record.SerializeToString())

    def recoveries() -> tuple[RecoveryRecord, ...]:
        stored = store.read(request)
        assert stored is not None
        return demand_of(stored, now=10.0, wall_ns=NOW_NS).recoveries

    store.write([keep_recovery(first), token_write(request, 1)], wall_ns=NOW_NS)
    store.write([keep_recovery(overtaken)], wall_ns=NOW_NS)
    assert recoveries() == (first, overtaken)
    stored = store.read(request)
    assert stored is not None
    assert accepted_tokens(stored) == (0, 1)
    end = instruction_record(failure(request, 2), wall_ns=NOW_NS)  # it tells all there were
    store.write([Write(request, end.SerializeToString(), ends=True)], wall_ns=NOW_NS)
    store.write([resume_write(request), keep_recovery(first)], wall_ns=NOW_NS)
    assert recoveries() == (told, first)
    store.close()


def test_what_is_no_journal_or_another_models_or_another_versions_is_refused(tmp_path: Path):
    path = tmp_path / "journal.db"
    open_store(path).close()
    with pytest.raises(InvalidConfiguration, match="another model"):
        JournalStore.open(path, model="other", wall_ns=NOW_NS)
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(JournalError, match="schema 99"):
        open_store(path)
    text = tmp_path / "text.db"
    text.write_text("Dear diary, " * 100)
    with pytest.raises(JournalError, match="cannot be used"):
        open_store(text)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as raw:
        raw.execute("CREATE TABLE t (a)")
    raw.close()
    with pytest.raises(JournalError, match="not a journal"):
        open_store(foreign)
    with pytest.raises(InvalidConfiguration, match="cannot be opened"):
        open_store(text / "below" / "journal.db")
    with pytest.raises(InvalidConfiguration, match="cannot be opened"):
        open_store(tmp_path)


def test_epochs_only_grow_even_when_the_clock_is_set_back(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    first = store.first_epoch
    assert first == NOW_NS // 10**9
    store.reserve_epochs(first + 5000)
    store.close()
    earlier = open_store(path, wall_ns=NOW_NS - 10**15)
    assert earlier.first_epoch == first + 5000
    earlier.close()
    again = open_store(path, wall_ns=NOW_NS - 10**15)
    assert again.first_epoch == first + 5000 + EPOCH_BLOCK
    again.close()


# -- retention ---------------------------------------------------------------------------------


def test_the_oldest_ended_generations_are_retired_and_what_runs_is_not(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path, generations_max=2)
    running = keep(store, 1, 1, ends=False)
    for number in range(2, 7):
        keep(store, number, 1)
    assert sorted(content(store)) == [running, key(5), key(6)]
    assert (store.retired, store.ended, store.running) == (3, 2, 1)
    assert not store.holds(key(2))
    assert store.holds(running)
    store.close()
    again = open_store(path, generations_max=2)
    assert sorted(content(again)) == [running, key(5), key(6)]
    again.close()


def test_bytes_and_age_retire_too(tmp_path: Path):
    store = open_store(tmp_path / "bytes.db", bytes_max=4000)
    for number in range(1, 6):
        keep(store, number, 5)
    assert store.size <= 4000
    assert key(5) in content(store)
    assert key(1) not in content(store)
    store.close()
    store = open_store(tmp_path / "age.db", age_s_max=60.0)
    keep(store, 1, 1)
    keep(store, 2, 1, wall_ns=NOW_NS + 59 * 10**9)
    assert key(1) in content(store)
    keep(store, 3, 1, wall_ns=NOW_NS + 61 * 10**9)
    assert sorted(content(store)) == [key(2), key(3)]
    store.close()


# -- failures ----------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing_and_room_is_used_again(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path, bytes_max=1 << 16)  # 64 pages at most
    ended = keep(store, 1, 3)
    request = key(2)
    store.write([begin_write(request)], wall_ns=NOW_NS)

    def fill() -> None:
        for _ in range(10_000):
            store.write([token_write(request, 0)] * 8, wall_ns=NOW_NS)

    with pytest.raises(JournalError, match="full"):
        fill()
    count = store.commits - 6
    assert count > 10
    whole = [0] * (count * 8)
    assert tokens_of(store.read(request)) == whole
    store.write([Write(request, end_write(request, 0).body, ends=True)], wall_ns=NOW_NS)
    assert ended not in content(store)  # retired for its room
    keep(store, 3, 2)
    store.close()
    again = open_store(path, bytes_max=1 << 16)
    assert content(again)[key(3)] == ([0, 1], True)
    again.close()


def test_records_in_the_wrong_place_are_refused_and_nothing_is_written(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    request = keep(store, 1, 1, ends=False)
    before = content(store)
    for wrong in (
        [begin_write(request)],
        [token_write(key(7), 0)],
        [token_write(request, 1), begin_write(request)],
        [end_write(request, 1), token_write(request, 1)],
    ):
        with pytest.raises(JournalError):
            store.write(wrong, wall_ns=NOW_NS)
        assert content(store) == before
    store.write([token_write(request, 1)], wall_ns=NOW_NS)
    assert content(store)[request] == ([0, 1], False)
    store.close()


class Big:
    """Values that a failure should not print."""

    def __init__(self, *of: Any) -> None:
        self.of = of


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Big:
    """A journal at rest, and what it says."""
    path = tmp_path_factory.mktemp("closed") / "journal.db"
    store = open_store(path)
    for number in (1, 2, 3):
        keep(store, number, 6, ends=number != 2)
    said = content(store), store.first_epoch
    store.close()
    return Big(path.read_bytes(), said)


@relaxed
@given(place=st.integers(0, 2**31), bit=st.integers(0, 7))
def test_a_damaged_byte_is_found_or_meant_nothing(closed, tmp_path: Path, place, bit):
    whole, (said, epoch) = closed.of
    place %= len(whole)
    path = tmp_path / "damaged.db"
    for old in tmp_path.iterdir():
        old.unlink()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    try:
        store = open_store(path)
    except (JournalError, InvalidConfiguration):
        return
    try:
        assert content(store) == said
        assert store.first_epoch == epoch + EPOCH_BLOCK
    finally:
        store.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE generations SET bodies = substr(bodies, 1, 20) WHERE id = 1",
        "UPDATE generations SET bodies = zeroblob(20) WHERE id = 1",
        "UPDATE generations SET bodies = x'' WHERE id = 2",
        "UPDATE generations SET bodies = 'text' WHERE id = 3",
        "DELETE FROM generations WHERE id = 1",
        "UPDATE generations SET ended = 1 WHERE id = 2",
        "UPDATE generations SET ended_unix_ns = 5 WHERE id = 1",
        "UPDATE generations SET head = 'text' WHERE id = 1",
        "UPDATE generations SET records = 5 WHERE id = 1",
        "UPDATE generations SET id = -5 WHERE id = 1",
        "UPDATE meta SET value = x'0011' WHERE name = 'epoch'",
        "DELETE FROM meta WHERE name = 'digest'",
        "DELETE FROM meta WHERE name = 'log'",
        "INSERT INTO log VALUES (77, 0, x'00', x'00')",
    ],
)
def test_a_change_that_sqlite_finds_nothing_wrong_with_is_found(closed, tmp_path, statement):
    path = tmp_path / "changed.db"
    path.write_bytes(closed.of[0])
    change(path, statement)
    with pytest.raises(JournalError):
        open_store(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM log WHERE number = 1",
        "DELETE FROM log WHERE number = 3",
        "UPDATE log SET number = 77 WHERE number = 6",
        "UPDATE log SET wall_ns = wall_ns + 1 WHERE number = 4",
        "UPDATE log SET wall_ns = 'text' WHERE number = 4",
        "UPDATE log SET entries = zeroblob(30) WHERE number = 2",
        "UPDATE log SET entries = 'text' WHERE number = 2",
        "UPDATE log SET digest = zeroblob(32) WHERE number = 6",
        "UPDATE meta SET value = zeroblob(40) WHERE name = 'digest'",
        "UPDATE meta SET value = x'01' WHERE name = 'log'",
        "DELETE FROM generations",
    ],
)
def test_a_change_in_the_log_of_a_journal_that_was_not_closed_is_found(torn, tmp_path, statement):
    path = tmp_path / "journal.db"
    path.write_bytes(torn.of[0])
    path.with_name("journal.db-wal").write_bytes(torn.of[1])
    change(path, statement)
    with pytest.raises(JournalError, match="damaged"):
        open_store(path)


def change(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        assert raw.execute(statement).rowcount > 0


@pytest.mark.parametrize("bodies", ["7", "'text'", "1.5", "x'0102'", "zeroblob(30)"])
def test_damage_behind_an_open_journals_back_is_found_when_it_is_read(tmp_path: Path, bodies: str):
    path = tmp_path / "journal.db"
    store = open_store(path)
    request = keep(store, 1, 3)
    change(path, f"UPDATE generations SET bodies = {bodies} WHERE id = 1")
    with pytest.raises(JournalError, match="damaged"):
        store.read(request)
    with pytest.raises(JournalError, match="damaged"):
        store.write([resume_write(request)], wall_ns=NOW_NS)
    store.close()


# -- the log -----------------------------------------------------------------------------------


def logged(path: Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as raw:
        return int(raw.execute("SELECT count(*) FROM log").fetchone()[0])


def test_the_log_is_emptied_and_nothing_is_lost_by_it(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    keep(store, 1, 2)
    running = keep(store, 2, 3, ends=False)
    assert logged(path) == 8
    said = content(store)
    store.shorten(is_busy=False)  # not worth it
    assert logged(path) == 8
    store.fold()
    assert (logged(path), content(store)) == (0, said)
    store.write([token_write(running, 3)], wall_ns=NOW_NS)
    assert logged(path) == 1
    assert tokens_of(store.read(running)) == [0, 1, 2, 3]
    store.close()
    assert logged(path) == 0
    again = open_store(path)
    assert content(again) == {key(1): ([0, 1], True), running: ([0, 1, 2, 3], False)}
    again.close()


def test_what_is_retired_as_the_log_is_emptied_is_counted_like_any_other(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    for number in (1, 2, 3):
        keep(store, number, 1)
    store.limits = JournalLimits(generations_max=1)
    store.fold()
    assert (sorted(content(store)), store.retired) == ([key(3)], 2)
    store.close()


def test_in_the_middle_of_work_the_log_is_emptied_when_it_is_longer_than_what_runs(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path, bytes_max=20_000)  # a quarter of it is a long log
    request = keep(store, 1, 0, ends=False)
    lengths = []
    for index in range(400):
        store.write([token_write(request, index % 50)], wall_ns=NOW_NS)
        store.shorten(is_busy=True)
        lengths.append(logged(path))
    folds = [at for at, length in enumerate(lengths) if length == 0]
    assert 2 <= len(folds) <= 8
    gaps = [after - before for before, after in itertools.pairwise(folds)]
    assert gaps == sorted(gaps)  # more runs: more seldom
    assert gaps[-1] > 2 * gaps[0]
    assert len(tokens_of(store.read(request))) == 400
    store.close()
    again = open_store(path, bytes_max=20_000)
    assert len(tokens_of(again.read(request))) == 400
    again.close()


def test_a_commit_whose_failure_was_none_is_seen_before_the_next(tmp_path: Path, monkeypatch):
    path = tmp_path / "journal.db"
    store = open_store(path)
    request = keep(store, 1, 1, ends=False)
    commit = JournalStore._commit

    def commit_and_fail(store: JournalStore, batch: Batch) -> None:
        commit(store, batch)
        raise sqlite3.DatabaseError("the disk did not answer")

    monkeypatch.setattr(JournalStore, "_commit", commit_and_fail)
    with pytest.raises(JournalError, match="did not answer"):
        store.write([token_write(request, 1)], wall_ns=NOW_NS)
    monkeypatch.setattr(JournalStore, "_commit", commit)
    assert tokens_of(store.read(request)) == [0]  # as far as is known
    keep(store, 2, 1)
    assert tokens_of(store.read(request)) == [0, 1]
    store.close()
    again = open_store(path)
    assert tokens_of(again.read(request)) == [0, 1]
    again.close()


def test_after_a_failure_that_changed_nothing_the_file_is_not_read_again(tmp_path, monkeypatch):
    store = open_store(tmp_path / "journal.db")
    request = keep(store, 1, 1, ends=False)

    def fail(store: JournalStore, batch: Batch) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    def load(store: JournalStore) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(JournalStore, "_commit", fail)
        for _ in range(2):
            with pytest.raises(JournalError, match="full"):
                store.write([token_write(request, 1)], wall_ns=NOW_NS)
    with monkeypatch.context() as patched:
        patched.setattr(JournalStore, "_load", load)
        store.write([token_write(request, 1)], wall_ns=NOW_NS)
    assert tokens_of(store.read(request)) == [0, 1]
    store.close()


def test_a_number_that_the_log_speaks_of_is_not_given_again(tmp_path: Path, monkeypatch):
    path, copy = tmp_path / "journal.db", tmp_path / "copy" / "journal.db"
    store = open_store(path, generations_max=0)
    keep(store, 1, 1)
    assert not content(store)  # retired, and still in the log
    copy.parent.mkdir()
    for name in ("journal.db", "journal.db-wal"):
        shutil.copy(path.with_name(name), copy.with_name(name))
    store.close()

    def no_room(store: JournalStore) -> None:
        raise JournalError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(JournalStore, "fold", no_room)
        again = open_store(copy)
        keep(again, 5, 1)
        again.close()
    whole = open_store(copy)
    assert content(whole) == {key(5): ([0], True)}
    whole.close()


def schema_2(path: Path) -> None:
    """A journal as it was written before there was a log: one ended, one running."""
    open_store(path).close()
    kept = {
        1: [begin_write(key(1)), token_write(key(1), 0), end_write(key(1), 1)],
        2: [begin_write(key(2)), token_write(key(2), 0)],
    }
    with contextlib.closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("DROP TABLE log")
        raw.execute("ALTER TABLE generations DROP COLUMN bodies")
        raw.execute("CREATE TABLE records (generation INTEGER, number INTEGER, body BLOB)")
        raw.execute("CREATE UNIQUE INDEX places ON records (generation, number)")
        raw.execute("DELETE FROM meta WHERE name = 'log'")
        digest = 0
        for number, writes in kept.items():
            row = Row(number, key(number))
            for at, write in enumerate(writes):
                raw.execute("INSERT INTO records VALUES (?, ?, ?)", (number, at, write.body))
                row.append(write.body)
                row.size += 44
            row.ended, row.ended_unix_ns = number == 1, NOW_NS if number == 1 else 0
            raw.execute("INSERT INTO generations VALUES (?, ?, ?, ?, ?, ?, ?)", row.values)
            digest += row.digest
        stored = (digest % (1 << 256)).to_bytes(32, "little")
        raw.execute("UPDATE meta SET value = ? WHERE name = 'digest'", (stored,))
        raw.execute("PRAGMA user_version = 2")


def test_a_journal_of_the_schema_before_is_taken_over(tmp_path: Path):
    path = tmp_path / "journal.db"
    schema_2(path)
    store = open_store(path)
    assert content(store) == {key(1): ([0], True), key(2): ([0], False)}
    store.write([token_write(key(2), 1), resume_write(key(1))], wall_ns=NOW_NS)
    store.close()
    again = open_store(path)
    assert content(again) == {key(1): ([0], False), key(2): ([0, 1], False)}
    assert again.first_epoch >= NOW_NS // 10**9
    again.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET body = x'00' WHERE generation = 2 AND number = 1",
        "UPDATE records SET body = 'text' WHERE generation = 2 AND number = 1",
        "DELETE FROM records WHERE generation = 1 AND number = 2",
        "DELETE FROM generations WHERE id = 1",
        "INSERT INTO records VALUES (7, 0, x'00')",
        "DELETE FROM meta WHERE name = 'digest'",
    ],
)
def test_a_damaged_one_is_refused_and_left_as_it_is(tmp_path: Path, statement: str):
    path = tmp_path / "journal.db"
    schema_2(path)
    change(path, statement)
    for _ in range(2):
        with pytest.raises(JournalError, match="damaged"):
            open_store(path)
    with contextlib.closing(sqlite3.connect(path)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (2,)
        assert raw.execute("SELECT count(*) FROM records").fetchone()[0] > 0


# -- going on ---------------------------------------------------------------------------------


def test_an_ended_generation_may_be_resumed_and_is_then_running_again(tmp_path: Path):
    path = tmp_path / "journal.db"
    store = open_store(path)
    keep(store, 1, 2)
    other = keep(store, 2, 1)
    request = key(1)
    store.write([resume_write(request), token_write(request, 2)], wall_ns=NOW_NS)
    assert (store.running, store.ended, store.holds(request)) == (1, 1, True)
    store.close()
    store = open_store(path)  # every sum and chain is verified
    (stored,) = store.unfinished()
    assert (tokens_of(stored), stored.ended) == ([0, 1, 2], False)
    store.write([end_write(request, 3)], wall_ns=NOW_NS)
    assert (store.running, store.ended) == (0, 2)
    store.close()
    store = open_store(path)
    assert (tokens_of(store.read(request)), store.read(request).ended) == ([0, 1, 2], True)
    assert tokens_of(store.read(other)) == [0]
    store.close()


def test_what_was_resumed_is_not_retired_and_what_is_unknown_is_not_resumed(tmp_path: Path):
    store = open_store(tmp_path / "journal.db", generations_max=2)
    first = keep(store, 1, 1)
    keep(store, 2, 1)
    store.write([resume_write(first)], wall_ns=NOW_NS)
    for number in (3, 4, 5):
        keep(store, number, 1)
    assert store.holds(first)
    assert not store.holds(key(2))
    with pytest.raises(JournalError, match="unknown"):
        store.write([resume_write(key(2))], wall_ns=NOW_NS)
    with pytest.raises(JournalError, match="unknown"):
        store.write([token_write(key(5), 1)], wall_ns=NOW_NS)
    assert (store.running, store.ended) == (1, 2)
    store.close()


def test_a_resumption_that_cannot_be_written_leaves_the_end_where_it_was(tmp_path: Path):
    store = open_store(tmp_path / "journal.db")
    request = keep(store, 1, 1)
    with pytest.raises(JournalError):
        store.write([resume_write(request), token_write(key(9), 0)], wall_ns=NOW_NS)
    assert (store.running, store.ended, store.holds(request)) == (0, 1, True)
    assert store.read(request).ended
    keep(store, 2, 1)
    store.close()
    open_store(tmp_path / "journal.db").close()


# -- crashes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Big:
    """File and log of a journal that was never closed, and every state it has been in."""
    path = tmp_path_factory.mktemp("torn") / "journal.db"
    store = open_store(path)
    states = [content(store)]
    for writes in (
        [begin_write(key(1))],
        [token_write(key(1), 0), begin_write(key(2))],
        [token_write(key(1), 1), token_write(key(2), 0)],
        [end_write(key(1), 2)],
        [token_write(key(2), 1), resume_write(key(1))],
        [token_write(key(1), 2)],
    ):
        store.write(writes, wall_ns=NOW_NS)
        states.append(content(store))
    files = path.read_bytes(), path.with_name("journal.db-wal").read_bytes()
    store.close()
    return Big(*files, states)


@relaxed
@given(data=st.data())
def test_a_log_cut_anywhere_gives_a_state_that_the_journal_has_been_in(torn, tmp_path, data):
    file, log, states = torn.of
    for old in tmp_path.iterdir():
        old.unlink()
    cut = data.draw(st.integers(0, len(log)))
    (tmp_path / "journal.db").write_bytes(file)
    (tmp_path / "journal.db-wal").write_bytes(log[:cut])
    store = open_store(tmp_path / "journal.db")
    try:
        assert content(store) in states
        if cut == len(log):
            assert content(store) == states[-1]
    finally:
        store.close()


_WRITER = """
import sys
from pathlib import Path
from tests.services.journal_helpers import *
store = open_store(Path(sys.argv[1]))
for number in range(1, 4):
    store.write([begin_write(key(number))], wall_ns=NOW_NS)
for index in range(100_000):
    for number in range(1, 4):
        store.write([token_write(key(number), index % 50)], wall_ns=NOW_NS)
        print(number, flush=True)
    if index % 7 == 0:
        store.file.checkpoint()
"""


@pytest.mark.parametrize("after", [1, 17, 64])
def test_a_writer_killed_at_any_moment_loses_nothing_it_has_reported(tmp_path: Path, after: int):
    path = tmp_path / "journal.db"
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )
    assert writer.stdout is not None
    reported = [int(writer.stdout.readline()) for _ in range(after)]
    writer.send_signal(signal.SIGKILL)
    reported += [int(line) for line in writer.stdout if line.strip()]
    writer.wait(20)
    writer.stdout.close()
    store = open_store(path)
    try:
        for number in range(1, 4):
            kept = tokens_of(store.read(key(number)))
            assert len(kept) - reported.count(number) in (0, 1)
            assert kept == [index % 50 for index in range(len(kept))]
    finally:
        store.close()


def test_files_copied_from_under_a_writer_are_a_past_state_or_an_error(tmp_path: Path):
    path, copies = tmp_path / "journal.db", 0
    store = open_store(path)
    request = key(1)
    store.write([begin_write(request)], wall_ns=NOW_NS)
    for index in range(60):
        store.write([token_write(request, index)], wall_ns=NOW_NS)
        if index % 9 == 0:
            shutil.copy(path, tmp_path / "early.db")  # the file before the checkpoint …
            store.file.checkpoint()
        if index % 5 == 0:
            folder = tmp_path / f"copy-{index}"
            folder.mkdir()
            shutil.copy(tmp_path / "early.db", folder / "journal.db")
            shutil.copy(tmp_path / "journal.db-wal", folder)  # … the log from behind it
            copies += 1
            try:
                other = open_store(folder / "journal.db")
            except (JournalError, InvalidConfiguration):
                continue
            kept = other.read(request)
            assert kept is None or tokens_of(kept) == list(range(len(tokens_of(kept))))
            other.close()
    assert copies == 12
    store.close()
