"""A rendezvous never passes early, never hangs, and says who broke it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.barrier import (
    TRANSITIONS,
    Arrival,
    Barrier,
    BarrierState,
    Trigger,
)
from coordinator.barrier_book import BarrierBook
from coordinator.events import BarrierArrived
from stagemesh.errors import BarrierBroken, InvalidConfiguration
from stagemesh.guards import ARRIVAL_REFUSALS, BARRIER_BREAKS
from stagemesh.topology import WorkerName

A, B, C = WorkerName("a"), WorkerName("b"), WorkerName("c")
FACTS = {"fingerprint": "f1", "span": "0-4"}


def forming(agree=("fingerprint",), expect=None):
    return Barrier("open-route", 7, 1, [A, B, C], 100.0, 110.0, agree=agree, expect=expect)


def test_it_completes_exactly_when_the_last_participant_has_arrived():
    barrier = forming()
    assert barrier.arrive(A, FACTS, 101) is Arrival.COUNTED
    assert barrier.arrive(B, FACTS, 102) is Arrival.COUNTED
    assert (barrier.state, barrier.absent) == (BarrierState.FORMING, (C,))
    assert barrier.arrive(C, FACTS, 103) is Arrival.COUNTED
    assert barrier.outcome().complete
    assert barrier.outcome().ended_at == 103


def test_arriving_again_with_the_same_facts_changes_nothing():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    assert barrier.arrive(A, dict(FACTS), 102) is Arrival.REPEATED
    assert barrier.absent == (B, C)
    barrier.arrive(B, FACTS, 103)
    barrier.arrive(C, FACTS, 104)
    assert barrier.arrive(A, FACTS, 105) is Arrival.REPEATED


def test_arriving_again_with_other_facts_breaks_it():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    assert barrier.arrive(A, {**FACTS, "span": "4-8"}, 102) is Arrival.BROKE
    assert barrier.outcome().cause is Trigger.CONTRADICTED
    assert barrier.outcome().culprits == (A,)
    assert "span" in barrier.outcome().detail


def test_after_the_deadline_it_is_broken_and_names_the_absent_with_their_last_progress():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    barrier.note_progress(B, "computed step 17", 104.0)
    assert not barrier.expire(109.9)
    assert barrier.expire(110.0)
    outcome = barrier.outcome()
    assert outcome.absent == (B, C)
    assert outcome.last_progress[B].text == "computed step 17"
    assert "computed step 17, 6.000 s ago" in outcome.detail
    assert "never heard of" in outcome.detail
    error = outcome.error()
    assert isinstance(error, BarrierBroken)
    assert error.metadata["absent"] == "b,c"


def test_an_arrival_at_or_after_the_deadline_is_late_and_does_not_complete_it():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    barrier.arrive(B, FACTS, 102)
    assert barrier.arrive(C, FACTS, 110.0) is Arrival.LATE
    assert barrier.state is BarrierState.BROKEN


def test_workers_that_disagree_break_it_and_the_odd_one_is_named():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    barrier.arrive(B, FACTS, 102)
    assert barrier.arrive(C, {**FACTS, "fingerprint": "other"}, 103) is Arrival.BROKE
    outcome = barrier.outcome()
    assert (outcome.cause, outcome.culprits) == (Trigger.DISAGREED, (C,))
    assert "fingerprint differs" in outcome.detail


def test_of_two_that_disagree_both_are_named_because_nobody_can_tell():
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    barrier.arrive(B, {"fingerprint": "f2"}, 102)
    assert set(barrier.outcome().culprits) == {A, B}


def test_a_missing_fact_disagrees():
    barrier = forming()
    barrier.arrive(A, {}, 101)
    assert barrier.outcome().culprits == (A,)


def test_an_expected_fact_names_exactly_who_differs():
    barrier = forming(agree=(), expect={"fingerprint": "f1"})
    assert barrier.arrive(A, {"fingerprint": "f9"}, 101) is Arrival.BROKE
    assert barrier.outcome().culprits == (A,)
    assert "expected 'f1'" in barrier.outcome().detail


def test_facts_that_need_not_agree_may_differ():
    barrier = forming()
    for worker, span in ((A, "0-4"), (B, "4-8"), (C, "8-12")):
        barrier.arrive(worker, {"fingerprint": "f1", "span": span}, 101)
    assert barrier.outcome().complete


@pytest.mark.parametrize(
    ("act", "cause"),
    [
        (lambda barrier: barrier.refuse(B, "no memory", 102), Trigger.REFUSED),
        (lambda barrier: barrier.depart(A, "stream ended", 102), Trigger.DEPARTED),
        (lambda barrier: barrier.abandon("route no longer wanted", 102), Trigger.ABANDONED),
    ],
)
def test_refusal_departure_and_abandonment_break_it_at_once(act, cause):
    barrier = forming()
    barrier.arrive(A, FACTS, 101)
    act(barrier)
    assert barrier.outcome().cause is cause
    assert barrier.arrive(C, FACTS, 103) is Arrival.LATE


def test_what_is_given_up_behind_its_deadline_has_expired():
    barrier = forming()
    barrier.abandon("route no longer wanted", 110)
    assert barrier.outcome().cause is Trigger.EXPIRED


def test_strangers_and_other_epochs_and_generations_are_refused():
    barrier = forming()
    assert barrier.arrive(WorkerName("z"), FACTS, 101) is Arrival.STRANGER
    assert barrier.arrive(A, FACTS, 101, epoch=6) is Arrival.WRONG_EPOCH
    assert barrier.arrive(A, FACTS, 101, generation=2) is Arrival.WRONG_GENERATION
    barrier.refuse(WorkerName("z"), "no", 101)
    barrier.depart(WorkerName("z"), "no", 101)
    assert barrier.absent == (A, B, C)
    assert barrier.state is BarrierState.FORMING


def test_an_ended_barrier_never_changes():
    for (state, _trigger), target in TRANSITIONS.items():
        assert state is BarrierState.FORMING
        assert isinstance(target, BarrierState)
    barrier = forming()
    barrier.expire(110)
    barrier.refuse(A, "late", 111)
    assert barrier.outcome().cause is Trigger.EXPIRED


def test_a_barrier_needs_participants_and_a_future_deadline():
    with pytest.raises(InvalidConfiguration):
        Barrier("x", 1, 1, [], 0.0, 1.0)
    with pytest.raises(InvalidConfiguration):
        Barrier("x", 1, 1, [A], 1.0, 1.0)


ACTS = st.tuples(
    st.sampled_from(["arrive", "other", "refuse", "depart", "expire", "stale"]),
    st.sampled_from([A, B, C, WorkerName("z")]),
    st.floats(100, 115),
)


@given(st.lists(ACTS, max_size=30))
def test_it_never_passes_early_and_never_outlives_its_deadline(acts):
    barrier = forming()
    said: dict[WorkerName, set[str]] = {A: set(), B: set(), C: set()}
    spoilt = False
    for act, worker, now in sorted(acts, key=lambda item: item[2]):
        before = barrier.state
        if act == "arrive":
            barrier.arrive(worker, FACTS, now)
            said.setdefault(worker, set()).add("good")
        elif act == "other":
            barrier.arrive(worker, {"fingerprint": "bad"}, now)
            said.setdefault(worker, set()).add("bad")
        elif act == "refuse":
            barrier.refuse(worker, "no", now)
            spoilt = spoilt or worker in (A, B, C)
        elif act == "depart":
            barrier.depart(worker, "gone", now)
            spoilt = spoilt or worker in (A, B, C)
        elif act == "stale":
            barrier.arrive(worker, FACTS, now, epoch=6)
        else:
            barrier.expire(now)
        if before is not BarrierState.FORMING:
            assert barrier.state is before
        elif barrier.state is BarrierState.COMPLETE:
            assert said[A] & said[B] & said[C], "all have arrived and say the same"
            assert not spoilt
            assert now < 110
    barrier.expire(110.0)
    assert barrier.state is not BarrierState.FORMING


def arrival(worker, *, name="open-route", epoch=7, generation=1, refusal="", facts=FACTS):
    return BarrierArrived(worker, name, epoch, generation, facts, refusal)


def test_the_book_routes_arrivals_and_files_what_has_ended():
    book = BarrierBook()
    barrier = book.form("open-route", 7, [A, B], 100.0, timeout_s=5.0)
    assert book.next_deadline == 105.0
    assert book.arrive(arrival(A), 101) == (barrier, Arrival.COUNTED)
    assert book.arrive(arrival(A), 101) == (barrier, Arrival.REPEATED)
    assert book.arrive(arrival(B), 102) == (barrier, Arrival.COUNTED)
    assert (book.forming, book.ended) == ((), (barrier,))
    assert book.arrive(arrival(B), 103) == (barrier, Arrival.REPEATED)
    assert book.counters["barriers_completed"] == 1
    assert book.next_deadline is None


def test_a_broken_rendezvous_is_tried_again_as_a_new_generation_and_old_arrivals_are_refused():
    book = BarrierBook()
    first = book.form("open-route", 7, [A, B], 100.0, timeout_s=5.0, agree=["fingerprint"])
    book.arrive(arrival(A), 101)
    assert book.expire(105.0) == [first]
    second = book.form("open-route", 7, [A, B], 106.0, timeout_s=5.0, generation=2)
    assert book.arrive(arrival(B), 106)[1] is Arrival.LATE
    assert second.absent == (A, B)
    book.arrive(arrival(A, generation=2), 107)
    book.arrive(arrival(B, generation=2), 107)
    assert second.outcome().complete


def test_every_break_and_every_refused_arrival_is_counted():
    book = BarrierBook()

    def begin(epoch):
        return book.form("x", epoch, [A, B], 0.0, timeout_s=5.0, agree=["fingerprint"])

    begin(1)
    book.arrive(arrival(A, name="x", epoch=1, refusal="no memory"), 1)
    begin(2)
    book.depart(A, "gone", 1)
    begin(3)
    book.arrive(arrival(A, name="x", epoch=3), 1)
    book.arrive(arrival(B, name="x", epoch=3, facts={"fingerprint": "f2"}), 1)
    begin(4)
    book.arrive(arrival(A, name="x", epoch=4), 1)
    book.arrive(arrival(A, name="x", epoch=4, facts={"fingerprint": "f2"}), 1)
    book.abandon(begin(5), "not needed", 1)
    begin(6)
    assert book.arrive(arrival(A, name="x", epoch=99), 1)[1] is Arrival.WRONG_EPOCH
    assert book.arrive(arrival(A, name="x", epoch=6, generation=2), 1)[1] is (
        Arrival.WRONG_GENERATION
    )
    assert book.arrive(arrival(A, name="unheard"), 1)[1] is Arrival.UNKNOWN
    assert book.arrive(arrival(WorkerName("z"), name="x", epoch=6), 1)[1] is Arrival.STRANGER
    assert book.arrive(arrival(B, name="x", epoch=2), 1)[1] is Arrival.LATE
    book.expire(5.0)
    for reason in BARRIER_BREAKS:
        assert book.counters[f"barriers_broken.{reason}"] == 1, reason
    for reason in ARRIVAL_REFUSALS:
        assert book.counters[f"arrivals_refused.{reason}"] == 1, reason
    assert not book.counters.unregistered()


def test_the_book_counts_how_long_was_waited_by_how_it_ended():
    book = BarrierBook()
    book.form("x", 1, [A, B], 10.0, timeout_s=5.0)
    book.arrive(arrival(A, name="x", epoch=1), 10.5)
    book.arrive(arrival(B, name="x", epoch=1), 12.0)
    for epoch in (2, 3):
        book.form("x", epoch, [A], 20.0, timeout_s=0.25)
    book.expire(20.25)
    waited = {name: n for name, n in book.counters.items() if name.startswith("barrier_wait")}
    assert waited == {"barrier_wait_us.complete": 2_000_000, "barrier_wait_us.broken": 500_000}
    assert not book.counters.unregistered()


def test_the_book_is_bounded_and_shows_forming_ones_first():
    book = BarrierBook(ended_kept=3)
    for epoch in range(10):
        book.form("x", epoch, [A], 0.0, timeout_s=1.0)
        book.expire(1.0)
    book.form("y", 1, [A], 2.0, timeout_s=1.0)
    book.note_progress(A, "loading", 2.5)
    assert [outcome.name for outcome in book.outcomes()] == ["y", "x", "x", "x"]
    assert book.outcomes()[0].last_progress[A].text == "loading"
    assert str(book.outcomes()[0]) == "barrier y epoch=1 generation=1 forming absent=a"


def test_a_second_barrier_with_the_same_key_is_refused_while_the_first_forms():
    book = BarrierBook()
    book.form("x", 1, [A], 0.0, timeout_s=1.0)
    with pytest.raises(InvalidConfiguration):
        book.form("x", 1, [A], 0.0, timeout_s=1.0)


def test_a_refusal_without_end_is_cut():
    barrier = forming()
    barrier.refuse(A, "x" * 10_000, 101)
    assert barrier.outcome().culprits == (A,)
    assert 1000 < len(barrier.outcome().detail) < 1100
