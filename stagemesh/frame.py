"""The frame: one step of one microbatch, on one hop.

Every hop speaks the same frame. The coordinator sends it to stage 0 with token ids and no tensor; a
middle stage receives an activation and sends one; the last stage sends tokens back to the
coordinator. A row is one request's part of the step.

Two checksums, TigerBeetle's way: ``payload_crc32c`` covers the tensor bytes, ``header_crc32c``
covers all else at fixed packed positions *including the payload's checksum and length*, so that a
header can be trusted before its payload, and a true payload under a wrong label cannot pass.
Protobuf's own bytes are never hashed: protobuf does not promise canonical serialization.

Invariant: within one epoch, ``step`` numbers are consecutive from 1 on every hop, so a frame is the
next, a duplicate, or a gap, and nothing else.

Header layout (little-endian): magic ``SMF1``, protocol version u16, kind u8, dtype u8, mesh
fingerprint 8 bytes, epoch u64, step u64, hop from i16, hop to i16, shape 4×u32 (unused axes 0),
payload length u64, payload CRC32C u32, row count u16; then each row as ``StepRow.pack`` lays it
out. W3C trace context rides beside the frame and is not covered: it may be rewritten by a proxy and
decides nothing."""

from __future__ import annotations

import enum
import functools
import struct
from dataclasses import dataclass, replace

from stagemesh import PROTOCOL_VERSION
from stagemesh.checksum import CHAIN_BYTES, crc32c, pack_token_ids
from stagemesh.errors import (
    FingerprintMismatch,
    FrameCorrupted,
    FrameMalformed,
    FrameTooLarge,
    InvalidRequest,
)
from stagemesh.sampling import LOGIT_BIAS_MAX, RowOpening
from stagemesh.tensor import RANK_MAX, DType, Tensor, check_tensor
from stagemesh.token import ALTERNATIVES_MAX, REQUEST_BYTES, StageMark, TokenChunk

ROWS_MAX = 256
"""Rows of one step; in-flight batching above this gains nothing on the hardware we know."""
ROW_TOKENS_MAX = 8192
"""Token ids of one row of one step (a prefill chunk)."""
STAGES_MAX = 256
FAULT_DETAIL_CHARACTERS_MAX = 200
BOUNDARIES_MAX = STAGES_MAX
DIGESTS_MAX = 65_536
"""Boundary digests of one row: 256 boundaries of 256 tokens."""
FINGERPRINT_BYTES = 8
PART_BYTES_MAX = 1024 * 1024
"""Payloads above this travel in parts, each checked on arrival: a gRPC message is buffered
whole."""

_FIXED = struct.Struct("<4sHBB8sQQhh4IQIH")
_ROW_LAYOUT = "<16sIIBBhHIHHHI"
_ROW = struct.Struct(_ROW_LAYOUT)
_CHECKSUM = struct.Struct("<I")
_SCORE = struct.Struct("<IIIff")
_DIGEST = struct.Struct("<IIIff")


PLAIN_TOKENS_MAX = 4
"""Token ids of a row that is packed by a layout of its own; longer ones are a prompt's."""


@functools.lru_cache(maxsize=256)
def _plain_row(token_ids: int, marks: int) -> struct.Struct:
    return struct.Struct(f"{_ROW_LAYOUT}{token_ids}I{3 * marks}I")


class FrameKind(enum.IntEnum):
    """What a step does. Wire values are frozen."""

    UNSPECIFIED = 0
    PREFILL = 1
    """Consume prompt tokens; a row flagged ``samples`` yields one token."""
    DECODE = 2
    """Consume one token per row, yield the next."""
    REWIND = 3
    """Trim each row's cache to ``first_position`` positions."""
    SCORE = 4
    """Consume tokens and report, for each, what this route would have chosen there."""
    CLOSE = 5
    """Forget the rows' requests and free their caches."""
    PROBE = 6
    """A prefill whose caches are dropped at once; used when a route opens and as a canary."""


class RowStatus(enum.IntEnum):
    """Whether a row is still good. A failed row travels on (unchanged) so that each row of each
    step has exactly one answer; later stages do not compute it."""

    OK = 0
    POSITION_MISMATCH = 1
    CACHE_LOST = 2
    CACHE_EXHAUSTED = 3
    NON_FINITE = 4
    COMPUTE_FAILED = 5
    OUT_OF_ENVELOPE = 6
    INVALID = 7
    CORRUPTED = 8
    """The activation is not the one the stage before it marked: damaged outside of any hop."""


@dataclass(frozen=True, slots=True)
class Score:
    """The reference's view of one token: ``gap`` is the best score minus the emitted token's own
    score (0 when the reference would have chosen the same), ``margin`` its top-1 minus top-2."""

    position: int
    token_id: int
    reference_token_id: int
    gap: float
    margin: float

    def pack(self) -> bytes:
        return _SCORE.pack(
            self.position, self.token_id, self.reference_token_id, self.gap, self.margin
        )


@dataclass(frozen=True, slots=True)
class BoundaryDigest:
    """The activation of the token at ``position`` as it left layer ``layer`` - 1.

    ``crc32c`` is equal for equal bytes. ``rms`` (root mean square) and ``projection`` (on a fixed
    sequence of signs, over the square root of the size) are near for nearly equal ones."""

    layer: int
    position: int
    crc32c: int
    rms: float
    projection: float

    def pack(self) -> bytes:
        return _DIGEST.pack(self.layer, self.position, self.crc32c, self.rms, self.projection)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One request's part of a step.

    request: 16 bytes (a UUID). first_position: where ``token_ids[0]`` goes; must equal the cache
    length at every stage. samples: the last position yields a token. opening: on the first row of a
    request on a route, and only there. marks: one per stage passed so far, in stage order. token
    and scores: filled by the last stage only. traceparent: the request's W3C trace context, on its
    opening row, unchecked. boundaries: layers behind which digests are asked for, by SCORE and
    PROBE rows; digests: what the stages passed so far reported of them."""

    request: bytes
    first_position: int
    token_ids: tuple[int, ...]
    samples: bool = False
    opening: RowOpening | None = None
    status: RowStatus = RowStatus.OK
    fault_stage: int = -1
    fault_detail: str = ""
    marks: tuple[StageMark, ...] = ()
    token: TokenChunk | None = None
    scores: tuple[Score, ...] = ()
    traceparent: str = ""
    boundaries: tuple[int, ...] = ()
    digests: tuple[BoundaryDigest, ...] = ()

    @property
    def token_count(self) -> int:
        return len(self.token_ids)

    @property
    def byte_count(self) -> int:
        """Rough size on the wire. What a row may carry much of counts: it is bounded nowhere else
        in what is kept of frames."""
        many = len(self.scores) + len(self.digests) if self.scores or self.digests else 0
        return 64 + 4 * len(self.token_ids) + 20 * many

    @property
    def end_position(self) -> int:
        """Cache length behind this row."""
        return self.first_position + len(self.token_ids)

    def pack(self) -> bytes:
        """Canonical bytes: fixed part, token ids, opening, marks, detail, scores, boundaries and
        their digests, then the token.

        The whole token is covered, not only its checksum: a token damaged on the last hop is
        thereby a damaged frame, which is sent again, and not a wrong token, which would have to be
        recomputed. Its checksum goes ahead of it: behind what it covers, a CRC cancels that out of
        every CRC around it, and one intact token could stand in for another."""
        token_ids, marks, token = self.token_ids, self.marks, self.token
        if len(token_ids) > PLAIN_TOKENS_MAX or (
            self.opening or self.scores or self.fault_detail or self.boundaries
        ):
            packed = self._pack_full()
        else:  # a decode row, in one call of ``struct``: every token pays for it on every hop
            flat = [*token_ids]
            for mark in marks:
                flat += (mark.cache_length, mark.history_digest, mark.output_crc32c)
            packed = _plain_row(len(token_ids), len(marks)).pack(
                self.request,
                self.first_position,
                len(token_ids),
                (1 if self.samples else 0) | (4 if token else 0),
                self.status,
                self.fault_stage,
                len(marks),
                0,
                0,
                0,
                0,
                len(self.digests),
                *flat,
            )
        return packed if token is None else packed + _CHECKSUM.pack(token.checksum) + token.packed

    def _pack_full(self) -> bytes:
        opening = self.opening.pack() if self.opening else b""
        detail = self.fault_detail.encode()
        flags = (1 if self.samples else 0) | (2 if self.opening else 0) | (4 if self.token else 0)
        parts = [
            _ROW.pack(
                self.request,
                self.first_position,
                len(self.token_ids),
                flags,
                self.status,
                self.fault_stage,
                len(self.marks),
                len(opening),
                len(self.scores),
                len(detail),
                len(self.boundaries),
                len(self.digests),
            ),
            pack_token_ids(self.token_ids),
            opening,
            *(mark.pack() for mark in self.marks),
            detail,
            *(score.pack() for score in self.scores),
        ]
        if self.boundaries:
            parts.append(pack_token_ids(self.boundaries))
            parts += [digest.pack() for digest in self.digests]
        return b"".join(parts)

    def failed(self, status: RowStatus, *, stage: int, detail: str = "") -> StepRow:
        """This row, marked as failed at ``stage``."""
        legible = detail[:FAULT_DETAIL_CHARACTERS_MAX].encode("utf-8", "replace").decode()
        return replace(self, status=status, fault_stage=stage, fault_detail=legible)


@dataclass(frozen=True, slots=True)
class StepFrame:
    """A step on the hop ``hop_from`` → ``hop_to`` (stage indices; -1 is the coordinator)."""

    kind: FrameKind
    fingerprint: bytes
    epoch: int
    step: int
    hop_from: int
    hop_to: int
    rows: tuple[StepRow, ...]
    tensor: Tensor | None = None
    payload_crc32c: int = 0
    header_crc32c: int = 0
    version: int = PROTOCOL_VERSION
    traceparent: str = ""
    tracestate: str = ""

    def pack_header(self, payload_length: int | None = None) -> bytes:
        """Canonical bytes of everything but the payload, the header CRC and the trace context.

        ``payload_length`` stands in for the payload's own length while it still travels in parts.
        """
        tensor = self.tensor
        if payload_length is None:
            payload_length = len(tensor.payload) if tensor else 0
        shape = (
            (*tensor.shape, *(0,) * (RANK_MAX - len(tensor.shape))) if tensor else (0,) * RANK_MAX
        )
        fixed = _FIXED.pack(
            b"SMF1",
            self.version,
            self.kind,
            tensor.dtype if tensor else DType.NONE,
            self.fingerprint,
            self.epoch,
            self.step,
            self.hop_from,
            self.hop_to,
            *shape,
            payload_length,
            self.payload_crc32c,
            len(self.rows),
        )
        rows = self.rows
        if len(rows) == 1:  # of a decode step of one stream: nothing has to be joined
            return fixed + rows[0].pack()
        return fixed + b"".join([row.pack() for row in rows])

    def sealed(self) -> StepFrame:
        """This frame with both checksums filled in."""
        sealed = StepFrame(
            self.kind,
            self.fingerprint,
            self.epoch,
            self.step,
            self.hop_from,
            self.hop_to,
            self.rows,
            self.tensor,
            crc32c(self.tensor.payload) if self.tensor else 0,
            0,
            self.version,
            self.traceparent,
            self.tracestate,
        )
        # The copy is nobody else's yet; a second one for one field would double the cost.
        object.__setattr__(sealed, "header_crc32c", crc32c(sealed.pack_header()))
        return sealed

    @property
    def token_count(self) -> int:
        return sum([len(row.token_ids) for row in self.rows])

    @property
    def byte_count(self) -> int:
        """Rough size on the wire, for windows and metrics."""
        payload = len(self.tensor.payload) if self.tensor else 0
        return payload + 96 + sum([row.byte_count for row in self.rows])

    def __str__(self) -> str:
        names = ",".join(row.request.hex()[:4] for row in self.rows[:3])
        more = f"+{len(self.rows) - 3}" if len(self.rows) > 3 else ""
        tensor = f" {self.tensor}" if self.tensor else ""
        return (
            f"{self.kind.name.lower()} req={names}{more} step={self.step} epoch={self.epoch} "
            f"stage {self.hop_from}→{self.hop_to}{tensor} crc={self.header_crc32c:08x}"
        )


def check_limits(frame: StepFrame) -> None:
    """First check of a receiver: named limits, before anything is trusted or allocated."""
    if len(frame.fingerprint) != FINGERPRINT_BYTES:
        raise FrameMalformed("fingerprint must be 8 bytes", length=len(frame.fingerprint))
    if len(frame.rows) > ROWS_MAX:
        raise FrameTooLarge("frame over rows_max", rows=len(frame.rows), limit=ROWS_MAX)
    for row in frame.rows:
        if len(row.token_ids) > ROW_TOKENS_MAX:
            raise FrameTooLarge("row over row_tokens_max", tokens=row.token_count)
        if len(row.marks) > STAGES_MAX:
            raise FrameTooLarge("row over stages_max", marks=len(row.marks))
        if len(row.scores) > ROW_TOKENS_MAX:
            raise FrameTooLarge("row over row_tokens_max", scores=len(row.scores))
        if len(row.boundaries) > BOUNDARIES_MAX or len(row.digests) > DIGESTS_MAX:
            raise FrameTooLarge("row over boundaries_max or digests_max")
        if row.digests and not row.boundaries:
            raise FrameMalformed("digests that nobody asked for")
        if len(row.fault_detail) > FAULT_DETAIL_CHARACTERS_MAX:
            raise FrameTooLarge("row over fault_detail_characters_max")
        _check_lengths(row)


def _check_lengths(row: StepRow) -> None:
    """Byte strings of fixed length: packing would pad or cut others, and so confuse two rows."""
    if len(row.request) != REQUEST_BYTES:
        raise FrameMalformed("request id must be 16 bytes", length=len(row.request))
    opening, token = row.opening, row.token
    if opening and len(opening.sampling.logit_bias) > LOGIT_BIAS_MAX:
        raise FrameTooLarge("opening over logit_bias_max")
    if token and (len(token.request) != REQUEST_BYTES or len(token.chain) != CHAIN_BYTES):
        raise FrameMalformed("token request and chain must be 16 bytes")
    if token and (len(token.marks) > STAGES_MAX or len(token.alternatives) > ALTERNATIVES_MAX):
        raise FrameTooLarge("token over stages_max or alternatives_max")


def check_header(
    frame: StepFrame, *, fingerprint: bytes, payload_length: int | None = None
) -> None:
    """Second and third check: header checksum, protocol version, mesh fingerprint."""
    try:
        header = frame.pack_header(payload_length)
    except (struct.error, OverflowError, ValueError, InvalidRequest) as error:
        raise FrameMalformed("header field out of range", detail=error) from error
    if crc32c(header) != frame.header_crc32c:
        raise FrameCorrupted("header checksum does not match", part="header", step=frame.step)
    if frame.version != PROTOCOL_VERSION:
        raise FrameMalformed("protocol version", version=frame.version, expected=PROTOCOL_VERSION)
    if frame.fingerprint != fingerprint:
        raise FingerprintMismatch(
            "frame of another mesh or other weights",
            expected=fingerprint.hex(),
            actual=frame.fingerprint.hex(),
        )


def check_payload(frame: StepFrame) -> None:
    """Payload checksum, then dtype, shape and length. Run after epoch and sequence were checked."""
    if frame.tensor is None:
        if frame.payload_crc32c:
            raise FrameMalformed("payload checksum without a payload", step=frame.step)
        return
    if crc32c(frame.tensor.payload) != frame.payload_crc32c:
        raise FrameCorrupted("payload checksum does not match", part="payload", step=frame.step)
    check_tensor(frame.tensor)


def verify(frame: StepFrame, *, fingerprint: bytes) -> None:
    """Every check that needs no state; the sender runs it after encoding, the receiver after
    decoding."""
    check_limits(frame)
    check_header(frame, fingerprint=fingerprint)
    check_payload(frame)
