"""What a commit makes of a journal is planned before the file is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.journal_contents import (
    RETIRED_PER_COMMIT_MAX,
    Batch,
    Contents,
    JournalLimits,
    Replay,
    Write,
)
from services.journal_rows import Row
from stagemesh.errors import JournalError
from tests.services.journal_helpers import key


def written(
    contents: Contents,
    writes: Sequence[Write],
    *,
    wall_ns: int = 1,
    limits: JournalLimits | None = None,
) -> Batch:
    batch = contents.plan(writes, limits or JournalLimits(), wall_ns=wall_ns)
    contents.apply(batch)
    return batch


def test_what_was_planned_and_not_committed_has_not_happened():
    contents = Contents()
    written(contents, [Write(key(1), b"request", begins=True)])
    before = (contents.digest, contents.size, contents.next_id, contents.running[key(1)].copy())
    contents.plan(
        [
            Write(key(1), b"token", ends=True),
            Write(key(2), b"request", begins=True),
        ],
        JournalLimits(),
        wall_ns=2,
    )
    assert (contents.digest, contents.size, contents.next_id) == before[:3]
    assert contents.running == {key(1): before[3]}
    assert not contents.ended
    assert not contents.holds(key(2))
    assert contents.adds_up


def test_a_batch_numbers_each_generations_records_and_keeps_the_sum_of_their_digests():
    contents = Contents()
    batch = written(
        contents,
        [
            Write(key(1), b"a", begins=True),
            Write(key(2), b"b", begins=True),
            Write(key(1), b"c"),
            Write(key(2), b"d", ends=True),
        ],
    )
    assert [(row.id, row.records) for row in batch.touched] == [(1, 2), (2, 2)]
    assert [(row.id, batch.bodies(row)) for row in batch.saves] == [(2, [b"b", b"d"])]
    assert list(contents.running) == [key(1)]
    assert [row.request for row in contents.ended] == [key(2)]
    assert contents.adds_up
    contents.ended[0].saved += 1
    assert not contents.adds_up


def test_the_oldest_ended_generations_go_first_and_a_bounded_number_at_a_time():
    contents = Contents()
    count = RETIRED_PER_COMMIT_MAX + 5
    for number in range(count):
        written(contents, [Write(key(number), b"x", begins=True, ends=True)], wall_ns=number)
    running = Write(key(count), b"x", begins=True)
    tight = JournalLimits(generations_max=2)
    batch = written(contents, [running], wall_ns=count, limits=tight)
    assert [row.request for row in batch.over] == [key(n) for n in range(RETIRED_PER_COMMIT_MAX)]
    assert len(contents.ended) == 5
    assert not contents.holds(key(0))
    assert contents.holds(key(count))
    written(contents, [Write(key(count), b"y")], wall_ns=count, limits=tight)
    assert [row.request for row in contents.ended] == [key(count - 2), key(count - 1)]
    assert contents.adds_up


def test_what_goes_on_is_no_longer_among_the_ended():
    contents = Contents()
    written(contents, [Write(key(1), b"x", begins=True, ends=True)])
    with pytest.raises(JournalError, match="unknown generation"):
        contents.plan([Write(key(1), b"y")], JournalLimits(), wall_ns=2)
    written(contents, [Write(key(1), b"y", resumes=True)])
    assert list(contents.running) == [key(1)]
    assert not contents.ended
    assert contents.adds_up


def test_a_record_behind_an_end_in_the_same_batch_belongs_nowhere():
    contents = Contents()
    writes = [Write(key(1), b"x", begins=True, ends=True), Write(key(1), b"y")]
    with pytest.raises(JournalError, match="where none belongs"):
        contents.plan(writes, JournalLimits(), wall_ns=1)


def test_an_empty_log_leaves_whatever_runs_in_rows_of_their_own():
    contents = Contents()
    written(contents, [Write(key(1), b"a", begins=True), Write(key(2), b"b", begins=True)])
    written(contents, [Write(key(2), b"c", ends=True)])
    assert contents.log_bytes > 0
    batch = contents.folded(contents.plan((), JournalLimits(), wall_ns=2))
    assert [(row.request, batch.bodies(row)) for row in batch.saves] == [(key(1), [b"a"])]
    contents.apply(batch)
    assert contents.log_bytes == 0
    assert contents.log_number == 2
    assert contents.adds_up
    assert contents.running[key(1)].saved
    again = contents.folded(contents.plan((), JournalLimits(), wall_ns=3))
    assert not again.saves  # nothing has changed


def test_a_generation_that_is_known_does_not_begin_again():
    contents = Contents()
    written(contents, [Write(key(1), b"a", begins=True), Write(key(2), b"b", begins=True)])
    written(contents, [Write(key(2), b"c", ends=True)])
    for known in (key(1), key(2)):
        with pytest.raises(JournalError, match="begins twice"):
            contents.plan([Write(known, b"x", begins=True)], JournalLimits(), wall_ns=3)


class File:
    """What a journal's tables would hold, without SQLite."""

    def __init__(self) -> None:
        self.rows: dict[int, tuple[Row, list[bytes]]] = {}
        self.log: list[bytes] = []

    def commit(self, batch: Batch) -> None:
        for row in batch.over:
            self.rows.pop(row.id, None)
        self.log = [] if batch.log is None else [*self.log, batch.log.entries]
        for row in batch.saves:
            kept = replace(row.copy(), saved=row.digest)
            self.rows[row.id] = kept, batch.bodies(row)

    def replayed(self) -> dict[int, Row]:
        rows = {}
        for number, (row, bodies) in self.rows.items():
            rows[number] = replace(row.copy(), bodies=[] if row.ended else list(bodies))
        replay = Replay(rows, lambda row: list(self.rows[row.id][1]))
        for entries in self.log:
            replay.add(entries)
        replay.close()
        return replay.rows


def known_ops(contents: Contents, number: int, action: str) -> list[Write]:
    """``action`` on a request, as far as it makes sense; nothing otherwise."""
    request, body = key(number), f"{action} {number}".encode()
    if request in contents.running:
        return [Write(request, body, ends=action == "end")] if action != "begin" else []
    if request in contents.ended_requests:
        return [Write(request, body, resumes=True)] if action == "resume" else []
    return [Write(request, body, begins=True)] if action == "begin" else []


actions = st.tuples(st.integers(1, 5), st.sampled_from(["begin", "token", "end", "resume"]))
commits = st.lists(st.one_of(st.lists(actions, min_size=1, max_size=6), st.none()), max_size=40)


@given(commits=commits, most=st.integers(0, 3))
def test_the_log_gives_back_what_was_committed_wherever_it_was_emptied(commits, most):
    contents, file, limits = Contents(), File(), JournalLimits(generations_max=most)
    for when, commit in enumerate(commits):
        writes: list[Write] = []
        for number, action in commit or ():
            if not any(one.request == key(number) for one in writes):
                writes += known_ops(contents, number, action)
        for one in writes:
            row = contents.ended_row(one.request) if one.resumes else None
            if row is not None:
                row.bodies = list(file.rows[row.id][1])
        batch = contents.plan(writes, limits, wall_ns=when)
        batch = contents.folded(batch) if commit is None else batch
        file.commit(batch)
        contents.apply(batch)
        found = file.replayed()
        assert found == {row.id: row for row in contents.rows}
        assert contents.adds_up


@pytest.mark.parametrize(("kept", "says"), [((1, 2, 3), "missing"), ((0, 3), "gap")])
def test_a_log_without_some_of_its_rows_is_found(kept: tuple[int, ...], says: str):
    contents = Contents()
    writes = [Write(key(1), b"a", begins=True), *(Write(key(1), b"b"),) * 3]
    log = [written(contents, [write]).log for write in writes]
    replay = Replay({}, lambda row: [])

    def read() -> None:
        for number in kept:
            replay.add(log[number].entries)
        replay.close()

    with pytest.raises(JournalError, match=says):
        read()
