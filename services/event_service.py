"""EventService: publishing and following what happens in the mesh, by topic.

``EventHub`` puts the shell around ``coordinator.topics.TopicRouter``: it supplies the wall clock,
wakes followers, and is the driver's ``EventPublisher``. A follower reads from the router's
retention at its own pace and keeps nothing here but a number per topic; one that is too slow gets a
gap that names what it missed. Sending never delays publishing. What has a level in
``event_lines`` is logged as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable

from coordinator.instructions import PublishEvent
from coordinator.topics import Gap, Published, Topic, TopicEvent, TopicRouter
from services.event_codec import event_to_proto, foreign_event, topic_of, wire_topic
from services.event_lines import LEVELS, EventLines
from services.grpc_types import ServicerContext
from stagemesh.errors import MeshError, Overloaded
from stagemesh.v1 import event_service_pb2 as pb
from stagemesh.v1 import event_service_pb2_grpc

FOLLOWERS_MAX = 256
"""Subscriptions at a time."""
BATCH_EVENTS_MAX = 64
"""Events sent to one follower before others get their turn."""

_log = logging.getLogger(__name__)


class EventHub:
    """``coordinator.ports.EventPublisher``. Belongs to one event loop.

    ``on_event`` is called with every fact of the coordinator's own, after it was published.
    """

    def __init__(
        self,
        router: TopicRouter | None = None,
        *,
        on_event: Callable[[PublishEvent], None] = lambda event: None,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.router = router or TopicRouter()
        self._lines = EventLines()
        self._clock = clock
        self._on_event = on_event
        self._wall_clock_ns = wall_clock_ns
        self._changed: asyncio.Future[None] | None = None

    def publish(self, event: PublishEvent) -> None:
        """A fact of the coordinator's own. One that the router refuses is logged, never raised."""
        self._log(event)
        try:
            topic = Topic.parse(event.topic)
            self.router.publish_own(
                topic,
                event.type,
                event.request,
                event.worker,
                event.attributes,
                self._wall_clock_ns(),
            )
            self._wake()
        except MeshError as error:
            _log.error("event %s was not published: %s", event.type, error)
        self._on_event(event)

    def _log(self, event: PublishEvent) -> None:
        level = LEVELS.get(event.type)
        if level is None or not _log.isEnabledFor(level):
            return  # a token, mostly: nothing is made of it
        if line := self._lines.line(event, self._clock()):
            extra = {"request": event.request, "worker": event.worker, "topic": event.topic}
            _log.log(level, "%s", line, extra=extra)

    def add(self, event: TopicEvent) -> Published:
        """Append an event of anybody and wake the followers. Raises Overloaded, InvalidRequest."""
        published = self.router.publish(event, time_unix_ns=self._wall_clock_ns())
        self._wake()
        return published

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    async def wait(self) -> None:
        """Until something is published."""
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)


class EventService(event_service_pb2_grpc.EventServiceServicer):
    """The servicer."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
        self._followers = 0

    async def Publish(  # noqa: N802 (the name is the protocol's)
        self, request: pb.PublishRequest, context: ServicerContext
    ) -> pb.PublishResponse:
        """Append an event; a repeat is answered with the offset of the first."""
        published = self._hub.add(foreign_event(request.event))
        return pb.PublishResponse(offset=published.offset, duplicate=published.duplicate)

    async def Subscribe(  # noqa: N802
        self, request: pb.SubscribeRequest, context: ServicerContext
    ) -> AsyncGenerator[pb.SubscribeResponse, None]:
        """Follow topics until the caller goes away."""
        if self._followers >= FOLLOWERS_MAX:
            raise Overloaded("too many followers", limit=FOLLOWERS_MAX)
        topics = [topic_of(value) for value in request.topics]
        place = self._hub.router.subscribe(topics, from_offset=request.from_offset)
        self._followers += 1
        try:
            while True:
                found = place.poll(events_max=BATCH_EVENTS_MAX)
                for item in found:
                    yield _response(item)
                if not found:
                    await self._hub.wait()
        finally:
            self._followers -= 1


def _response(item: TopicEvent | Gap) -> pb.SubscribeResponse:
    if isinstance(item, Gap):
        gap = pb.Gap(topic=wire_topic(item.topic), first_offset=item.first, last_offset=item.last)
        return pb.SubscribeResponse(gap=gap)
    return pb.SubscribeResponse(event=event_to_proto(item))
