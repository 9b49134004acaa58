"""What a route owes: one answer to each step, in order."""

import pytest

from coordinator.memory_worker import worker_info
from coordinator.step_book import SentRow, StepBook
from coordinator.step_size import StepSize
from coordinator.step_times import StepTimes
from stagemesh.frame import FrameKind, StepRow
from stagemesh.topology import Epoch, Route


@pytest.fixture
def book():
    workers = (worker_info("stage-0", "0-4", layer_count=4),)
    return StepBook(Route(Epoch(1), workers), StepTimes(1.0), StepSize(64))


def send(book, kind, now=0.0):
    return book.send(kind, (SentRow(StepRow(bytes(16), 0, (1,)), None, 0),), now).step


def test_a_step_settles_only_if_it_is_the_oldest(book):
    first, second = (send(book, FrameKind.PREFILL) for _ in range(2))
    assert book.oldest.frame.step == first
    assert book.settle(second, 1.0) is None
    assert book.settle(first, 1.0) is not None
    assert book.settle(first, 1.0) is None
    assert book.oldest.frame.step == second


def test_steps_that_clean_up_are_answered_in_order_and_take_no_place(book):
    kinds = [FrameKind.PREFILL, FrameKind.DECODE, FrameKind.CLOSE, FrameKind.REWIND]
    steps = [send(book, kind) for kind in kinds]
    assert steps == [1, 2, 3, 4]
    assert (book.in_flight, book.prefills_in_flight, book.decodes_in_flight) == (2, 1, 1)
    for step in steps:
        assert book.settle(step, 1.0) is not None
        assert book.check() == []
    assert (book.in_flight, book.prefills_in_flight, book.decodes_in_flight) == (0, 0, 0)
    assert book.oldest is None


def test_a_step_has_had_the_route_only_since_the_one_before_it_came_back(book):
    first, second = send(book, FrameKind.DECODE, now=10.0), send(book, FrameKind.DECODE, now=10.5)
    book.settle(first, 12.0)
    assert book.last_step_s == 2.0
    book.settle(second, 13.0)
    assert book.last_step_s == 1.0
    third = send(book, FrameKind.DECODE, now=20.0)
    book.settle(third, 20.25)
    assert book.last_step_s == 0.25


def test_a_book_that_lost_count_says_so(book):
    send(book, FrameKind.DECODE)
    book.in_flight = book.decodes_in_flight = 0
    book.next_step += 1
    assert book.check() == [
        "last sent is newest",
        "in flight is what was sent",
        "decodes in flight are what was sent",
    ]
