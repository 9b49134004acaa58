"""What a commit makes of a journal is planned before the file is touched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.journal_contents import (
    RETIRED_PER_COMMIT_MAX,
    Batch,
    Contents,
    JournalLimits,
    Write,
)
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
    assert batch.records == [(1, 0, b"a"), (2, 0, b"b"), (1, 1, b"c"), (2, 1, b"d")]
    assert [row.id for row in batch.fresh] == [1, 2]
    assert list(contents.running) == [key(1)]
    assert [row.request for row in contents.ended] == [key(2)]
    assert contents.adds_up
    contents.running[key(1)].records += 1
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
