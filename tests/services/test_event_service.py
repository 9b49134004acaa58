"""EventService over a real connection: following from now, from the start, through a gap;
publishing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from coordinator.instructions import PublishEvent
from coordinator.topics import Topic, TopicEvent, TopicLimits, TopicRouter
from services import event_service
from services.channel import open_channel
from services.client import MeshClient
from services.event_checker import EventChecker
from services.event_codec import event_to_proto, foreign_event
from services.event_service import EventHub, EventService
from services.rpc_errors import to_mesh_error
from services.server import MeshServer, ServerOptions
from stagemesh import errors
from stagemesh.v1 import event_service_pb2 as pb
from stagemesh.v1 import event_service_pb2_grpc as rpc

LIMIT_S = 20.0
REQUEST = bytes(range(16))


def run(
    scenario: Callable[[EventHub, rpc.EventServiceStub], Awaitable[None]],
    router: TopicRouter | None = None,
) -> None:
    async def bounded() -> None:
        server = MeshServer(ServerOptions("127.0.0.1:0"))
        hub = EventHub(router, wall_clock_ns=lambda: 42)
        server.add(rpc.add_EventServiceServicer_to_server, EventService(hub))
        await server.start()
        async with asyncio.timeout(LIMIT_S), open_channel(server.address) as channel:
            await scenario(hub, rpc.EventServiceStub(channel))
        await server.drain(0)

    asyncio.run(bounded())


def fact(number: int, topic: str = "recovery") -> PublishEvent:
    return PublishEvent(topic, f"Fact{number}", REQUEST, "stage-1", {"number": str(number)})


def test_a_follower_from_the_start_reads_what_was_and_then_what_comes() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        hub.publish(fact(1))
        call = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
        first = (await call.read()).event
        assert (first.type, first.offset, first.time_unix_ns) == ("Fact1", 1, 42)
        assert first.request_id == "00010203-0405-0607-0809-0a0b0c0d0e0f"
        hub.publish(fact(2))
        assert (await call.read()).event.attributes["number"] == "2"

    run(scenario)


def test_the_topics_are_those_of_the_protocol_and_each_can_be_followed_alone() -> None:
    names = {f"TOPIC_{topic.name}": topic.value for topic in Topic}
    assert names == {name: value for name, value in pb.Topic.items() if value}
    assert {topic.name.lower() for topic in Topic} == {
        "membership",
        "generation",
        "integrity",
        "recovery",
        "barrier",
        "diagnostics",
    }

    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        for topic in Topic:
            hub.publish(fact(int(topic), topic.name.lower()))
        for topic in Topic:
            call = stub.Subscribe(pb.SubscribeRequest(topics=[topic], from_offset=1))
            event = (await call.read()).event
            assert (event.topic, event.offset, event.type) == (topic, 1, f"Fact{topic:d}")
            call.cancel()

    run(scenario)


def test_a_follower_gets_only_the_topics_it_asked_for() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        call = stub.Subscribe(pb.SubscribeRequest(topics=[pb.TOPIC_INTEGRITY], from_offset=1))
        hub.publish(fact(1))
        hub.publish(fact(2, "integrity"))
        assert (await call.read()).event.type == "Fact2"

    run(scenario)


def test_a_follower_that_is_too_slow_is_told_exactly_what_it_missed() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        for number in range(5):
            hub.publish(fact(number))
        call = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
        gap = (await call.read()).gap
        assert (gap.topic, gap.first_offset, gap.last_offset) == (pb.TOPIC_RECOVERY, 1, 3)
        assert (await call.read()).event.offset == 4

    run(scenario, TopicRouter(TopicLimits(retained_events_max=2)))


def test_a_repeated_publication_is_answered_with_the_offset_of_the_first() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        event = pb.Event(topic=pb.TOPIC_DIAGNOSTICS, type="Seen", publisher="probe", sequence=1)
        first = await stub.Publish(pb.PublishRequest(event=event))
        again = await stub.Publish(pb.PublishRequest(event=event))
        assert (first.offset, first.duplicate) == (1, False)
        assert (again.offset, again.duplicate) == (1, True)

    run(scenario)


@pytest.mark.parametrize(
    "event",
    [
        pb.Event(topic=pb.TOPIC_RECOVERY, type="A", publisher="coordinator", sequence=1),
        pb.Event(type="A", publisher="probe", sequence=1),
        pb.Event(topic=pb.TOPIC_RECOVERY, type="A", publisher="p", sequence=1, request_id="x"),
        pb.Event(topic=pb.TOPIC_RECOVERY, publisher="probe", sequence=1),
    ],
)
def test_an_event_that_is_malformed_or_poses_as_the_coordinators_is_refused(
    event: pb.Event,
) -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        with pytest.raises(grpc.RpcError) as refused:
            await stub.Publish(pb.PublishRequest(event=event))
        assert isinstance(to_mesh_error(refused.value), errors.InvalidRequest)

    run(scenario)


def test_a_fact_the_router_refuses_does_not_stop_the_coordinator() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        hub.publish(PublishEvent("weather", "Rain"))
        hub.publish(fact(1))
        assert hub.router.next_offset(hub.router.read(pb.TOPIC_RECOVERY, 1)[0].topic) == 2

    run(scenario)


def test_a_foreign_event_keeps_its_request_as_bytes_and_none_of_the_routers_own_facts() -> None:
    event = pb.Event(
        topic=pb.TOPIC_RECOVERY,
        type="A",
        publisher="probe",
        sequence=1,
        request_id="00010203-0405-0607-0809-0a0b0c0d0e0f",
        offset=9,
        time_unix_ns=9,
        checksum=9,
    )
    expected = TopicEvent(Topic.RECOVERY, "A", REQUEST, publisher="probe", sequence=1)
    assert foreign_event(event) == expected


def test_a_follower_that_reads_nothing_holds_up_neither_the_mesh_nor_other_followers() -> None:
    """Far more than any buffer on the way takes: who reads gets all of it meanwhile, and who comes
    late is told what it missed."""
    count, kept = 3000, 100

    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        wide = {"filling": "x" * 2000}
        idle = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
        eager = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
        hub.publish(fact(0))
        assert (await idle.read()).event.offset == 1
        assert (await eager.read()).event.offset == 1
        for number in range(2, count + 1):
            hub.publish(PublishEvent("recovery", "Wide", REQUEST, "stage-1", wide))
            assert (await eager.read()).event.offset == number
        seen = [await idle.read()]
        while not seen[-1].HasField("gap") and seen[-1].event.offset < count:
            seen.append(await idle.read())
        assert seen[-1].HasField("gap")
        assert seen[-1].gap.first_offset == len(seen) + 1
        assert (await idle.read()).event.offset == seen[-1].gap.last_offset + 1

    run(scenario, TopicRouter(TopicLimits(retained_events_max=kept)))


def test_followers_are_bounded_and_one_that_leaves_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(event_service, "FOLLOWERS_MAX", 1)

    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        hub.publish(fact(1))
        first = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
        assert (await first.read()).event.offset == 1
        with pytest.raises(grpc.RpcError) as refused:
            await stub.Subscribe(pb.SubscribeRequest(from_offset=1)).read()
        assert isinstance(to_mesh_error(refused.value), errors.Overloaded)
        first.cancel()
        while True:
            second = stub.Subscribe(pb.SubscribeRequest(from_offset=1))
            try:
                assert (await second.read()).event.offset == 1
            except grpc.RpcError:
                continue  # the first is on its way out
            break

    run(scenario)


# -- what a follower checks -----------------------------------------------------------------------


def sealed(*numbers: int, topic: str = "recovery") -> list[pb.SubscribeResponse]:
    """Events as a router hands them out."""
    router = TopicRouter()
    for number in range(1, max(numbers) + 1):
        event = fact(number, topic)
        kind = Topic.parse(topic)
        router.publish_own(kind, event.type, event.request, event.worker, event.attributes, 42)
    found = router.read(Topic.parse(topic), 1)
    return [
        pb.SubscribeResponse(event=event_to_proto(event))
        for event in found
        if isinstance(event, TopicEvent) and event.offset in numbers
    ]


def gap(first: int, last: int) -> pb.SubscribeResponse:
    of = pb.Gap(topic=pb.TOPIC_RECOVERY, first_offset=first, last_offset=last)
    return pb.SubscribeResponse(gap=of)


@pytest.mark.parametrize(
    "change",
    [
        {"type": "Other"},
        {"worker": "stage-2"},
        {"publisher": "other"},
        {"sequence": 9},
        {"offset": 2},
        {"time_unix_ns": 43},
        {"request_id": "10010203-0405-0607-0809-0a0b0c0d0e0f"},
        {"request_id": "no UUID"},
        {"topic": pb.TOPIC_BARRIER},
        {"topic": 77},
        {"checksum": 1},
        {"attributes": {"number": "2"}},
    ],
)
def test_an_event_that_changed_on_its_way_is_refused(change: dict[str, object]) -> None:
    (response,) = sealed(1)
    assert EventChecker(1).check(response) is response
    fields = {name.name: value for name, value in response.event.ListFields()}
    changed = pb.SubscribeResponse(event=pb.Event(**{**fields, **change}))
    with pytest.raises(errors.FrameCorrupted):
        EventChecker(1).check(changed)


def test_an_event_is_given_once_and_a_hole_must_be_owned_up_to() -> None:
    first, second, fifth = sealed(1, 2, 5)
    checker = EventChecker(1)
    assert [checker.check(one) for one in (first, second, first)] == [first, second, None]
    with pytest.raises(errors.SequenceGap):
        checker.check(fifth)
    with pytest.raises(errors.SequenceGap):
        checker.check(gap(4, 4))
    assert checker.check(gap(3, 4)) is not None
    assert checker.check(fifth) is fifth
    (other,) = sealed(3, topic="barrier")
    with pytest.raises(errors.SequenceGap):
        checker.check(other)
    assert EventChecker().check(other) is other
    assert EventChecker(7).check(other) is other  # an offset of an earlier life


def test_the_client_checks_what_it_follows() -> None:
    async def scenario(hub: EventHub, stub: rpc.EventServiceStub) -> None:
        hub.publish(fact(1))
        hub.publish(fact(2))
        kept = hub.router.read(Topic.RECOVERY, 2)[0]
        object.__setattr__(kept, "worker", "stage-9")
        client = MeshClient("unused")
        client.events = stub
        stream = client.follow((), 1)
        assert (await anext(stream)).event.offset == 1
        with pytest.raises(errors.FrameCorrupted):
            await anext(stream)
        await client.close()

    run(scenario)
