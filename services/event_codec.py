"""Events as protobuf messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.topics import OWN, Topic, TopicEvent
from services.request_ids import request_key, show_id
from stagemesh.errors import InvalidRequest
from stagemesh.v1 import event_service_pb2 as pb


def topic_of(value: int) -> Topic:
    """The topic with this number. Raises InvalidRequest."""
    try:
        return Topic(value)
    except ValueError:
        raise InvalidRequest("no such topic", field="topics", value=value) from None


def wire_topic(topic: Topic) -> Any:
    """The protobuf enum's value, which is the same number."""
    return int(topic)


def event_to_proto(event: TopicEvent) -> pb.Event:
    """An event as it travels; the request as a UUID."""
    return pb.Event(
        topic=wire_topic(event.topic),
        offset=event.offset,
        time_unix_ns=event.time_unix_ns,
        type=event.type,
        request_id=show_id(event.request) if event.request else "",
        worker=event.worker,
        attributes=dict(event.attributes),
        publisher=event.publisher,
        sequence=event.sequence,
        checksum=event.checksum,
    )


def event_from_proto(event: pb.Event) -> TopicEvent:
    """An event as its message says. Raises InvalidRequest: no such topic, or no such request id."""
    return TopicEvent(
        topic=topic_of(event.topic),
        type=event.type,
        request=request_key(event.request_id) if event.request_id else b"",
        worker=event.worker,
        attributes=dict(event.attributes),
        publisher=event.publisher,
        sequence=event.sequence,
        offset=event.offset,
        time_unix_ns=event.time_unix_ns,
        checksum=event.checksum,
    )


def foreign_event(event: pb.Event) -> TopicEvent:
    """One that somebody else wants published: what is the router's to say is left out. Raises
    InvalidRequest; nobody publishes as the coordinator."""
    if event.publisher == OWN:
        raise InvalidRequest("this publisher's name is taken", field="publisher")
    return replace(event_from_proto(event), offset=0, time_unix_ns=0, checksum=0)
