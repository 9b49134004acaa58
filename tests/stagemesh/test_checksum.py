"""CRC32C against its published vectors; digests that depend on order, place and history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.checksum import (
    CHAIN_BYTES,
    chain_next,
    chain_over,
    chain_start,
    crc32c,
    history_digest,
    pack_token_ids,
)

IDS = st.lists(st.integers(0, 2**32 - 1), max_size=30)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_gives_the_values_of_rfc_3720(data, expected):
    assert crc32c(data) == expected
    assert crc32c(memoryview(data)) == expected


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_checksum_continues_over_pieces(head, tail):
    assert crc32c(tail, crc32c(head)) == crc32c(head + tail)


@given(IDS, st.integers(0, 30))
def test_the_history_digest_does_not_depend_on_how_tokens_were_chunked(ids, cut):
    assert history_digest(ids[cut:], history_digest(ids[:cut])) == history_digest(ids)


@given(IDS.filter(len), st.data())
def test_the_history_digest_sees_dropped_repeated_swapped_and_altered_tokens(ids, data):
    index = data.draw(st.integers(0, len(ids) - 1))
    variants = [
        ids[:index] + ids[index + 1 :],
        ids[: index + 1] + ids[index:],
        [*ids[:index], ids[index] ^ 1, *ids[index + 1 :]],
    ]
    if index and ids[index - 1] != ids[index]:
        variants.append([*ids[: index - 1], ids[index], ids[index - 1], *ids[index + 1 :]])
    for variant in variants:
        assert history_digest(variant) != history_digest(ids)


def test_leading_zero_tokens_count():
    assert len({history_digest([0] * count) for count in range(20)}) == 20


def test_a_chain_binds_request_prompt_position_token_and_everything_before():
    start = chain_start(bytes(16), (1, 2))
    assert len(start) == CHAIN_BYTES
    links = {
        start,
        chain_start(b"\1" + bytes(15), (1, 2)),
        chain_start(bytes(16), (1, 2, 0)),
        chain_start(bytes(16), (2, 1)),
        chain_next(start, 2, 5),
        chain_next(start, 3, 5),
        chain_next(start, 2, 6),
        chain_over(start, 2, (5, 6)),
        chain_over(start, 2, (6, 5)),
        chain_over(start, 3, (5, 6)),
    }
    assert len(links) == 10
    assert chain_over(start, 2, ()) == start
    assert chain_over(start, 2, (5, 6)) == chain_next(chain_next(start, 2, 5), 3, 6)


def test_token_ids_are_packed_little_endian():
    assert pack_token_ids((1, 258)) == b"\1\0\0\0\2\1\0\0"
