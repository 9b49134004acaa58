"""Bugs of a hop: what a sender, a receiver or a frame's own checks may fail to do.

``FRAMES`` are of frames on their way, ``ANSWERS`` of what comes back for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator.scheduler import RouteScheduler
from coordinator.simulation.planted.bug import Bug
from stagemesh import hop_receiver
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.hop_receiver import (
    Ack,
    Action,
    HopReceiver,
    Nack,
    Received,
    TokenTransferValidator,
)
from stagemesh.hop_sender import HopSender
from stagemesh.parts import PartAssembler
from stagemesh.round_trip import RoundTrip
from stagemesh.sequence import Order, SequenceGate
from stagemesh.tensor import check_tensor
from stagemesh.window import InflightWindow


def _header_unchecked(frame: StepFrame, **facts: object) -> None:
    """No checksum, version or fingerprint is looked at."""


def _payload_unchecked(frame: StepFrame) -> None:
    if frame.tensor is not None:
        check_tensor(frame.tensor)


def _payload_only(self: StepFrame, payload_length: int | None = None) -> bytes:
    return self.payload_crc32c.to_bytes(4, "little")


def _answer_unchecked(answer: object) -> int:
    return 0


def _judge_any_epoch(self: SequenceGate, epoch: int, step: int) -> Order:
    if step == self.next_step:
        return Order.NEXT
    return Order.DUPLICATE if step < self.next_step else Order.GAP


def _admit_any_epoch(self: SequenceGate, epoch: int, step: int) -> Order:
    self.next_step = step + 1
    return Order.NEXT


def _take_again(self: SequenceGate, epoch: int, step: int) -> Order:
    if epoch != self.epoch:
        return Order.STALE_EPOCH if epoch < self.epoch else Order.UNKNOWN_EPOCH
    if step > self.next_step:
        return Order.GAP
    self.next_step = step
    return Order.NEXT


def gap_is_next(self: HopReceiver, frame: StepFrame) -> Received:
    self._gate.next_step = frame.step
    return self._accept(frame)


_judge_label = HopReceiver._judge_label


def _any_hop(self: HopReceiver, frame: StepFrame) -> Order:
    hop = (self.hop_from, self.hop_to)
    self.hop_from, self.hop_to = frame.hop_from, frame.hop_to
    try:
        return _judge_label(self, frame)
    finally:
        self.hop_from, self.hop_to = hop


def _acknowledge_before_accepting(self: HopReceiver, frame: StepFrame) -> Received:
    received = _judge_content(self, frame)
    if received.action is Action.REFUSE and frame.step == self.next_step:
        self._gate.next_step += 1
        return replace(received, nack=None, ack=Ack(self.epoch, self._gate.last_step))
    return received


_judge_content = HopReceiver._judge_content


def _no_answer_again(self: HopReceiver) -> Received:
    return Received(Action.DUPLICATE)


def _forget_nack(self: HopReceiver, error: MeshError, *, retransmit: bool = True) -> Nack:
    return Nack(self.epoch, self.next_step, error.reason, "", False)


_transmissions = HopSender.transmissions


def _drop_before_ack(self: HopSender, now: float) -> list[StepFrame]:
    frames = _transmissions(self, now)
    if frames:
        self._free_through(self.cursor - 1)
        self._window.free_through(self.cursor - 1)
    return frames


def _no_patience(self: RoundTrip) -> float:
    return 0.0005


def _keep_all(self: HopSender, step: int) -> int:
    self.acked = max(self.acked, step)
    return 0


_send = HopSender._send


def _rich(self: HopSender, entry: Any, now: float) -> StepFrame:
    frame = _send(self, entry, now)
    self._budget = self.limits.retransmit_budget_burst
    return frame


_begin_receiver = HopReceiver.__init__


def _never_finite_checked(self: HopReceiver, **facts: Any) -> None:
    _begin_receiver(self, **{**facts, "finite": None})


def tokens_unchecked(self: TokenTransferValidator, frame: StepFrame) -> None:
    """Any token under any label."""


def _room_for_any(self: HopSender) -> bool:
    return True


_begin_scheduler = RouteScheduler.__init__


def _places_for_any(self: RouteScheduler, *facts: Any) -> None:
    _begin_scheduler(self, *facts)
    self.places = 2**20


def ignore_time(self: HopSender, now: float, *, draw: float = 1.0) -> None:
    """No timer, no silence."""


def _always_fits(self: InflightWindow, size: int) -> bool:
    return True


def _part_anywhere(self: PartAssembler, part: Any) -> StepFrame | None:
    data = bytes(part.data)
    end = min(len(self._buffer), self._filled + len(data))
    self._buffer[self._filled : end] = data[: end - self._filled]
    self._filled = end
    self._index += 1
    return self._whole() if self._index >= self.parted.part_count else None


FRAMES = (
    Bug("header checksum not checked", ((hop_receiver, "check_header", _header_unchecked),)),
    Bug("payload checksum not checked", ((hop_receiver, "check_payload", _payload_unchecked),)),
    Bug("checksum covers the payload only", ((StepFrame, "pack_header", _payload_only),)),
    Bug(
        "frames of other epochs accepted",
        ((SequenceGate, "judge", _judge_any_epoch), (SequenceGate, "admit", _admit_any_epoch)),
    ),
    Bug(
        "no de-duplication",
        ((SequenceGate, "judge", _take_again),),
    ),
    Bug("a gap is accepted", ((HopReceiver, "_hold", gap_is_next),)),
    Bug("frames of other hops accepted", ((HopReceiver, "_judge_label", _any_hop),)),
    Bug(
        "acknowledged before accepted",
        ((HopReceiver, "_judge_content", _acknowledge_before_accepting),),
    ),
    Bug("duplicates are not answered", ((HopReceiver, "_answer_again", _no_answer_again),)),
    Bug("every refusal is final", ((HopReceiver, "_nack", _forget_nack),)),
    Bug(
        "dropped from the ledger before the ack", ((HopSender, "transmissions", _drop_before_ack),)
    ),
    Bug("the timer does not adapt", ((RoundTrip, "wait_s", property(_no_patience)),)),
    Bug("the ledger is never freed", ((HopSender, "_free_through", _keep_all),)),
    Bug("no timer", ((HopSender, "on_time", ignore_time),)),
    Bug("the window is unbounded", ((InflightWindow, "fits", _always_fits),)),
    Bug("nacks have no budget", ((HopSender, "_send", _rich),), reached_by=(5,)),
    Bug(
        "values that are no numbers pass",
        ((HopReceiver, "__init__", _never_finite_checked),),
        reached_by=(165,),
    ),
    Bug(
        "tokens pass the last hop unchecked",
        ((TokenTransferValidator, "check", tokens_unchecked),),
        reached_by=(4,),
    ),
    Bug(
        "steps in flight and ledgers are unbounded",
        (
            (RouteScheduler, "__init__", _places_for_any),
            (HopSender, "writable", property(_room_for_any)),
        ),
        pair=True,
        reached_by=(138,),
    ),
    Bug(
        "parts and payloads not checked",
        (
            (PartAssembler, "add", _part_anywhere),
            (hop_receiver, "check_payload", _payload_unchecked),
        ),
        pair=True,
    ),
)

ANSWERS = (
    Bug(
        "answers of a hop not checked",
        ((Ack, "checksum", _answer_unchecked), (Nack, "checksum", _answer_unchecked)),
    ),
)
