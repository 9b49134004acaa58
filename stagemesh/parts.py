"""A payload above 1 MiB travels in parts: cut by the sender, checked one by one, checked whole at
the end.

A gRPC message is buffered whole before anyone may look at it, so one large message delays
everything behind it and its damage is found late. Parts follow their header frame immediately and
in order; a part carries its place (index and offset) and a checksum of its own bytes.

The header of the frame comes first and is verified first; it fixes the payload's length, so the
buffer is allocated once, at the right size, only after the header is trusted and within the limits.
A part that is damaged, missing, out of place or too long ends the assembly: the whole frame is
asked for again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stagemesh.checksum import crc32c
from stagemesh.errors import FrameCorrupted, FrameMalformed, FrameTooLarge, SequenceGap
from stagemesh.frame import PART_BYTES_MAX, StepFrame
from stagemesh.tensor import PAYLOAD_BYTES_MAX, Tensor, check_tensor_size


@dataclass(frozen=True, slots=True)
class FramePart:
    """``data`` belongs at byte ``offset`` of the payload of ``step``; ``index`` counts from 0."""

    epoch: int
    step: int
    index: int
    offset: int
    data: bytes | memoryview
    data_crc32c: int


@dataclass(frozen=True, slots=True)
class PartedFrame:
    """A header whose payload follows: ``frame.tensor`` has dtype and shape and an empty payload."""

    frame: StepFrame
    payload_length: int
    part_count: int


def part_count_of(payload_length: int) -> int:
    """Parts a payload of this length travels in; 0 means inline."""
    if payload_length <= PART_BYTES_MAX:
        return 0
    return -(-payload_length // PART_BYTES_MAX)


def split(frame: StepFrame) -> Iterator[FramePart]:
    """The parts of a frame's payload, in order, without copying it. Nothing if it travels
    inline."""
    if frame.tensor is None:
        return
    payload = memoryview(frame.tensor.payload)
    for index in range(part_count_of(len(payload))):
        offset = index * PART_BYTES_MAX
        data = payload[offset : offset + PART_BYTES_MAX]
        yield FramePart(frame.epoch, frame.step, index, offset, data, crc32c(data))


def check_parted(parted: PartedFrame) -> None:
    """Raise FrameMalformed or FrameTooLarge unless the announced parts can make this tensor.

    Nothing has been allocated yet; the header's checksum must already have been verified.
    """
    tensor = parted.frame.tensor
    if tensor is None or len(tensor.payload):
        raise FrameMalformed("a frame in parts needs a tensor without inline payload")
    if parted.payload_length > PAYLOAD_BYTES_MAX:
        raise FrameTooLarge(
            "payload over payload_bytes_max", size=parted.payload_length, limit=PAYLOAD_BYTES_MAX
        )
    if parted.part_count != part_count_of(parted.payload_length):
        raise FrameMalformed(
            "number of parts does not match the payload's length",
            parts=parted.part_count,
            expected=part_count_of(parted.payload_length),
        )
    check_tensor_size(tensor.dtype, tensor.shape, parted.payload_length)


class PartAssembler:
    """Collects the parts of one frame. ``add`` returns the whole frame with the last of them.

    The whole payload's checksum is left to ``check_payload``, as for a frame that came inline.
    """

    __slots__ = ("_buffer", "_filled", "_index", "parted")

    def __init__(self, parted: PartedFrame) -> None:
        """Raises FrameMalformed or FrameTooLarge, before allocating, as ``check_parted`` does."""
        check_parted(parted)
        self.parted = parted
        self._buffer = bytearray(parted.payload_length)
        self._filled = 0
        self._index = 0

    def add(self, part: FramePart) -> StepFrame | None:
        """Check one part and copy it to its place; a repeated part changes nothing.

        Raises SequenceGap for a part out of turn, FrameTooLarge or FrameMalformed for one that does
        not fit, FrameCorrupted for one whose checksum does not match. The assembly is then void.
        """
        frame = self.parted.frame
        if (part.epoch, part.step) != (frame.epoch, frame.step):
            raise SequenceGap("part of another frame", step=frame.step, actual=part.step)
        if part.index < self._index:
            return None
        if part.index > self._index or part.offset != self._filled:
            raise SequenceGap("part out of turn", step=part.step, part=part.index, due=self._index)
        self._check_size(part)
        if crc32c(part.data) != part.data_crc32c:
            raise FrameCorrupted("part checksum does not match", part=part.index, step=part.step)
        self._buffer[self._filled : self._filled + len(part.data)] = part.data
        self._filled += len(part.data)
        self._index += 1
        if self._index < self.parted.part_count:
            return None
        return self._whole()

    def _check_size(self, part: FramePart) -> None:
        """Every part but the last is full, so a wrong length is found before anything is copied."""
        if len(part.data) > PART_BYTES_MAX:
            raise FrameTooLarge("part over part_bytes_max", size=len(part.data))
        due = min(PART_BYTES_MAX, self.parted.payload_length - self._filled)
        if len(part.data) != due:
            raise FrameMalformed(
                "part has the wrong length", step=part.step, size=len(part.data), expected=due
            )

    def _whole(self) -> StepFrame:
        tensor = self.parted.frame.tensor
        if tensor is None:
            raise FrameMalformed("a frame in parts needs a tensor")
        payload = memoryview(self._buffer).toreadonly()
        return replace(self.parted.frame, tensor=Tensor(tensor.dtype, tensor.shape, payload))
