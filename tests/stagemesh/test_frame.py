"""A frame under a wrong label, or with any bit changed, is refused by the check that is meant for
it."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.checksum import chain_next, chain_start, crc32c
from stagemesh.errors import (
    FingerprintMismatch,
    FrameCorrupted,
    FrameMalformed,
    FrameTooLarge,
    MeshError,
)
from stagemesh.frame import (
    FAULT_DETAIL_CHARACTERS_MAX,
    ROW_TOKENS_MAX,
    ROWS_MAX,
    STAGES_MAX,
    FrameKind,
    RowStatus,
    Score,
    StepFrame,
    StepRow,
    check_header,
    check_limits,
    check_payload,
    verify,
)
from stagemesh.sampling import LOGIT_BIAS_MAX, RowOpening, SamplingSpec
from stagemesh.tensor import DType, Tensor
from stagemesh.token import ALTERNATIVES_MAX, StageMark, TokenChunk

FINGERPRINT = bytes(range(8))
REQUEST = bytes(range(16))
CHAIN = chain_start(REQUEST, (1, 2, 3))


def opening(**changes) -> RowOpening:
    sampling = SamplingSpec(
        temperature=0.75, top_p=0.5, seed=7, logit_bias=((3, -1.5), (4, 2.0)), logprobs=2
    )
    return RowOpening(sampling, 3, CHAIN, 64, **changes)


def token() -> TokenChunk:
    return TokenChunk(
        REQUEST,
        3,
        9,
        2,
        5,
        -0.5,
        1.25,
        77,
        "stage-1",
        chain_next(CHAIN, 3, 9),
        (StageMark(3, 1, 2),),
        ((4, -1.0),),
    ).sealed()


def activation() -> Tensor:
    return Tensor(DType.BF16, (1, 3, 4), bytes(range(24)))


def frame(**changes) -> StepFrame:
    """A frame with something in every field; no real hop carries all of it at once."""
    row = StepRow(
        REQUEST,
        0,
        (1, 2, 3),
        samples=True,
        opening=opening(),
        fault_detail="né",
        marks=(StageMark(3, 0xABCD, 17), StageMark(3, 0xABCD, 18)),
        token=token(),
        scores=(Score(1, 2, 2, 0.0, 1.0), Score(2, 3, 4, 0.5, 0.25)),
    )
    plain = StepRow(bytes(16), 8, (5,), samples=True)
    fields = {
        "kind": FrameKind.PREFILL,
        "fingerprint": FINGERPRINT,
        "epoch": 2,
        "step": 5,
        "hop_from": 0,
        "hop_to": 1,
        "rows": (row, plain),
        "tensor": activation(),
        **changes,
    }
    return StepFrame(**fields).sealed()


def test_a_sealed_frame_verifies():
    verify(frame(), fingerprint=FINGERPRINT)
    verify(frame(tensor=None), fingerprint=FINGERPRINT)


def test_any_alteration_of_any_field_is_detected_bit_by_bit(altered):
    count = 0
    unchecked = frozenset({"traceparent", "tracestate"})
    for path, bad in altered(frame(), skip=unchecked):
        count += 1
        try:
            verify(bad, fingerprint=FINGERPRINT)
        except MeshError:
            continue
        pytest.fail(f"not detected: {path}")
    assert count > 3000


def test_trace_context_may_be_rewritten_on_the_way():
    verify(replace(frame(), traceparent="00-a-b-01", tracestate="x=y"), fingerprint=FINGERPRINT)


def test_every_single_bit_of_the_packed_header_is_covered():
    sealed = frame()
    header = sealed.pack_header()
    assert crc32c(header) == sealed.header_crc32c
    for bit in range(8 * len(header)):
        damaged = bytearray(header)
        damaged[bit // 8] ^= 1 << bit % 8
        assert crc32c(bytes(damaged)) != sealed.header_crc32c


def test_every_single_bit_of_the_payload_is_covered():
    sealed = frame()
    for bit in range(8 * 24):
        damaged = bytearray(sealed.tensor.payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameCorrupted) as caught:
            check_payload(replace(sealed, tensor=replace(sealed.tensor, payload=bytes(damaged))))
        assert caught.value.metadata["part"] == "payload"


@settings(max_examples=200)
@given(
    st.binary(min_size=256, max_size=256), st.integers(0, 3), st.integers(0, 3), st.integers(1, 32)
)
def test_swapped_blocks_and_swapped_values_of_a_payload_are_detected(payload, i, j, width):
    blocks = [payload[k : k + 64] for k in range(0, 256, 64)]
    blocks[i], blocks[j] = blocks[j], blocks[i]
    swapped = b"".join(blocks)
    values = bytearray(payload)
    values[0:2], values[2 * width : 2 * width + 2] = values[2 * width : 2 * width + 2], values[0:2]
    for damaged in (swapped, bytes(values)):
        if damaged != payload:
            assert crc32c(damaged) != crc32c(payload)


def test_a_true_payload_under_another_frames_label_does_not_pass():
    one = frame()
    two = frame(step=6, tensor=Tensor(DType.BF16, (1, 3, 4), bytes(24)))
    with pytest.raises(FrameCorrupted):
        verify(replace(two, tensor=one.tensor), fingerprint=FINGERPRINT)
    mixed = replace(two, tensor=one.tensor, payload_crc32c=one.payload_crc32c)
    with pytest.raises(FrameCorrupted):
        verify(mixed, fingerprint=FINGERPRINT)


def test_a_frame_of_another_mesh_is_named_as_such():
    with pytest.raises(FingerprintMismatch):
        verify(frame(fingerprint=bytes(8)), fingerprint=FINGERPRINT)


def test_a_frame_of_another_protocol_version_is_refused():
    with pytest.raises(FrameMalformed, match="protocol version"):
        verify(frame(version=99), fingerprint=FINGERPRINT)


def test_a_payload_checksum_without_a_payload_is_refused():
    bad = replace(frame(tensor=None), payload_crc32c=1)
    bad = replace(bad, header_crc32c=crc32c(bad.pack_header()))
    with pytest.raises(FrameMalformed, match="without a payload"):
        verify(bad, fingerprint=FINGERPRINT)


def row(**changes) -> StepRow:
    return replace(StepRow(REQUEST, 0, (1,)), **changes)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ((row(),) * (ROWS_MAX + 1), FrameTooLarge),
        ((row(token_ids=(0,) * (ROW_TOKENS_MAX + 1)),), FrameTooLarge),
        ((row(marks=(StageMark(0, 0, 0),) * (STAGES_MAX + 1)),), FrameTooLarge),
        ((row(scores=(Score(0, 0, 0, 0.0, 0.0),) * (ROW_TOKENS_MAX + 1)),), FrameTooLarge),
        ((row(fault_detail="x" * (FAULT_DETAIL_CHARACTERS_MAX + 1)),), FrameTooLarge),
        ((row(request=b"short"),), FrameMalformed),
        ((row(request=bytes(17)),), FrameMalformed),
        ((row(token=replace(token(), request=bytes(17))),), FrameMalformed),
        ((row(token=replace(token(), chain=bytes(15))),), FrameMalformed),
        (
            (row(token=replace(token(), alternatives=((1, 0.0),) * (ALTERNATIVES_MAX + 1))),),
            FrameTooLarge,
        ),
        (
            (
                row(
                    opening=replace(
                        opening(),
                        sampling=SamplingSpec(logit_bias=((1, 0.0),) * (LOGIT_BIAS_MAX + 1)),
                    )
                ),
            ),
            FrameTooLarge,
        ),
    ],
)
def test_named_limits_are_checked_before_anything_is_packed(rows, error):
    with pytest.raises(error):
        check_limits(StepFrame(FrameKind.DECODE, FINGERPRINT, 1, 1, -1, 0, rows))


@pytest.mark.parametrize("fingerprint", [b"", bytes(7), bytes(9)])
def test_a_fingerprint_of_another_length_is_refused(fingerprint):
    """Packing would pad or cut it, so two different ones could share a checksum."""
    with pytest.raises(FrameMalformed):
        check_limits(replace(frame(), fingerprint=fingerprint))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"step": 2**64},
        {"hop_from": 40_000},
        {"tensor": Tensor(DType.F32, (1, 1, 1, 1, 1), bytes(4))},
        {"rows": (row(token_ids=(2**32,)),)},
        {"rows": (row(first_position=-1),)},
        {"rows": (row(fault_detail="\ud800"),)},
        {"rows": (row(opening=replace(opening(), chain=b"short")),)},
    ],
)
def test_fields_that_do_not_fit_their_place_are_malformed_and_never_a_crash(change):
    with pytest.raises(FrameMalformed):
        check_header(replace(frame(), **change), fingerprint=FINGERPRINT)


def test_a_failed_row_keeps_its_identity_and_a_legible_detail():
    failed = row().failed(RowStatus.CACHE_LOST, stage=1, detail="x\ud800" + "y" * 500)
    assert (failed.request, failed.status, failed.fault_stage) == (REQUEST, RowStatus.CACHE_LOST, 1)
    assert len(failed.fault_detail) == FAULT_DETAIL_CHARACTERS_MAX
    verify(frame(rows=(failed,)), fingerprint=FINGERPRINT)


def test_rows_know_where_they_end():
    assert (row(first_position=4, token_ids=(1, 2)).end_position, row().token_count) == (6, 1)
    assert frame().token_count == 4
    assert frame().byte_count > 24


def test_a_frame_prints_as_one_line():
    text = str(frame())
    assert text.startswith("prefill req=0001,0000 step=5 epoch=2 stage 0→1 bf16[1,3,4] 24 B crc=")


def test_a_damaged_token_is_a_damaged_frame_so_that_it_is_sent_again():
    good = frame()
    damaged = replace(good.rows[0], token=replace(good.rows[0].token, token_id=10))
    with pytest.raises(FrameCorrupted) as caught:
        verify(replace(good, rows=(damaged, good.rows[1])), fingerprint=FINGERPRINT)
    assert caught.value.metadata["part"] == "header"


IDS = st.integers(0, 2**32 - 1)
ROWS = st.builds(
    StepRow,
    st.binary(min_size=16, max_size=16),
    IDS,
    st.lists(IDS, max_size=5).map(tuple),
    samples=st.booleans(),
    status=st.sampled_from(RowStatus),
    fault_stage=st.integers(-1, 255),
    fault_detail=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    marks=st.lists(st.builds(StageMark, IDS, IDS, IDS), max_size=3).map(tuple),
)


@settings(max_examples=200)
@given(st.lists(ROWS, min_size=1, max_size=3).map(tuple), st.data())
def test_any_frame_in_range_verifies_and_no_other_frame_shares_its_header(rows, data):
    kind = data.draw(st.sampled_from(FrameKind))
    one = StepFrame(kind, FINGERPRINT, 1, 1, -1, 0, rows).sealed()
    verify(one, fingerprint=FINGERPRINT)
    other_rows = data.draw(st.lists(ROWS, min_size=1, max_size=3).map(tuple))
    other = StepFrame(kind, FINGERPRINT, 1, 1, -1, 0, other_rows).sealed()
    assert (other.pack_header() == one.pack_header()) == (other_rows == rows)


def test_the_header_is_little_endian_at_the_documented_positions():
    header = frame().pack_header()
    assert header[:4] == b"SMF1"
    version, kind, dtype = struct.unpack_from("<HBB", header, 4)
    assert (kind, dtype) == (FrameKind.PREFILL, DType.BF16)
    assert version == frame().version
    assert header[8:16] == FINGERPRINT
    assert struct.unpack_from("<QQhh4IQIH", header, 16) == (
        2, 5, 0, 1, 1, 3, 4, 0, 24, frame().payload_crc32c, 2,
    )  # fmt: skip


def test_another_intact_token_in_the_place_of_the_one_that_was_sealed_is_refused() -> None:
    """A CRC behind what it covers cancels that out of the CRC around both."""
    sealed = frame().sealed()
    row = sealed.rows[0]
    assert row.token is not None
    for changes in ({"token_id": 10}, {"margin": 0.5}, {"sampled_at_unix_ns": 78}):
        other = replace(row.token, **changes).sealed()
        other.verify()
        swapped = replace(sealed, rows=(replace(row, token=other), *sealed.rows[1:]))
        with pytest.raises(FrameCorrupted):
            check_header(swapped, fingerprint=FINGERPRINT)
