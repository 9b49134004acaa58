"""A step's time in its parts, and what is counted of its rows."""

from __future__ import annotations

from stage_worker.step_account import StepAccount
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.guards import Counters

ROWS = (StepRow(b"a" * 16, 3, (1,)), StepRow(b"b" * 16, 5, (2,)))


def account_of(*looks: int) -> tuple[StepAccount, Counters]:
    """An account whose timer shows these, one after the other."""
    counters, timer = Counters(), iter(looks)
    return StepAccount(counters, clock_ns=lambda: 77, timer_ns=lambda: next(timer)), counters


def frame(kind: FrameKind) -> StepFrame:
    return StepFrame(kind, bytes(8), 2, 9, -1, 0, ROWS)


def test_a_step_is_divided_at_its_forward() -> None:
    account, counters = account_of(1000, 1010, 1300, 1320)
    account.begin()
    account.computing()
    account.computed(2)
    timing = account.close(frame(FrameKind.DECODE), ROWS)
    assert (timing.input_ns, timing.compute_ns, timing.output_ns) == (10, 290, 20)
    assert (timing.total_ns, timing.started_unix_ns) == (320, 77)
    assert (timing.epoch, timing.step, timing.rows, timing.tokens) == (2, 9, 2, 2)
    assert (counters["steps"], counters["rows_batched"]) == (1, 2)


def test_a_step_without_a_forward_has_nothing_of_the_step_before() -> None:
    account, counters = account_of(0, 10, 300, 320, 1000, 1005)
    account.begin()
    account.computing()
    account.computed(2)
    account.close(frame(FrameKind.DECODE), ROWS)
    account.begin()
    timing = account.close(frame(FrameKind.CLOSE), ROWS)
    assert (timing.input_ns, timing.compute_ns, timing.output_ns, timing.batched) == (0, 0, 5, 0)
    assert (counters["steps"], counters["rows_batched"]) == (2, 2)


def test_rows_are_counted_as_failed_where_they_failed() -> None:
    account, counters = account_of(0, 0)
    lost = ROWS[1].failed(RowStatus.CACHE_LOST, stage=0, detail="")
    account.begin()
    account.close(frame(FrameKind.DECODE), (ROWS[0], lost))
    assert counters["rows_failed.cache_lost"] == 1
    account, counters = account_of(0, 0)
    account.begin()
    came_failed = StepFrame(FrameKind.DECODE, bytes(8), 2, 9, 0, 1, (ROWS[0], lost))
    account.close(came_failed, (ROWS[0], lost))
    assert counters["rows_failed.cache_lost"] == 0


def test_what_a_score_takes_is_a_cost_of_verifying() -> None:
    account, counters = account_of(0, 5_000)
    account.begin()
    account.close(frame(FrameKind.SCORE), ROWS)
    assert counters["validation_us.shadow"] == 5
