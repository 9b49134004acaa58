"""A token chunk cannot be moved, relabelled, repeated, dropped or altered without it showing."""

from __future__ import annotations

import math
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.checksum import chain_next, chain_start, crc32c
from stagemesh.errors import TokenRejected
from stagemesh.sequence import End, Order, SequenceIntegrityChecker
from stagemesh.token import (
    ALTERNATIVES_MAX,
    StageMark,
    TokenChunk,
    ValidationStatus,
)
from stagemesh.v1 import token_pb2

REQUEST = bytes(range(16))
START = chain_start(REQUEST, (1, 2, 3))


def chunk(position: int = 3, token_id: int = 7, previous: bytes = START, **changes) -> TokenChunk:
    fields = {
        "request": REQUEST,
        "position": position,
        "token_id": token_id,
        "epoch": 2,
        "step": 5,
        "logprob": -0.5,
        "margin": 1.25,
        "sampled_at_unix_ns": 1_700_000_000_000_000_000,
        "source": "stage-2",
        "chain": chain_next(previous, position, token_id),
        "marks": (StageMark(3, 0xAAAA, 1), StageMark(3, 0xAAAA, 0)),
        "alternatives": ((9, -1.5), (11, -2.5)),
        **changes,
    }
    return TokenChunk(**fields).sealed()


def stream(count: int) -> list[TokenChunk]:
    chunks, link = [], START
    for position in range(3, 3 + count):
        chunks.append(chunk(position, position * 31 % 500, link))
        link = chunks[-1].chain
    return chunks


def test_a_sealed_chunk_verifies():
    chunk().verify(previous_chain=START)
    assert chunk().checksum_holds()


def test_any_alteration_of_any_field_is_detected_bit_by_bit(altered):
    good = chunk()
    count = 0
    for path, bad in altered(good):
        count += 1
        try:
            bad.verify(previous_chain=START)
        except TokenRejected:
            continue
        pytest.fail(f"not detected: {path}")
    assert count > 900


def test_every_single_bit_of_the_packed_form_is_covered():
    packed = chunk().pack()
    for bit in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert crc32c(bytes(damaged)) != chunk().checksum


@pytest.mark.parametrize(
    "change",
    [{"position": 4}, {"token_id": 8}, {"chain": bytes(16)}],
)
def test_a_chunk_altered_and_sealed_again_breaks_the_chain(change):
    resealed = replace(chunk(), **change).sealed()
    assert resealed.checksum_holds()
    with pytest.raises(TokenRejected, match="chain"):
        resealed.verify(previous_chain=START)


def accepted(chunks: list[TokenChunk], total: int) -> bool:
    """What a reader does: chain, sequence and end marker."""
    checker, link = SequenceIntegrityChecker(first=3), START
    for item in chunks:
        if checker.observe(item.position) is not Order.NEXT:
            return False
        try:
            item.verify(previous_chain=link)
        except TokenRejected:
            return False
        link = item.chain
    return checker.finish(total) is End.COMPLETE


@given(st.integers(2, 12), st.data())
def test_a_stream_with_any_chunk_moved_repeated_or_dropped_is_not_accepted(count, data):
    chunks = stream(count)
    assert accepted(chunks, count)
    index = data.draw(st.integers(0, count - 1))
    other = data.draw(st.integers(0, count - 1).filter(lambda value: value != index))
    moved = chunks.copy()
    moved[index], moved[other] = moved[other], moved[index]
    assert not accepted(moved, count)
    assert not accepted(chunks[:index] + chunks[index + 1 :], count)
    assert not accepted(chunks[: index + 1] + chunks[index:], count)
    relabelled = chunks.copy()
    relabelled[index] = replace(chunks[index], position=chunks[other].position).sealed()
    assert not accepted(relabelled, count)


def test_a_lost_head_and_a_lost_tail_are_not_accepted():
    chunks = stream(5)
    assert not accepted(chunks[1:], 5)
    assert not accepted(chunks[:-1], 5)
    assert not accepted([], 5)


def test_another_requests_stream_does_not_continue_this_one():
    foreign = chain_start(bytes(16), (1, 2, 3))
    with pytest.raises(TokenRejected):
        chunk(previous=foreign).verify(previous_chain=START)
    assert chain_start(REQUEST, (1, 2)) != START


def test_judging_changes_status_and_marks_only_and_seals_again():
    judged = chunk().with_status(ValidationStatus.VALID)
    judged.verify(previous_chain=START)
    assert replace(judged, status=ValidationStatus.UNVERIFIED).sealed() == chunk()
    marks = (StageMark(3, 1, 1),)
    assert chunk().judged(ValidationStatus.SUSPECT, marks).marks == marks
    chunk().judged(ValidationStatus.SUSPECT, marks).verify(previous_chain=START)


def test_sealing_rounds_floats_to_what_travels():
    sealed = chunk(logprob=-0.1, margin=1 / 3, alternatives=((1, -0.1),))
    assert sealed.logprob != -0.1
    assert sealed.sealed() == sealed
    assert math.isnan(chunk(margin=math.nan).margin)


@pytest.mark.parametrize(
    "change",
    [
        {"request": REQUEST[:15]},
        {"request": REQUEST + b"\0"},
        {"chain": b"\1" * 17},
        {"token_id": -1},
        {"token_id": 2**32},
        {"epoch": 2**64},
        {"logprob": 1e300},
        {"source": "\ud800"},
        {"source": "s" * 256},
        {"alternatives": ((1, -1.0),) * (ALTERNATIVES_MAX + 1)},
        {"marks": (StageMark(-1, 0, 0),)},
    ],
)
def test_fields_that_do_not_fit_their_place_are_refused_when_sealing_and_when_verifying(change):
    bad = replace(chunk(), **change)
    with pytest.raises(TokenRejected):
        bad.sealed()
    with pytest.raises(TokenRejected):
        bad.verify()
    with pytest.raises(TokenRejected):
        bad.with_status(ValidationStatus.VALID)


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 3), max_size=4),
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.floats(width=32)), max_size=4),
)
def test_any_chunk_in_range_seals_and_verifies(
    request_id, position, token_id, source, marks, others
):
    sealed = chunk(
        position,
        token_id,
        request=request_id,
        source=source,
        marks=tuple(StageMark(*mark) for mark in marks),
        alternatives=tuple(others),
    )
    sealed.verify(previous_chain=START)


@pytest.mark.parametrize("parts", [(0, 0), (1, 0), (0, 1), (2, 3)])
def test_variable_parts_never_run_into_each_other(parts, altered):
    """Chunks that differ, even only in where one part ends and the next begins, pack
    differently."""
    base = chunk(
        source="abab",
        marks=(StageMark(0x61626162, 0, 0),) * parts[0],
        alternatives=((0x61626162, 0.0),) * parts[1],
    )
    compared = 0
    for path, other in altered(base, skip=frozenset({"checksum", "request", "chain"})):
        try:
            packed = other.pack()
        except (struct.error, ValueError):
            continue
        compared += 1
        assert packed != base.pack(), path
    assert compared > 100


def test_a_chunk_prints_as_one_line():
    assert str(chunk()).startswith("token req=0001 pos=3 id=7 epoch=2 unverified crc=")


def test_packing_once_does_not_outlive_the_chunk_it_was_for():
    """The bytes that are kept belong to one chunk: a copy with another field has its own."""
    sealed = chunk().sealed()
    assert sealed.packed == sealed.pack()
    assert sealed.checksum_holds()
    altered = replace(sealed, token_id=sealed.token_id + 1)
    assert altered.packed == altered.pack() != sealed.packed
    assert not altered.checksum_holds()


def test_a_status_is_what_the_wire_calls_by_that_number():
    names = {status.value: status.name for status in ValidationStatus}
    prefix = "VALIDATION_STATUS_"
    wire = {value: name.removeprefix(prefix) for name, value in token_pb2.ValidationStatus.items()}
    assert names == wire
    assert set(names.values()) == {
        "UNSPECIFIED",
        "UNVERIFIED",
        "VALID",
        "CORRECTED",
        "SUSPECT",
        "REJECTED",
    }
