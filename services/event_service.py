"""Facts of the mesh by topic."""

from __future__ import annotations

import logging
from collections.abc import Callable

from coordinator.instructions import PublishEvent
from stagemesh.v1 import event_service_pb2_grpc

_log = logging.getLogger(__name__)


class EventHub:
    def __init__(self, *, on_event: Callable[[PublishEvent], None] = lambda event: None) -> None:
        self._on_event = on_event

    def publish(self, event: PublishEvent) -> None:
        _log.info("%s/%s %s %s", event.topic, event.type, event.worker, event.attributes)
        self._on_event(event)


class EventService(event_service_pb2_grpc.EventServiceServicer):
    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
