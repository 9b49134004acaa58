"""Offsets without holes, repeats recognised, and gaps said aloud."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.topics import (
    ATTRIBUTES_MAX,
    Gap,
    Topic,
    TopicEvent,
    TopicLimits,
    TopicRouter,
)
from stagemesh.errors import InvalidRequest, Overloaded


def event(topic: Topic = Topic.RECOVERY, **fields) -> TopicEvent:
    return TopicEvent(topic, fields.pop("type", "Rerouted"), **fields)


def filled(count: int, **limits) -> TopicRouter:
    router = TopicRouter(TopicLimits(**limits))
    for number in range(count):
        router.publish(event(attributes={"n": str(number)}), time_unix_ns=number)
    return router


def test_offsets_are_consecutive_from_one_in_each_topic():
    router = TopicRouter()
    offsets = [router.publish(event(topic), time_unix_ns=1).offset for topic in Topic for _ in "ab"]
    assert offsets == [1, 2] * len(Topic)
    assert router.next_offset(Topic.BARRIER) == 3
    assert router.oldest_offset(Topic.BARRIER) == 1


def test_what_is_read_carries_offset_time_and_a_checksum_that_holds():
    router = TopicRouter()
    router.publish(event(worker="s1", request=b"\1" * 16), time_unix_ns=77)
    (read,) = router.read(Topic.RECOVERY, 1)
    assert (read.offset, read.time_unix_ns, read.sequence) == (1, 77, 1)
    assert read.verifies()


@pytest.mark.parametrize(
    "change",
    [
        {"topic": Topic.BARRIER},
        {"offset": 2},
        {"time_unix_ns": 78},
        {"type": "Rerouteds"},
        {"worker": "s2"},
        {"request": b"\2" * 16},
        {"publisher": "w"},
        {"sequence": 9},
        {"attributes": {"kep": "t5"}},
        {"attributes": {}},
    ],
)
def test_an_event_altered_in_any_field_does_not_verify(change):
    good = event(
        worker="s1",
        request=b"\1" * 16,
        attributes={"kept": "5"},
        sequence=3,
        offset=1,
        time_unix_ns=77,
    ).sealed()
    assert good.verifies()
    assert not replace(good, **change).verifies()


def test_a_repeated_publication_is_answered_with_its_first_offset():
    router = TopicRouter()
    first = event(publisher="worker-1/abc", sequence=1)
    assert router.publish(first, time_unix_ns=1).offset == 1
    again = router.publish(first, time_unix_ns=2)
    assert (again.offset, again.duplicate) == (1, True)
    assert len(router.read(Topic.RECOVERY, 1)) == 1
    assert router.publish(replace(first, publisher="worker-2/abc"), time_unix_ns=3).offset == 2
    assert router.counters["events_duplicate"] == 1


def test_a_sequence_belongs_to_one_topic():
    router = TopicRouter()
    router.publish(event(publisher="w", sequence=1), time_unix_ns=1)
    with pytest.raises(InvalidRequest):
        router.publish(event(Topic.BARRIER, publisher="w", sequence=1), time_unix_ns=1)


def test_memory_of_repeats_is_bounded_and_what_is_forgotten_is_refused_not_guessed():
    router = TopicRouter(TopicLimits(repeats_kept=2, publishers_max=2))
    for sequence in range(1, 6):
        router.publish(event(publisher="w", sequence=sequence), time_unix_ns=1)
    assert router.publish(event(publisher="w", sequence=5), time_unix_ns=1).duplicate
    with pytest.raises(InvalidRequest, match="too old"):
        router.publish(event(publisher="w", sequence=1), time_unix_ns=1)
    for name in ("x", "y"):
        router.publish(event(publisher=name, sequence=1), time_unix_ns=1)
    assert not router.publish(event(publisher="w", sequence=5), time_unix_ns=1).duplicate


def test_retention_is_bounded_by_count_and_readers_are_told_what_they_missed():
    router = filled(10, retained_events_max=4)
    read = router.read(Topic.RECOVERY, 3)
    assert read[0] == Gap(Topic.RECOVERY, 3, 6)
    assert [item.offset for item in read[1:]] == [7, 8, 9, 10]
    assert router.read(Topic.RECOVERY, 7)[0].offset == 7
    assert router.counters["events_evicted"] == 6
    assert router.counters["event_gaps"] == 1


def test_retention_is_bounded_by_bytes_and_keeps_at_least_the_newest():
    size = len(event(attributes={"n": "0"}, sequence=1).pack())
    router = filled(8, retained_bytes_max=3 * size)
    assert router.oldest_offset(Topic.RECOVERY) == 6
    tiny = filled(3, retained_bytes_max=1)
    assert [item.offset for item in tiny.read(Topic.RECOVERY, 3)] == [3]


def test_events_over_a_limit_are_refused_and_counted():
    router = TopicRouter()
    with pytest.raises(Overloaded):
        router.publish(event(attributes={"x": "y" * 70_000}), time_unix_ns=1)
    many = {str(number): "" for number in range(ATTRIBUTES_MAX + 1)}
    with pytest.raises(Overloaded):
        router.publish(event(attributes=many), time_unix_ns=1)
    assert router.counters["events_refused"] == 2
    assert router.next_offset(Topic.RECOVERY) == 1


@pytest.mark.parametrize(
    "bad", [{"type": ""}, {"publisher": "", "sequence": 1}, {"publisher": "w", "sequence": 0}]
)
def test_malformed_events_are_refused(bad):
    with pytest.raises(InvalidRequest):
        TopicRouter().publish(event(**bad), time_unix_ns=1)


def test_offsets_below_one_are_refused_and_future_ones_yield_nothing():
    router = filled(2)
    with pytest.raises(InvalidRequest):
        router.read(Topic.RECOVERY, 0)
    assert router.read(Topic.RECOVERY, 3) == []
    assert router.read(Topic.RECOVERY, 99) == []


def test_topics_are_parsed_by_name():
    assert Topic.parse("recovery") is Topic.RECOVERY
    with pytest.raises(InvalidRequest):
        Topic.parse("gossip")


def test_a_subscription_from_now_sees_only_what_is_new_and_can_be_resumed():
    router = filled(3)
    live = router.subscribe([Topic.RECOVERY, Topic.BARRIER])
    assert live.poll() == []
    router.publish(event(Topic.BARRIER), time_unix_ns=20)
    router.publish(event(), time_unix_ns=10)
    assert [(e.topic, e.offset) for e in live.poll()] == [(Topic.RECOVERY, 4), (Topic.BARRIER, 1)]
    assert live.offsets == {Topic.RECOVERY: 5, Topic.BARRIER: 2}
    everything = router.subscribe(from_offset=1)
    assert len(everything.poll()) == 5


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 5))
def test_a_reader_of_any_speed_sees_each_offset_once_as_an_event_or_in_a_gap(speeds, retained):
    router = TopicRouter(TopicLimits(retained_events_max=retained))
    reader = router.subscribe([Topic.RECOVERY], from_offset=1)
    seen: list[int] = []
    for burst in [*speeds, 0]:
        for _ in range(burst):
            router.publish(event(), time_unix_ns=1)
        for item in reader.poll():
            seen += range(item.first, item.last + 1) if isinstance(item, Gap) else [item.offset]
    assert seen == list(range(1, router.next_offset(Topic.RECOVERY)))


def test_a_reader_from_an_earlier_life_of_the_router_misses_nothing_that_is_kept():
    router = filled(3)
    assert [item.offset for item in router.subscribe([Topic.RECOVERY], from_offset=500).poll()] == [
        1,
        2,
        3,
    ]
    following = router.subscribe([Topic.RECOVERY], from_offset=4)
    assert following.poll() == []
    router.publish(event(), time_unix_ns=9)
    assert [item.offset for item in following.poll()] == [4]


def test_a_publisher_of_a_name_without_end_is_refused_and_not_remembered():
    router = TopicRouter()
    with pytest.raises(Overloaded, match="publisher_characters_max"):
        router.publish(event(publisher="w" * 257, sequence=1), time_unix_ns=1)
    assert router.counters["events_refused"] == 1
    assert not router._publishers
