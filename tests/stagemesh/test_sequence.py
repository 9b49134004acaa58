"""Order within an epoch, and what an end marker proves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.errors import (
    DuplicateFrame,
    EpochFenced,
    EpochNotOpen,
    InvalidConfiguration,
    SequenceGap,
)
from stagemesh.sequence import End, Order, SequenceGate, SequenceIntegrityChecker


def test_gate_lets_only_the_next_step_through():
    gate = SequenceGate(epoch=3)
    assert gate.admit(3, 1) is Order.NEXT
    assert gate.admit(3, 1) is Order.DUPLICATE
    assert gate.admit(3, 3) is Order.GAP
    assert gate.admit(3, 2) is Order.NEXT
    assert (gate.next_step, gate.last_step) == (3, 2)


def test_gate_fences_older_epochs_and_refuses_newer_ones():
    gate = SequenceGate(epoch=3)
    assert gate.judge(2, 1) is Order.STALE_EPOCH
    assert gate.judge(4, 1) is Order.UNKNOWN_EPOCH
    assert gate.next_step == 1


def test_gate_says_which_steps_to_ask_for_again():
    gate = SequenceGate(epoch=1, next_step=5)
    assert list(gate.missing(8)) == [5, 6, 7]
    assert list(gate.missing(4)) == []


@pytest.mark.parametrize(
    ("epoch", "step", "error"),
    [(2, 9, DuplicateFrame), (2, 11, SequenceGap), (1, 10, EpochFenced), (3, 10, EpochNotOpen)],
)
def test_gate_raises_the_typed_error_of_each_verdict(epoch, step, error):
    gate = SequenceGate(epoch=2, next_step=10)
    with pytest.raises(error):
        gate.require(epoch, step)
    gate.require(2, 10)
    assert gate.next_step == 11


def test_gate_reopens_only_at_a_newer_epoch():
    gate = SequenceGate(epoch=2, next_step=10)
    with pytest.raises(EpochFenced):
        gate.reopen(2)
    gate.reopen(3)
    assert (gate.epoch, gate.next_step) == (3, 1)


@given(st.lists(st.integers(1, 12), max_size=60))
def test_whatever_arrives_a_gate_admits_each_step_once_and_in_order(steps):
    gate = SequenceGate(epoch=1)
    admitted = [step for step in steps if gate.admit(1, step) is Order.NEXT]
    assert admitted == list(range(1, len(admitted) + 1))


def test_a_lost_head_is_seen_at_the_first_item():
    checker = SequenceIntegrityChecker(first=0)
    assert checker.observe(2) is Order.GAP
    assert list(checker.missing(2)) == [0, 1]


def test_a_lost_tail_is_seen_at_the_end_marker():
    checker = SequenceIntegrityChecker()
    for number in range(5):
        assert checker.observe(number) is Order.NEXT
    assert checker.finish(7) is End.TAIL_LOST
    assert checker.observe(5, count=2) is Order.NEXT
    assert checker.finish(7) is End.COMPLETE


def test_a_stream_of_which_nothing_arrived_has_lost_its_head():
    assert SequenceIntegrityChecker().finish(3) is End.HEAD_LOST
    assert SequenceIntegrityChecker().finish(0) is End.COMPLETE


def test_more_items_than_the_end_marker_admits_are_excess():
    checker = SequenceIntegrityChecker()
    checker.observe(0, count=3)
    assert checker.finish(3) is End.COMPLETE
    assert checker.observe(3) is Order.EXCESS
    assert checker.finish(2) is End.EXCESS
    assert checker.report.excess == 2


def test_what_was_given_up_is_never_complete():
    checker = SequenceIntegrityChecker(first=10)
    checker.observe(10)
    assert list(checker.skip_to(13)) == [11, 12]
    checker.observe(13)
    assert checker.finish(4) is End.HOLES
    assert checker.report.lost == 2

    headless = SequenceIntegrityChecker()
    headless.skip_to(1)
    headless.observe(1)
    assert headless.finish(2) is End.HEAD_LOST
    assert headless.report.head_lost


def test_positions_go_on_across_epochs_and_old_epochs_are_fenced():
    checker = SequenceIntegrityChecker(epoch=1, follow_epochs=True)
    assert checker.observe(0, epoch=1) is Order.NEXT
    assert checker.observe(1, epoch=4) is Order.NEXT
    assert checker.observe(2, epoch=1) is Order.STALE_EPOCH
    assert checker.observe(2, epoch=4) is Order.NEXT
    assert checker.report.fenced == 1


def test_steps_start_over_when_an_epoch_begins():
    checker = SequenceIntegrityChecker(first=1, epoch=1)
    checker.observe(1, epoch=1)
    assert checker.observe(1, epoch=2) is Order.UNKNOWN_EPOCH
    checker.begin_epoch(2, first=1)
    assert checker.observe(1, epoch=2) is Order.NEXT
    with pytest.raises(EpochFenced):
        checker.begin_epoch(2)


def test_withdrawn_items_are_expected_again():
    checker = SequenceIntegrityChecker()
    checker.observe(0, count=6)
    checker.rewind_to(4)
    assert checker.observe(5) is Order.GAP
    assert checker.observe(4, count=2) is Order.NEXT
    with pytest.raises(InvalidConfiguration):
        checker.rewind_to(7)


def test_a_sequence_cannot_start_below_zero():
    with pytest.raises(InvalidConfiguration):
        SequenceIntegrityChecker(first=-1)


@given(st.integers(1, 40), st.data())
def test_any_single_fault_in_a_stream_is_detected(total, data):
    """Drop (head, middle, tail), repeat or swap one item: never 'complete without a remark'."""
    numbers = list(range(total))
    fault = data.draw(
        st.sampled_from(["drop", "repeat", "swap"] if total > 1 else ["drop", "repeat"])
    )
    index = data.draw(st.integers(0, total - (2 if fault == "swap" else 1)))
    if fault == "drop":
        del numbers[index]
    elif fault == "repeat":
        numbers.insert(index, numbers[index])
    else:
        numbers[index], numbers[index + 1] = numbers[index + 1], numbers[index]
    checker = SequenceIntegrityChecker()
    orders = [checker.observe(number) for number in numbers]
    end = checker.finish(total)
    assert end is not End.COMPLETE or any(order is not Order.NEXT for order in orders)


@given(st.lists(st.integers(0, 20), max_size=80))
def test_counts_always_add_up(numbers):
    checker = SequenceIntegrityChecker()
    for number in numbers:
        if checker.observe(number) is Order.GAP and number % 3 == 0:
            checker.skip_to(number)
        report = checker.report
        assert report.accepted + report.lost == report.next_number - report.first
    assert str(checker).startswith("sequence epoch=0")


def test_a_stream_of_any_length_takes_the_same_memory():
    """Whatever it meets: what it keeps is numbers, and as many as at the start."""
    checker = SequenceIntegrityChecker(follow_epochs=True)

    def kept():
        return {name: getattr(checker, name) for name in checker.__slots__}

    before = kept()
    for number in range(3000):
        checker.observe(number, epoch=number // 100)
        checker.observe(number // 2, epoch=number // 100)
        checker.observe(number + 50)
        checker.observe(number, epoch=0)
        if number % 7 == 0:
            checker.skip_to(number + 2)
    assert checker.report.duplicates > 0 < checker.report.gaps
    assert checker.report.fenced > 0 < checker.report.lost
    assert kept().keys() == before.keys()
    assert all(isinstance(value, int | None) for value in kept().values())
