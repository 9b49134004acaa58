"""Facts on typed topics, each with an offset, kept for a while, never dropped without saying so.

Every topic numbers its events 1, 2, 3 …; a checksum covers each one, its offset included. A
publisher numbers its own events too, so that a repeated publication (its acknowledgement was lost)
is recognised and answered with the offset of the first. What is retained is bounded by count and by
bytes. A reader whose offset is no longer retained gets a ``Gap`` naming exactly the offsets it will
never see, then goes on behind it; readers keep nothing here but a number, so a slow one costs
nothing and delays nobody.

Checksum layout (little-endian, CRC32C over): topic u8, offset u64, time_unix_ns u64, sequence u64,
then type, worker and publisher each as length u32 + UTF-8, request as length u32 + bytes, attribute
count u32, and for each attribute, sorted by name, name and value each as length u32 + UTF-8.

Offsets begin at 1 with every start of the coordinator; the publisher name carries its instance.
"""

from __future__ import annotations

import enum
import struct
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from coordinator.token_facts import PACKED_BYTES_MAX as TOKEN_BYTES_MAX
from coordinator.token_facts import TokenFacts
from stagemesh.checksum import crc32c
from stagemesh.errors import InvalidRequest, Overloaded
from stagemesh.guards import Counters

RETAINED_EVENTS_MAX = 10_000
"""Per topic."""
RETAINED_BYTES_MAX = 8 * 1024 * 1024
"""Per topic, as packed."""
EVENT_BYTES_MAX = 64 * 1024
"""One event, as packed."""
ATTRIBUTES_MAX = 64
PUBLISHER_CHARACTERS_MAX = 256
PUBLISHERS_MAX = 1024
"""Publishers whose repeats are recognised; the one silent for longest is forgotten first."""
REPEATS_KEPT = 1024
"""Sequences per publisher whose offsets are remembered."""
READ_EVENTS_MAX = 256
"""Events of one read."""

OWN = "coordinator"
"""The publisher whose events are numbered here."""

_FIXED = struct.Struct("<BQQQ")
_LENGTH = struct.Struct("<I")


class Topic(enum.IntEnum):
    """Wire values are frozen."""

    MEMBERSHIP = 1
    GENERATION = 2
    INTEGRITY = 3
    RECOVERY = 4
    BARRIER = 5
    DIAGNOSTICS = 6

    @classmethod
    def parse(cls, name: str) -> Topic:
        """``"recovery"`` → RECOVERY. Raises InvalidRequest."""
        topic = _TOPICS.get(name) or _TOPICS.get(name.lower())
        if topic is None:
            raise InvalidRequest("no such topic", field="topic", value=name)
        return topic


_TOPICS = {topic.name.lower(): topic for topic in Topic}


@dataclass(frozen=True, slots=True)
class TopicEvent:
    """One event. ``offset``, ``time_unix_ns`` and ``checksum`` are the router's."""

    topic: Topic
    type: str
    request: bytes = b""
    worker: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    publisher: str = OWN
    sequence: int = 0
    offset: int = 0
    time_unix_ns: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        """The bytes the checksum covers."""
        parts = [_FIXED.pack(self.topic, self.offset, self.time_unix_ns, self.sequence)]
        texts = [self.type.encode(), self.worker.encode(), self.publisher.encode(), self.request]
        parts += [piece for text in texts for piece in (_LENGTH.pack(len(text)), text)]
        parts.append(_LENGTH.pack(len(self.attributes)))
        for name in sorted(self.attributes):
            for text in (name.encode(), self.attributes[name].encode()):
                parts += (_LENGTH.pack(len(text)), text)
        return b"".join(parts)

    def sealed(self) -> TopicEvent:
        return replace(self, checksum=crc32c(self.pack()))

    def verifies(self) -> bool:
        """Whether the checksum matches."""
        return crc32c(self.pack()) == self.checksum


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets ``first`` to ``last`` (inclusive) of a topic are no longer retained."""

    topic: Topic
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Published:
    """Where an event went; ``duplicate``: it had been published before."""

    offset: int
    duplicate: bool = False


@dataclass(slots=True)
class _Log:
    """One topic. ``first_offset`` is the oldest retained; events are consecutive from there."""

    events: deque[tuple[int, TopicEvent]] = field(default_factory=deque)
    next_offset: int = 1
    size: int = 0

    @property
    def first_offset(self) -> int:
        return self.next_offset - len(self.events)


@dataclass(frozen=True, slots=True)
class TopicLimits:
    """See the constants of the module."""

    retained_events_max: int = RETAINED_EVENTS_MAX
    retained_bytes_max: int = RETAINED_BYTES_MAX
    event_bytes_max: int = EVENT_BYTES_MAX
    publishers_max: int = PUBLISHERS_MAX
    repeats_kept: int = REPEATS_KEPT


@dataclass(slots=True)
class _Publisher:
    """Offsets by sequence. ``forgotten``: the highest sequence whose offset is no longer known."""

    known: OrderedDict[int, tuple[Topic, int]] = field(default_factory=OrderedDict)
    forgotten: int = 0


class TopicRouter:
    """All topics. Pure: the shell supplies the time, and wakes readers when ``publish`` returns."""

    def __init__(
        self, limits: TopicLimits | None = None, *, counters: Counters | None = None
    ) -> None:
        self.limits = limits or TopicLimits()
        self.counters = Counters() if counters is None else counters
        self._logs = {topic: _Log() for topic in Topic}
        self._publishers: OrderedDict[str, _Publisher] = OrderedDict()
        self._own_sequence = 0

    def publish(self, event: TopicEvent, *, time_unix_ns: int) -> Published:
        """Append an event. Raises Overloaded over the size limit, InvalidRequest for a malformed
        one.

        ``sequence`` 0 with publisher "coordinator" is numbered here; other publishers number their
        own."""
        if event.sequence == 0 and event.publisher == OWN:
            return self.publish_own(
                event.topic, event.type, event.request, event.worker, event.attributes, time_unix_ns
            )
        offset = self._logs[event.topic].next_offset
        stamped = replace(event, offset=offset, time_unix_ns=time_unix_ns)
        self._check(stamped)
        seen = self._seen(stamped)
        if seen is not None:
            self.counters.count("events_duplicate")
            return Published(seen, duplicate=True)
        self._append(stamped)
        self._remember(stamped)
        return Published(offset)

    def publish_own(
        self,
        topic: Topic,
        kind: str,
        request: bytes,
        worker: str,
        attributes: Mapping[str, str],
        time_unix_ns: int,
    ) -> Published:
        """Append an event of the coordinator's own, numbered here, so that it cannot be a repeat.
        Every token is one: it is made once, as it will be read. Raises as ``publish``."""
        self._own_sequence += 1
        offset = self._logs[topic].next_offset
        event = TopicEvent(
            topic,
            kind,
            request,
            worker,
            attributes,
            OWN,
            self._own_sequence,
            offset,
            time_unix_ns,
        )
        self._check(event)
        self._append(event)
        return Published(offset)

    def _append(self, event: TopicEvent) -> None:
        log, size = self._logs[event.topic], self._size(event)
        log.events.append((size, event))
        log.next_offset += 1
        log.size += size
        self._evict(log)
        self.counters.count("events_published")

    def _size(self, event: TopicEvent) -> int:
        """Bytes as packed; a token's event counts with the most it can have, and is packed when it
        is read. Raises Overloaded over the limit."""
        if type(event.attributes) is TokenFacts:
            return TOKEN_BYTES_MAX + 4 * len(event.worker)
        packed = event.pack()
        if len(packed) > self.limits.event_bytes_max:
            self.counters.count("events_refused")
            raise Overloaded("event over event_bytes_max", size=len(packed))
        _seal(event, packed)
        return len(packed)

    def read(
        self, topic: Topic, from_offset: int, *, events_max: int = READ_EVENTS_MAX
    ) -> list[TopicEvent | Gap]:
        """What is retained from ``from_offset`` on, at most ``events_max``; first a Gap if some are
        gone.

        Offsets that are not published yet yield nothing. Raises InvalidRequest below 1.
        """
        if from_offset < 1:
            raise InvalidRequest("offsets start at 1", field="from_offset", value=from_offset)
        log = self._logs[topic]
        found: list[TopicEvent | Gap] = []
        first = log.first_offset
        if from_offset < first:
            found.append(Gap(topic, from_offset, first - 1))
            self.counters.count("event_gaps")
            from_offset = first
        start = from_offset - first
        stop = min(start + events_max, len(log.events))
        for index in range(start, stop):
            event = log.events[index][1]
            if not event.checksum:
                _seal(event, event.pack())
            found.append(event)
        return found

    def next_offset(self, topic: Topic) -> int:
        """The offset the next event of a topic will get."""
        return self._logs[topic].next_offset

    def oldest_offset(self, topic: Topic) -> int:
        """The oldest retained offset; equals ``next_offset`` if nothing is."""
        return self._logs[topic].first_offset

    def subscribe(self, topics: Iterable[Topic] = (), *, from_offset: int = 0) -> Subscription:
        """A cursor over topics (none = all). ``from_offset`` 0: what happens from now on; n: from
        n.

        An offset that was not given yet is one of an earlier life of this process, whose numbering
        has ended with it: waiting for it would drop in silence what comes first. Such a reader gets
        everything retained."""
        wanted = tuple(topics) or tuple(Topic)
        return Subscription(self, {topic: self._place(topic, from_offset) for topic in wanted})

    def _place(self, topic: Topic, from_offset: int) -> int:
        following = self.next_offset(topic)
        if from_offset > following:
            return self.oldest_offset(topic)
        return from_offset or following

    def _check(self, event: TopicEvent) -> None:
        if not event.type or not event.publisher or event.sequence < 1:
            raise InvalidRequest("an event needs type, publisher and sequence", field="event")
        if len(event.publisher) > PUBLISHER_CHARACTERS_MAX:  # It is remembered, unlike the event.
            self.counters.count("events_refused")
            raise Overloaded("event over publisher_characters_max", limit=PUBLISHER_CHARACTERS_MAX)
        if len(event.attributes) > ATTRIBUTES_MAX:
            self.counters.count("events_refused")
            raise Overloaded("event over attributes_max", limit=ATTRIBUTES_MAX)

    def _seen(self, event: TopicEvent) -> int | None:
        publisher = self._publishers.get(event.publisher)
        if publisher is None:
            return None
        found = publisher.known.get(event.sequence)
        if found is None:
            if event.sequence <= publisher.forgotten:
                # Neither a repeat nor a first publication can be told apart: say so, guess nothing.
                raise InvalidRequest("sequence is too old to recognise", field="sequence")
            return None
        if found[0] is not event.topic:
            raise InvalidRequest("sequence was used on another topic", field="sequence")
        return found[1]

    def _remember(self, event: TopicEvent) -> None:
        publisher = self._publishers.get(event.publisher)
        if publisher is None:
            publisher = self._publishers[event.publisher] = _Publisher()
        self._publishers.move_to_end(event.publisher)
        publisher.known[event.sequence] = (event.topic, event.offset)
        if len(publisher.known) > self.limits.repeats_kept:
            oldest, _ = publisher.known.popitem(last=False)
            publisher.forgotten = max(publisher.forgotten, oldest)
        if len(self._publishers) > self.limits.publishers_max:
            self._publishers.popitem(last=False)

    def _evict(self, log: _Log) -> None:
        limits = self.limits
        while len(log.events) > 1 and (
            len(log.events) > limits.retained_events_max or log.size > limits.retained_bytes_max
        ):
            size, _ = log.events.popleft()
            log.size -= size
            self.counters.count("events_evicted")


def _seal(event: TopicEvent, packed: bytes) -> None:
    """Fill in the checksum: nobody but the router has the event yet."""
    object.__setattr__(event, "checksum", crc32c(packed))


class Subscription:
    """A reader's place in several topics. Holds numbers only."""

    def __init__(self, router: TopicRouter, offsets: dict[Topic, int]) -> None:
        self._router = router
        self._offsets = offsets

    def poll(self, *, events_max: int = READ_EVENTS_MAX) -> list[TopicEvent | Gap]:
        """What is new, by time within the batch, gaps of a topic before its events; moves the
        place."""
        gaps: list[TopicEvent | Gap] = []
        events: list[TopicEvent] = []
        for topic, offset in self._offsets.items():
            for item in self._router.read(topic, offset, events_max=events_max):
                if isinstance(item, Gap):
                    gaps.append(item)
                    self._offsets[topic] = item.last + 1
                else:
                    events.append(item)
                    self._offsets[topic] = item.offset + 1
        events.sort(key=lambda event: (event.time_unix_ns, event.topic, event.offset))
        return [*gaps, *events]

    @property
    def offsets(self) -> dict[Topic, int]:
        """Next offset per topic, to resume from."""
        return dict(self._offsets)
