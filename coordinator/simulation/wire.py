"""What a bad wire can do to one message of a hop.

Each *damage* takes a message that was on its way and returns what arrives instead: another message
with the old checksums, ``GARBAGE`` (bytes that cannot be decoded), or the message itself where the
damage has nothing to act on. Nothing is sealed again: the damage happened behind the sender's
checks, and in front of the receiver's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from coordinator.simulation.prng import Prng
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.tensor import DType, Tensor
from stagemesh.transport import Ack, FramePart, Nack, PartedFrame


@dataclass(frozen=True, slots=True)
class Garbage:
    """A message of which not even the outer form survived."""


GARBAGE: Final = Garbage()

FrameMessage = StepFrame | PartedFrame | FramePart
HopMessage = FrameMessage | Ack | Nack | Garbage
Damage = Callable[[FrameMessage, Prng], HopMessage]


def payload_bit(message: FrameMessage, prng: Prng) -> HopMessage:
    """One bit of the tensor (or of a part of it) flips."""
    if isinstance(message, FramePart):
        return replace(message, data=_flip(bytes(message.data), prng))
    if isinstance(message, PartedFrame) or message.tensor is None:
        return header_bit(message, prng)
    tensor = message.tensor
    data = _flip(bytes(tensor.payload), prng)
    return replace(message, tensor=Tensor(tensor.dtype, tensor.shape, data))


def swapped_blocks(message: FrameMessage, prng: Prng) -> HopMessage:
    """Two 8-byte words of the tensor change places: no sum over the bytes would notice."""
    if not isinstance(message, StepFrame) or message.tensor is None:
        return payload_bit(message, prng)
    tensor = message.tensor
    data = bytes(tensor.payload)
    words = [data[at : at + 8] for at in range(0, len(data), 8)]
    if len(words) < 2:
        return payload_bit(message, prng)
    at = prng.below(len(words) - 1)
    words[at], words[at + 1] = words[at + 1], words[at]
    return replace(message, tensor=Tensor(tensor.dtype, tensor.shape, b"".join(words)))


def header_bit(message: FrameMessage, prng: Prng) -> HopMessage:
    """One field of the envelope changes: the label, the place, or the row's own account."""
    if isinstance(message, FramePart):
        field = prng.choice(("epoch", "step", "index", "offset"))
        return replace(message, **{field: getattr(message, field) ^ (1 << prng.below(8))})
    if isinstance(message, PartedFrame):
        if prng.chance(0.25):
            return replace(message, payload_length=message.payload_length ^ (1 << prng.below(8)))
        return replace(message, frame=_relabel(message.frame, prng))
    return _relabel(message, prng)


def token_field(message: FrameMessage, prng: Prng) -> HopMessage:
    """A token id changes: one to be computed, or the one that was drawn."""
    if not isinstance(message, StepFrame) or not message.rows:
        return header_bit(message, prng)
    at = prng.below(len(message.rows))
    row = message.rows[at]
    if row.token is not None:
        field = prng.choice(("token_id", "position", "epoch", "step"))
        token = replace(row.token, **{field: getattr(row.token, field) ^ (1 << prng.below(6))})
        return _with_row(message, at, replace(row, token=token))
    if not row.token_ids:
        return header_bit(message, prng)
    ids = list(row.token_ids)
    ids[prng.below(len(ids))] ^= 1 << prng.below(6)
    return _with_row(message, at, replace(row, token_ids=tuple(ids)))


def truncated(message: FrameMessage, prng: Prng) -> HopMessage:
    """The end is missing: undecodable, or a tensor that is too short."""
    if prng.chance(0.5):
        return GARBAGE
    if isinstance(message, FramePart):
        return replace(message, data=bytes(message.data)[:-1])
    if isinstance(message, StepFrame) and message.tensor is not None:
        tensor = message.tensor
        data = bytes(tensor.payload)[: -prng.between(1, min(8, len(tensor.payload)))]
        return replace(message, tensor=Tensor(tensor.dtype, tensor.shape, data))
    return GARBAGE


def wrong_type(message: FrameMessage, prng: Prng) -> HopMessage:
    """The tensor says it is of another type or shape."""
    if not isinstance(message, StepFrame) or message.tensor is None:
        return header_bit(message, prng)
    tensor = message.tensor
    if prng.chance(0.5):
        return replace(message, tensor=Tensor(DType.F32, tensor.shape, tensor.payload))
    return replace(message, tensor=Tensor(tensor.dtype, tensor.shape[::-1], tensor.payload))


def other_weights(message: FrameMessage, prng: Prng) -> HopMessage:
    """The fingerprint is that of another model."""
    if isinstance(message, FramePart):
        return header_bit(message, prng)
    frame = message.frame if isinstance(message, PartedFrame) else message
    changed = replace(frame, fingerprint=_flip(frame.fingerprint, prng))
    return replace(message, frame=changed) if isinstance(message, PartedFrame) else changed


def damaged_answer(answer: Ack | Nack, prng: Prng) -> HopMessage:
    """An acknowledgement loses its meaning, or changes it: then its checksum, which travels with
    it, does not hold, and decoding says that it is none."""
    changed: Ack | Nack
    if isinstance(answer, Nack):
        changed = replace(answer, next_step=answer.next_step ^ (1 << prng.below(5)))
    elif prng.chance(0.3):
        changed = replace(answer, epoch=answer.epoch ^ (1 << prng.below(4)))
    else:
        changed = replace(answer, step=answer.step ^ (1 << prng.below(5)))
    seen = changed.checksum() != answer.checksum()
    return GARBAGE if seen or prng.chance(0.5) else changed


DAMAGES: Mapping[str, Damage] = {
    "payload_bit": payload_bit,
    "swapped_blocks": swapped_blocks,
    "header_bit": header_bit,
    "token_field": token_field,
    "truncate": truncated,
    "wrong_type": wrong_type,
    "wrong_fingerprint": other_weights,
}
"""Name of the fault → what it does to a frame."""


def _relabel(frame: StepFrame, prng: Prng) -> StepFrame:
    kind = prng.below(8)
    if kind == 0:
        return replace(frame, epoch=frame.epoch ^ (1 << prng.below(4)))
    if kind == 1:
        return replace(frame, step=frame.step ^ (1 << prng.below(5)))
    if kind == 2:
        return replace(frame, hop_to=frame.hop_to ^ 1)
    if kind == 3:
        other = prng.choice([one for one in FrameKind if one is not frame.kind])
        return replace(frame, kind=other)
    if kind == 4 or not frame.rows:
        return replace(frame, header_crc32c=frame.header_crc32c ^ (1 << prng.below(32)))
    at = prng.below(len(frame.rows))
    return _with_row(frame, at, _changed(frame.rows[at], prng))


def _changed(row: StepRow, prng: Prng) -> StepRow:
    kind = prng.below(4)
    if kind == 0:
        return replace(row, first_position=row.first_position ^ (1 << prng.below(5)))
    if kind == 1:
        return replace(row, samples=not row.samples)
    if kind == 2 and row.marks:
        at = prng.below(len(row.marks))
        marks = list(row.marks)
        marks[at] = replace(marks[at], cache_length=marks[at].cache_length ^ 1)
        return replace(row, marks=tuple(marks))
    return replace(row, request=_flip(row.request, prng))


def _with_row(frame: StepFrame, at: int, row: StepRow) -> StepFrame:
    rows = list(frame.rows)
    rows[at] = row
    return replace(frame, rows=tuple(rows))


def _flip(data: bytes, prng: Prng) -> bytes:
    if not data:
        return data
    changed = bytearray(data)
    changed[prng.below(len(changed))] ^= 1 << prng.below(8)
    return bytes(changed)
