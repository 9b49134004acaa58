"""EventService over a real connection: following from now, from the start, through a gap;
publishing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from coordinator.instructions import PublishEvent
from coordinator.topics import TopicLimits, TopicRouter
from services.channel import open_channel
from services.event_service import EventHub, EventService, event_from_proto
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


def test_a_foreign_event_keeps_its_request_as_bytes() -> None:
    event = pb.Event(
        topic=pb.TOPIC_RECOVERY,
        type="A",
        publisher="probe",
        sequence=1,
        request_id="00010203-0405-0607-0809-0a0b0c0d0e0f",
    )
    assert event_from_proto(event).request == REQUEST
