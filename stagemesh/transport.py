"""ReliableMessageTransport: both halves of the hop protocol, without I/O.

``HopSender`` keeps frames until they are acknowledged and decides what to send again;
``HopReceiver`` verifies what arrives, accepts each step exactly once and in order, and says what is
missing. Between them may be any transport that sometimes loses, repeats, reorders, damages or
delays messages, or breaks: what the receiver delivers is exactly what was offered to the sender, or
the hop ends with a named failure.

Services put gRPC between the halves; the simulator puts a seeded, faulty link there. Both run this
code. ``ReliableMessageTransport`` is the shortest such thing, and documents how the halves are
driven.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stagemesh.frame import StepFrame
from stagemesh.hop_limits import HopLimits
from stagemesh.hop_receiver import (
    Ack,
    Action,
    Boundary,
    FiniteCheck,
    HopReceiver,
    Nack,
    Received,
    TokenTransferValidator,
)
from stagemesh.hop_sender import HopSender
from stagemesh.parts import FramePart, PartAssembler, PartedFrame, part_count_of, split
from stagemesh.tensor import Tensor

__all__ = [
    "Ack",
    "Action",
    "Boundary",
    "FiniteCheck",
    "FramePart",
    "HopFault",
    "HopLimits",
    "HopReceiver",
    "HopSender",
    "Nack",
    "PartAssembler",
    "PartedFrame",
    "Received",
    "ReliableMessageTransport",
    "TokenTransferValidator",
    "wire_messages",
]

WireMessage = StepFrame | PartedFrame | FramePart


@dataclass(frozen=True, slots=True)
class HopFault:
    """A fault on a hop as one of its ends saw it, for the failure detector and the corruption
    detector.

    ``peer`` is the name of the worker at the other end. ``reason`` is a constant of the error tree.
    ``fatal``: this end has given the hop up.
    """

    epoch: int
    step: int
    hop_from: int
    hop_to: int
    reason: str
    detail: str = ""
    fatal: bool = False
    peer: str = ""

    def __str__(self) -> str:
        fatal = " fatal" if self.fatal else ""
        hop = f"{self.hop_from}→{self.hop_to}"
        return f"fault epoch={self.epoch} step={self.step} hop {hop} {self.reason}{fatal}"


def wire_messages(frame: StepFrame) -> Iterator[WireMessage]:
    """A sealed frame as it travels: inline, or a header and its parts."""
    count = 0 if frame.tensor is None else part_count_of(len(frame.tensor.payload))
    if frame.tensor is None or count == 0:
        yield frame
        return
    header = Tensor(frame.tensor.dtype, frame.tensor.shape, b"")
    yield PartedFrame(_without_payload(frame, header), len(frame.tensor.payload), count)
    yield from split(frame)


def _without_payload(frame: StepFrame, header: Tensor) -> StepFrame:
    return StepFrame(
        kind=frame.kind,
        fingerprint=frame.fingerprint,
        epoch=frame.epoch,
        step=frame.step,
        hop_from=frame.hop_from,
        hop_to=frame.hop_to,
        rows=frame.rows,
        tensor=header,
        payload_crc32c=frame.payload_crc32c,
        header_crc32c=frame.header_crc32c,
        version=frame.version,
        traceparent=frame.traceparent,
        tracestate=frame.tracestate,
    )


@dataclass(slots=True)
class ReliableMessageTransport:
    """One hop, both ends in one process: a sender, a receiver, and nothing between them.

    A link that puts a network between them does with messages what ``exchange`` does with calls.
    """

    sender: HopSender
    receiver: HopReceiver

    def open(self, now: float) -> None:
        """Connect (again): the receiver says what it expects, the sender resumes from there."""
        limits = self.receiver.limits
        self.sender.on_opened(
            self.receiver.opened(),
            now,
            frames_max=limits.inflight_frames_max,
            bytes_max=limits.inflight_bytes_max,
        )

    def exchange(self, now: float, *, draw: float = 1.0) -> list[StepFrame]:
        """Carry everything that is due across and back; returns the frames accepted, in order."""
        accepted: list[StepFrame] = []
        self.sender.on_time(now, draw=draw)
        for frame in self.sender.transmissions(now):
            for message in wire_messages(frame):
                received = self.receiver.receive(message)
                accepted.extend(received.frames)
                self.answer(received, now, draw=draw)
        return accepted

    def answer(self, received: Received, now: float, *, draw: float = 1.0) -> None:
        """Tell the sender what the receiver said."""
        ack, nack = received.ack, received.nack
        if ack is not None:
            self.sender.on_ack(ack.step, now, epoch=ack.epoch, duplicate=ack.duplicate)
        if nack is not None:
            self.sender.on_nack(
                nack.next_step, nack.reason, nack.retransmit, now, epoch=nack.epoch, draw=draw
            )
