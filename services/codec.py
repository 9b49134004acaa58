"""The messages of a hop ↔ the mesh's own types. This and ``codec_values`` alone see both.

*Encoding* serializes the small fields through protobuf and appends the payload as the wire format's
last field itself: the tensor's bytes are copied once, into the message gRPC sends, and a memoryview
needs no detour. *Decoding* copies the payload once, out of the message. Neither trusts a length, an
enum or a nesting that came from outside: what does not fit raises FrameMalformed, and nothing else
is raised.

Indices that may be -1 (the coordinator's hop, no fault) travel as index + 1, since 0 is protobuf's
"unset".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from services.codec_values import (
    digest_from_pb,
    digest_to_pb,
    fault_from_pb,
    fault_to_pb,
    mark_from_pb,
    mark_to_pb,
    member,
    opening_from_pb,
    opening_to_pb,
    sampling_from_pb,
    sampling_to_pb,
    score_from_pb,
    score_to_pb,
    token_from_pb,
    token_to_pb,
    worker_from_pb,
    worker_to_pb,
)
from stagemesh.checksum import crc32c
from stagemesh.errors import FrameCorrupted, FrameMalformed
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow, verify
from stagemesh.parts import FramePart, PartedFrame
from stagemesh.tensor import DType, Tensor
from stagemesh.transport import Ack, Nack, wire_messages
from stagemesh.v1 import frame_pb2, stage_service_pb2

__all__ = [
    "LinkOpening",
    "LinkState",
    "decode_request",
    "decode_response",
    "encode_ack",
    "encode_frame",
    "encode_nack",
    "encode_opening",
    "encode_state",
    "encode_whole",
    "fault_from_pb",
    "fault_to_pb",
    "mark_from_pb",
    "mark_to_pb",
    "opening_from_pb",
    "opening_to_pb",
    "sampling_from_pb",
    "sampling_to_pb",
    "score_from_pb",
    "score_to_pb",
    "step_frame_to_pb",
    "token_from_pb",
    "token_to_pb",
    "worker_from_pb",
    "worker_to_pb",
]

_FRAME_TAG = b"\x12"
"""ExchangeRequest.frame: field 2, length-delimited."""
_PART_TAG = b"\x1a"
"""ExchangeRequest.part: field 3."""
_PAYLOAD_TAG = b"\x72"
"""StepFrame.payload: field 14."""
_DATA_TAG = b"\x2a"
"""FramePart.data: field 5."""

_STATE = struct.Struct("<4sQIQ")

_KINDS = {int(kind): kind for kind in FrameKind}
_STATUSES = {int(status): status for status in RowStatus}
_DTYPES = {int(dtype): dtype for dtype in DType}

_MARKS_MAX = 4096
"""Elements of any repeated message we are willing to walk before the frame's own limits are
checked."""


@dataclass(frozen=True, slots=True)
class LinkOpening:
    """First message of a link: who dials, for which hop of which route."""

    epoch: int
    hop_from: int
    hop_to: int
    fingerprint: bytes
    version: int
    worker: str


@dataclass(frozen=True, slots=True)
class LinkState:
    """The receiver's answer: what it expects next, and how much it takes unacknowledged."""

    next_step: int
    inflight_frames_max: int
    inflight_bytes_max: int

    def checksum(self) -> int:
        """CRC32C over every field: a wrong ``next_step`` would free what was never accepted."""
        facts = (self.next_step, self.inflight_frames_max, self.inflight_bytes_max)
        return crc32c(_STATE.pack(b"SMO1", *facts))


# ---------------------------------------------------------------- predecessor to successor


def encode_opening(opening: LinkOpening) -> bytes:
    """A serialized ExchangeRequest that opens a link."""
    message = stage_service_pb2.LinkOpen(
        epoch=opening.epoch,
        hop_from_plus_one=opening.hop_from + 1,
        hop_to_plus_one=opening.hop_to + 1,
        fingerprint=opening.fingerprint,
        version=opening.version,
        worker=opening.worker,
    )
    return stage_service_pb2.ExchangeRequest(open=message).SerializeToString()


def encode_frame(frame: StepFrame, *, check: bool = False) -> Iterator[bytes]:
    """Serialized ExchangeRequests for a sealed frame: one, or a header and its parts.

    ``check`` decodes and verifies what was encoded before anything is handed out (the pair
    assertion); parts are covered by their own checksums. Raises the error of the first check that
    fails.
    """
    for message in wire_messages(frame):
        encoded = _encode_message(message)
        if check and isinstance(message, StepFrame):
            decoded = decode_request(encoded)
            if not isinstance(decoded, StepFrame):
                raise FrameMalformed("a frame did not survive encoding", step=frame.step)
            verify(decoded, fingerprint=frame.fingerprint)
        yield encoded


def encode_whole(frame: StepFrame) -> bytes:
    """A serialized ExchangeRequest with a frame of any size, for a pipe that knows no limit."""
    return _encode_message(frame)


def _encode_message(message: StepFrame | PartedFrame | FramePart) -> bytes:
    if isinstance(message, FramePart):
        return _encode_part(message)
    if isinstance(message, PartedFrame):
        header = step_frame_to_pb(message.frame)
        header.payload_length = message.payload_length
        header.part_count = message.part_count
        return _enclose(_FRAME_TAG, header.SerializeToString(), _PAYLOAD_TAG, b"")
    payload = message.tensor.payload if message.tensor else b""
    return _enclose(
        _FRAME_TAG, step_frame_to_pb(message).SerializeToString(), _PAYLOAD_TAG, payload
    )


def _encode_part(part: FramePart) -> bytes:
    message = frame_pb2.FramePart(
        epoch=part.epoch,
        step=part.step,
        index=part.index,
        offset=part.offset,
        data_crc32c=part.data_crc32c,
    )
    return _enclose(_PART_TAG, message.SerializeToString(), _DATA_TAG, part.data)


def _enclose(tag: bytes, fields: bytes, bytes_tag: bytes, data: bytes | memoryview) -> bytes:
    """``fields`` and one bytes field behind them, as a submessage under ``tag``."""
    if not len(data):
        return b"".join((tag, _varint(len(fields)), fields))
    head = bytes_tag + _varint(len(data))
    length = _varint(len(fields) + len(head) + len(data))
    return b"".join((tag, length, fields, head, data))


def _varint(value: int) -> bytes:
    """Protobuf's base-128 encoding of a length."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def decode_request(
    data: bytes | memoryview,
) -> LinkOpening | StepFrame | PartedFrame | FramePart:
    """What a predecessor sent. Raises FrameMalformed; nothing is verified but the structure."""
    try:
        message = stage_service_pb2.ExchangeRequest.FromString(data)  # type: ignore[arg-type]
    except (DecodeError, ValueError, TypeError) as error:
        raise FrameMalformed("not an ExchangeRequest") from error
    which = message.WhichOneof("message")
    if which == "frame":
        return _frame_from_pb(message.frame)
    if which == "part":
        part = message.part
        return FramePart(
            part.epoch, part.step, part.index, part.offset, part.data, part.data_crc32c
        )
    if which == "open":
        return _opening_from_pb(message.open)
    raise FrameMalformed("an ExchangeRequest without a message")


def _opening_from_pb(message: stage_service_pb2.LinkOpen) -> LinkOpening:
    return LinkOpening(
        epoch=message.epoch,
        hop_from=message.hop_from_plus_one - 1,
        hop_to=message.hop_to_plus_one - 1,
        fingerprint=message.fingerprint,
        version=message.version,
        worker=message.worker,
    )


# ---------------------------------------------------------------- successor to predecessor


def encode_state(state: LinkState) -> bytes:
    """A serialized ExchangeResponse that answers an opening."""
    opened = stage_service_pb2.LinkOpened(
        next_step=state.next_step,
        inflight_frames_max=state.inflight_frames_max,
        inflight_bytes_max=state.inflight_bytes_max,
        crc32c=state.checksum(),
    )
    return stage_service_pb2.ExchangeResponse(opened=opened).SerializeToString()


def encode_ack(ack: Ack) -> bytes:
    """A serialized ExchangeResponse with an acknowledgement."""
    message = stage_service_pb2.FrameAck(
        step=ack.step, epoch=ack.epoch, duplicate=ack.duplicate, crc32c=ack.checksum()
    )
    return stage_service_pb2.ExchangeResponse(ack=message).SerializeToString()


def encode_nack(nack: Nack) -> bytes:
    """A serialized ExchangeResponse with a refusal."""
    message = stage_service_pb2.FrameNack(
        epoch=nack.epoch,
        next_step=nack.next_step,
        reason=nack.reason,
        detail=nack.detail,
        retransmit=nack.retransmit,
        crc32c=nack.checksum(),
    )
    return stage_service_pb2.ExchangeResponse(nack=message).SerializeToString()


def decode_response(data: bytes | memoryview) -> LinkState | Ack | Nack:
    """What a successor answered. Raises FrameMalformed, FrameCorrupted."""
    try:
        message = stage_service_pb2.ExchangeResponse.FromString(data)  # type: ignore[arg-type]
    except (DecodeError, ValueError, TypeError) as error:
        raise FrameMalformed("not an ExchangeResponse") from error
    which = message.WhichOneof("message")
    answer: LinkState | Ack | Nack
    if which == "ack":
        said = message.ack.crc32c
        answer = Ack(message.ack.epoch, message.ack.step, message.ack.duplicate)
    elif which == "nack":
        nack, said = message.nack, message.nack.crc32c
        answer = Nack(nack.epoch, nack.next_step, nack.reason, nack.detail, nack.retransmit)
    elif which == "opened":
        opened, said = message.opened, message.opened.crc32c
        answer = LinkState(opened.next_step, opened.inflight_frames_max, opened.inflight_bytes_max)
    else:
        raise FrameMalformed("an ExchangeResponse without a message")
    if answer.checksum() != said:
        raise FrameCorrupted("answer checksum does not match", part=which)
    return answer


# ---------------------------------------------------------------- frames


def step_frame_to_pb(frame: StepFrame) -> frame_pb2.StepFrame:
    """The message without its payload bytes, which ``encode_frame`` appends."""
    tensor = frame.tensor
    try:
        message = frame_pb2.StepFrame(
            version=frame.version,
            kind=int(frame.kind),  # type: ignore[arg-type]
            fingerprint=frame.fingerprint,
            epoch=frame.epoch,
            step=frame.step,
            hop_from_plus_one=frame.hop_from + 1,
            hop_to_plus_one=frame.hop_to + 1,
            rows=[_row_to_pb(row) for row in frame.rows],
            payload_crc32c=frame.payload_crc32c,
            header_crc32c=frame.header_crc32c,
            traceparent=frame.traceparent,
            tracestate=frame.tracestate,
        )
        if tensor is not None:
            message.dtype = int(tensor.dtype)  # type: ignore[assignment]
            message.shape.extend(tensor.shape)
            message.payload_length = len(tensor.payload)
    except (ValueError, TypeError) as error:
        raise FrameMalformed("frame field out of range", step=frame.step, detail=error) from error
    return message


def _frame_from_pb(message: frame_pb2.StepFrame) -> StepFrame | PartedFrame:
    payload = message.payload
    length, parts = message.payload_length, message.part_count
    if parts == 0 and length != len(payload):
        raise FrameMalformed(
            "payload has another length than its header says", expected=length, actual=len(payload)
        )
    if parts and payload:
        raise FrameMalformed("a payload inline and in parts", step=message.step)
    shape, dtype = tuple(message.shape), message.dtype
    if len(shape) > 8 or len(message.rows) > _MARKS_MAX:
        raise FrameMalformed("too many axes or rows", axes=len(shape), rows=len(message.rows))
    tensor = None
    if dtype or shape or length or parts:
        tensor = Tensor(member(_DTYPES, dtype, "dtype"), shape, payload)
    frame = StepFrame(
        member(_KINDS, message.kind, "kind"),
        message.fingerprint,
        message.epoch,
        message.step,
        message.hop_from_plus_one - 1,
        message.hop_to_plus_one - 1,
        tuple([_row_from_pb(row) for row in message.rows]),
        tensor,
        message.payload_crc32c,
        message.header_crc32c,
        message.version,
        message.traceparent,
        message.tracestate,
    )
    return PartedFrame(frame, length, parts) if parts else frame


def _row_to_pb(row: StepRow) -> frame_pb2.StepRow:
    message = frame_pb2.StepRow(
        request=row.request,
        first_position=row.first_position,
        token_ids=row.token_ids,
        samples=row.samples,
        status=int(row.status),  # type: ignore[arg-type]
        fault_stage_plus_one=row.fault_stage + 1,
        marks=[mark_to_pb(mark) for mark in row.marks],
    )
    if row.fault_detail:
        message.fault_detail = row.fault_detail
    if row.opening is not None:
        message.opening.CopyFrom(opening_to_pb(row.opening))
    if row.token is not None:
        message.token.CopyFrom(token_to_pb(row.token))
    if row.scores:
        message.scores.extend(score_to_pb(score) for score in row.scores)
    if row.traceparent:
        message.traceparent = row.traceparent
    if row.boundaries:
        message.boundaries.extend(row.boundaries)
        message.digests.extend(digest_to_pb(digest) for digest in row.digests)
    return message


def _row_from_pb(message: frame_pb2.StepRow) -> StepRow:
    marks = message.marks
    if len(marks) > _MARKS_MAX:
        raise FrameMalformed("too many marks", marks=len(marks))
    row = StepRow(
        message.request,
        message.first_position,
        tuple(message.token_ids),
        message.samples,
        opening_from_pb(message.opening) if message.HasField("opening") else None,
        member(_STATUSES, message.status, "status"),
        message.fault_stage_plus_one - 1,
        message.fault_detail,
        tuple([mark_from_pb(mark) for mark in marks]),
        token_from_pb(message.token) if message.HasField("token") else None,
        traceparent=message.traceparent,
    )
    if not (message.scores or message.boundaries or message.digests):
        return row  # nearly every row there is
    return replace(
        row,
        scores=tuple([score_from_pb(score) for score in message.scores]),
        boundaries=tuple(message.boundaries),
        digests=tuple([digest_from_pb(digest) for digest in message.digests]),
    )
