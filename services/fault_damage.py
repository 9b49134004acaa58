"""What can be done to one message on a hop, and plans that say when.

A fault is *plain*, as a cable or a buggy buffer makes it, or *resealed*: both checksums are
recomputed over the wrong content, as a process makes it that damages data before it seals them.
Checksums catch the first kind; only the checks behind them catch the second.

A plan decides about each copy of each step as it passes. Seeded plans and seeded damage are the
same for the same seed and the same traffic.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from services import codec
from stagemesh.errors import FrameMalformed
from stagemesh.frame import StepFrame
from stagemesh.tensor import DType
from stagemesh.v1 import stage_service_pb2


class FaultKind(enum.Enum):
    """What may happen to one message."""

    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DELAY = "delay"
    GARBAGE = "garbage"
    """Not protobuf any more."""
    TRUNCATE = "truncate"
    """Half of the payload is missing."""
    PAYLOAD_BIT = "payload_bit"
    SWAP_BLOCKS = "swap_blocks"
    """Two 64-byte blocks of the payload change places."""
    SWAP_BF16 = "swap_bf16"
    """Two neighbouring 16-bit values of the payload change places."""
    NAN = "nan"
    INFINITY = "infinity"
    """The first number of an f32 or bf16 payload becomes minus infinity."""
    HEADER_BIT = "header_bit"
    WRONG_DTYPE = "wrong_dtype"
    WRONG_SHAPE = "wrong_shape"
    RELABEL_REQUEST = "relabel_request"
    RELABEL_POSITION = "relabel_position"
    WRONG_HOP = "wrong_hop"
    WRONG_FINGERPRINT = "wrong_fingerprint"
    ROW_BIT = "row_bit"
    """One bit of what a row says: of a token id, or on the last hop of the token itself."""
    CACHE_LENGTH = "cache_length"
    """The newest mark says that the cache holds one position more than it does; needs a mark."""
    TOKEN_FIELD = "token_field"  # noqa: S105 - not a secret
    """The token is given to another position; last hop only."""
    OLD_EPOCH = "old_epoch"
    """A sealed frame of the epoch before goes first."""
    DROP_ANSWER = "drop_answer"
    LOSE_ANSWERS = "lose_answers"
    """Answers are lost until a frame is sent again: a single one is made up for by the next."""
    DUPLICATE_ANSWER = "duplicate_answer"
    RESET = "reset"
    """The connection breaks here."""


PAYLOAD_KINDS = frozenset(
    {
        FaultKind.TRUNCATE,
        FaultKind.PAYLOAD_BIT,
        FaultKind.SWAP_BLOCKS,
        FaultKind.SWAP_BF16,
        FaultKind.NAN,
        FaultKind.INFINITY,
        FaultKind.WRONG_DTYPE,
        FaultKind.WRONG_SHAPE,
    }
)
"""Need an activation."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    resealed: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value}{' resealed' if self.resealed else ''}"


@dataclass(frozen=True, slots=True)
class Fired:
    """One fault that happened to one copy (from 1) of a step of an epoch."""

    fault: Fault
    step: int
    copy: int
    epoch: int = 0


class FaultPlan(Protocol):
    """Decides about each copy of each step as it passes."""

    def pick(self, step: int, copy: int) -> Fault | None: ...


@dataclass(slots=True)
class ScriptedFaults:
    """Faults for the first copies of given steps: the n-th copy meets the n-th fault of its
    list."""

    script: Mapping[int, Sequence[Fault]]

    def pick(self, step: int, copy: int) -> Fault | None:
        faults = self.script.get(step, ())
        return faults[copy - 1] if copy <= len(faults) else None


class SeededFaults:
    """Each copy of each step meets a fault with probability ``rate``, retransmitted ones as
    well."""

    def __init__(self, seed: int, rate: float, faults: Sequence[Fault]) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._rate = rate
        self._faults = tuple(faults)

    def pick(self, step: int, copy: int) -> Fault | None:
        del step, copy
        if self._random.random() >= self._rate:
            return None
        return self._random.choice(self._faults)


@dataclass(frozen=True, slots=True)
class SameFault:
    """Every copy of every step meets the same fault."""

    fault: Fault

    def pick(self, step: int, copy: int) -> Fault | None:
        del step, copy
        return self.fault


class NoFaults:
    def pick(self, step: int, copy: int) -> Fault | None:
        del step, copy
        return None


class FrameDamage:
    """The faults that change a message. ``damage`` gives the bytes to send in its place."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret

    def damage(self, data: bytes, fault: Fault) -> bytes:
        if fault.kind is FaultKind.GARBAGE:
            return bytes(255 - byte for byte in data[:64])
        message = stage_service_pb2.ExchangeRequest.FromString(data)
        body: Any = message.part if message.WhichOneof("message") == "part" else message.frame
        getattr(self, f"_{fault.kind.value}")(body)
        damaged = message.SerializeToString()
        return _reseal(damaged) if fault.resealed else damaged

    def _edit(self, body: Any, change: Callable[[bytearray], None]) -> None:
        field = "data" if hasattr(body, "data") else "payload"
        payload = bytearray(getattr(body, field))
        change(payload)
        setattr(body, field, bytes(payload))

    def _truncate(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            del payload[len(payload) // 2 :]

        self._edit(body, change)

    def _payload_bit(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)

        self._edit(body, change)

    def _swap_blocks(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:64], payload[64:128] = payload[64:128], payload[0:64]

        self._edit(body, change)

    def _swap_bf16(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:2], payload[2:4] = payload[2:4], payload[0:2]

        self._edit(body, change)

    def _nan(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:4] = b"\xff\xff\xff\xff"

        self._edit(body, change)

    def _infinity(self, body: Any) -> None:
        wide = getattr(body, "dtype", DType.F32) != DType.BF16

        def change(payload: bytearray) -> None:
            payload[0:4] = b"\x00\x00\x80\xff" if wide else b"\x80\xff\x80\xff"

        self._edit(body, change)

    def _header_bit(self, body: Any) -> None:
        row = body.rows[self._random.randrange(len(body.rows))]
        fields = [(body, "step"), (body, "epoch"), (body, "hop_to_plus_one"), (body, "version")]
        fields += [(body, "header_crc32c"), (body, "payload_crc32c"), (row, "first_position")]
        fields += [(mark, "history_digest") for mark in row.marks]
        target, field = self._random.choice(fields)
        setattr(target, field, getattr(target, field) ^ 1 << self._random.randrange(8))

    def _wrong_dtype(self, body: Any) -> None:
        swap = {DType.BF16: DType.F16, DType.F16: DType.BF16, DType.F32: DType.I32}
        body.dtype = int(swap[DType(body.dtype)])

    def _wrong_shape(self, body: Any) -> None:
        tokens, hidden = body.shape
        body.shape[:] = [tokens * 2, hidden // 2]

    def _relabel_request(self, body: Any) -> None:
        body.rows[0].request = bytes(reversed(body.rows[0].request))

    def _relabel_position(self, body: Any) -> None:
        body.rows[0].first_position += 1

    def _wrong_hop(self, body: Any) -> None:
        body.hop_from_plus_one += 1

    def _wrong_fingerprint(self, body: Any) -> None:
        body.fingerprint = bytes(reversed(body.fingerprint))

    def _row_bit(self, body: Any) -> None:
        row = body.rows[0]
        if row.HasField("token"):
            row.token.token_id ^= 1
        else:
            row.token_ids[-1] ^= 1

    def _cache_length(self, body: Any) -> None:
        body.rows[0].marks[-1].cache_length += 1

    def _token_field(self, body: Any) -> None:
        row = next((row for row in body.rows if row.HasField("token")), None)
        if row is not None:
            row.token.position += 1

    def _old_epoch(self, body: Any) -> None:
        body.epoch -= 1


def _reseal(data: bytes) -> bytes:
    """True checksums over whatever the message says now, tokens' own included."""
    frame = codec.decode_request(data)
    if not isinstance(frame, StepFrame):
        raise FrameMalformed("only a whole frame can be sealed again")
    rows = tuple(replace(row, token=row.token.sealed()) if row.token else row for row in frame.rows)
    (encoded,) = codec.encode_frame(replace(frame, rows=rows).sealed())
    return encoded
