"""What a follower checks of the events it gets: seals, order, and that nothing is left out unsaid.

Every topic numbers its events without a hole, and a router that no longer has some says which. So a
follower that counts along needs to believe nobody: an event it has had is dropped (delivery is at
least once), one that comes too early without a gap record for what is missing is an error.
"""

from __future__ import annotations

from services.event_codec import event_from_proto
from stagemesh.errors import FrameCorrupted, InvalidRequest, SequenceGap
from stagemesh.sequence import Order, SequenceIntegrityChecker
from stagemesh.v1 import event_service_pb2 as pb


class EventChecker:
    """One subscription's place in every topic. ``from_offset`` as it was asked for. Pure."""

    def __init__(self, from_offset: int = 0) -> None:
        self._from_offset = from_offset
        self._topics: dict[int, SequenceIntegrityChecker] = {}

    def check(self, response: pb.SubscribeResponse) -> pb.SubscribeResponse | None:
        """The response, or None if it was seen before.

        Raises FrameCorrupted for an event that does not verify, SequenceGap for one behind a hole.
        """
        if response.HasField("gap"):
            gap = response.gap
            place = self._place(gap.topic, gap.first_offset)
            missing = place.missing(gap.first_offset)
            if missing:
                raise SequenceGap("events are missing", missing=missing)
            place.skip_to(gap.last_offset + 1)
            return response
        event = response.event
        if not _verifies(event):
            raise FrameCorrupted("event checksum does not match", part="event", offset=event.offset)
        place = self._place(event.topic, event.offset)
        order = place.observe(event.offset)
        if order is Order.GAP:
            raise SequenceGap("events are missing", missing=place.missing(event.offset))
        return response if order is Order.NEXT else None

    def _place(self, topic: int, offset: int) -> SequenceIntegrityChecker:
        """Where a topic stands. It begins where the caller said; or, if that was nowhere ("from
        now on", or an offset of an earlier life of the coordinator), with what comes first."""
        known = self._topics.get(topic)
        if known is None:
            first = min(offset, self._from_offset or offset)
            known = self._topics[topic] = SequenceIntegrityChecker(first=first)
        return known


def _verifies(event: pb.Event) -> bool:
    """Whether it is the event that the router sealed."""
    try:
        return event_from_proto(event).verifies()
    except InvalidRequest:  # no topic, or a request that is no UUID
        return False
