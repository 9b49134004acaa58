"""A token's event: the same facts whenever it is read, counted before anybody reads it."""

from dataclasses import replace

from coordinator.token_facts import NAMES, PACKED_BYTES_MAX, TokenFacts
from coordinator.topics import Topic, TopicEvent, TopicLimits, TopicRouter
from stagemesh.token import StageMark, TokenChunk, ValidationStatus

REQUEST = bytes(range(16))
MARKS = (StageMark(9, 0xABCD, 1), StageMark(9, 0xABCD, 0))


def a_chunk(**changes):
    chunk = TokenChunk(
        REQUEST, 9, 401, 7, 3, 0.0, 1.25, 5, "stage-1", bytes(16), MARKS, (), ValidationStatus.VALID
    ).sealed()
    return replace(chunk, **changes)


def an_event(chunk, index=4, verified_through=2):
    facts = TokenFacts(chunk, index, verified_through)
    return TopicEvent(Topic.GENERATION, "ChunkGenerated", REQUEST, chunk.source, facts)


def test_it_says_what_was_validated_of_the_token():
    chunk = a_chunk()
    assert dict(TokenFacts(chunk, 4, 2)) == {
        "position": "4",
        "epoch": "7",
        "step": "3",
        "status": "VALID",
        "checksum": f"{chunk.checksum:08x}",
        "chain": "00" * 16,
        "margin": "1.25",
        "marks": "2",
        "cache_length": "9",
        "verified_through": "2",
    }


def test_a_corrected_token_says_so_and_no_fact_is_a_constant():
    """Another token, another account: each fact follows the chunk."""
    other = a_chunk(
        epoch=8,
        step=4,
        position=10,
        chain=bytes(range(16)),
        margin=0.5,
        marks=MARKS[:1],
        status=ValidationStatus.CORRECTED,
    ).sealed()
    one, two = dict(TokenFacts(a_chunk(), 4, 2)), dict(TokenFacts(other, 5, 3))
    assert two["status"] == "CORRECTED"
    assert not any(one[name] == two[name] for name in NAMES)


def test_what_is_read_verifies_and_equals_the_same_event_published_as_text():
    router = TopicRouter()
    router.publish(an_event(a_chunk()), time_unix_ns=77)
    (read,) = router.read(Topic.GENERATION, 1)
    assert read.verifies()
    text = TopicRouter()
    plain = replace(an_event(a_chunk()), attributes=dict(TokenFacts(a_chunk(), 4, 2)))
    text.publish(plain, time_unix_ns=77)
    (as_text,) = text.read(Topic.GENERATION, 1)
    assert (read.checksum, read.pack()) == (as_text.checksum, as_text.pack())
    assert not replace(read, attributes={**read.attributes, "position": "5"}).verifies()


def test_no_token_is_larger_than_what_its_event_is_counted_with():
    most = 2**64 - 1
    chunk = a_chunk(
        source="\U0001f600" * 255,
        epoch=most,
        step=most,
        position=2**32 - 1,
        checksum=2**32 - 1,
        margin=-1.234e-38,
        marks=MARKS * 128,
        status=max(ValidationStatus, key=lambda status: len(status.name)),
    )
    event = replace(an_event(chunk, 2**32, 2**32), sequence=most, offset=most, time_unix_ns=most)
    packed = len(event.pack())
    assert packed <= PACKED_BYTES_MAX + 4 * len(chunk.source)
    assert packed > PACKED_BYTES_MAX + 4 * len(chunk.source) - 100  # and it is no wild guess
    assert tuple(event.attributes) == NAMES


def test_tokens_nobody_reads_are_retained_within_the_bytes():
    router = TopicRouter(TopicLimits(retained_bytes_max=10 * (PACKED_BYTES_MAX + 4 * 7)))
    for index in range(25):
        router.publish(an_event(a_chunk(), index), time_unix_ns=index)
    assert router.oldest_offset(Topic.GENERATION) == 16
    assert router.counters["events_evicted"] == 15
    assert [event.attributes["position"] for event in router.read(Topic.GENERATION, 16)] == [
        str(index) for index in range(15, 25)
    ]
