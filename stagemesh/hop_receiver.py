"""The receiving half of a hop: verify in a fixed order, accept each step exactly once, say what is
missing.

Checks run in the order of docs/architecture.md: size limits, header checksum, fingerprint, epoch,
hop, sequence, payload checksum, dtype and shape, tokens, finite values. The order matters: nothing
is allocated for a header that is not trusted, nothing is computed on for a frame of an older route,
and a step seen before is answered again whatever its payload looks like.

A frame that is true but ahead of its turn is *held* (as much as the window allows) and delivered
when the hole before it is filled, so that one lost frame costs one retransmission. One nack is sent
per hole, and one per refused copy; if a nack or its answer is lost, the sender's timer takes over.

A frame whose checksums hold but whose content is wrong (non-finite values, a token that does not
verify) was probably made wrong. It is asked for once more, since the damage may have happened
between checks, and then refused for good.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass

from stagemesh.checksum import crc32c
from stagemesh.errors import (
    EpochFenced,
    EpochNotOpen,
    FrameMalformed,
    HopMismatch,
    MeshError,
    NonFiniteActivation,
    SequenceGap,
    TokenRejected,
)
from stagemesh.frame import (
    RowStatus,
    StepFrame,
    StepRow,
    check_header,
    check_limits,
    check_payload,
)
from stagemesh.guards import Counters
from stagemesh.hop_limits import HopLimits
from stagemesh.parts import FramePart, PartAssembler, PartedFrame
from stagemesh.sequence import Order, SequenceGate
from stagemesh.tensor import DType
from stagemesh.token import TokenChunk
from stagemesh.topology import COORDINATOR_HOP

MADE_WRONG_COPIES_MAX = 2
"""Copies of a frame whose content is wrong under true checksums; the last is refused for good."""

_ACK = struct.Struct("<4sQQB")
_NACK = struct.Struct("<4sQQBII")

FiniteCheck = Callable[[StepFrame], bool]
"""False if a row that is still good holds NaN or infinity. The shell supplies it: only it has
arrays."""


class Action(enum.Enum):
    """What became of a message."""

    ACCEPT = "accept"
    HELD = "held"
    """True, but ahead of its turn; kept."""
    DUPLICATE = "duplicate"
    REFUSE = "refuse"
    FENCED = "fenced"
    PENDING = "pending"
    """More parts are to come, or parts of a frame that is not wanted go by."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Everything through ``step`` was accepted."""

    epoch: int
    step: int
    duplicate: bool = False

    def checksum(self) -> int:
        """CRC32C over every field: an answer that changed its meaning on the way must not free a
        frame that was never accepted."""
        return crc32c(_ACK.pack(b"SMA1", self.epoch, self.step, self.duplicate))


@dataclass(frozen=True, slots=True)
class Nack:
    """``next_step`` is wanted. ``retransmit`` False: the same frame again cannot help."""

    epoch: int
    next_step: int
    reason: str
    detail: str = ""
    retransmit: bool = True

    def checksum(self) -> int:
        """CRC32C over every field: nor must it end a hop that is well."""
        reason, detail = self.reason.encode(), self.detail.encode()
        facts = (self.epoch, self.next_step, self.retransmit, len(reason), len(detail))
        return crc32c(_NACK.pack(b"SMN1", *facts) + reason + detail)


@dataclass(frozen=True, slots=True)
class Received:
    """``frames``: accepted now, in order, each exactly once. ``error``: what to report, if
    anything."""

    action: Action
    frames: tuple[StepFrame, ...] = ()
    ack: Ack | None = None
    nack: Nack | None = None
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class Boundary:
    """The activation two stages agreed on: element type and size of the last axis."""

    dtype: DType
    hidden: int

    def check(self, frame: StepFrame) -> None:
        """Raise FrameMalformed unless the tensor is [tokens of all rows, hidden] of this type."""
        tensor = frame.tensor
        if tensor is None:
            return
        if tensor.dtype is not self.dtype:
            actual = tensor.dtype.name
            raise FrameMalformed("wrong dtype", expected=self.dtype.name, actual=actual)
        expected = (frame.token_count, self.hidden)
        if tensor.shape != expected:
            raise FrameMalformed("wrong shape", expected=expected, actual=tensor.shape)


class TokenTransferValidator:
    """What the coordinator's end of the last hop checks of tokens: they belong to the row they came
    in.

    The token's own checksum is made where it was drawn, the header's only when the frame is sealed:
    the one finds what was damaged before the other was made. Chain and marks need the request's
    history; the coordinator's token validator checks those.
    """

    def check(self, frame: StepFrame) -> None:
        """Raise TokenRejected, naming the first field that does not agree."""
        for row in frame.rows:
            token = row.token
            due = row.samples and row.status is RowStatus.OK
            if token is None:
                if due:
                    raise TokenRejected("a sampling row came without its token", field="token")
                continue
            if not due:
                raise TokenRejected("a token nobody asked for", field="token")
            token.verify()
            if (
                token.request != row.request
                or token.epoch != frame.epoch
                or token.step != frame.step
                or token.position != row.end_position
            ):
                raise self._mislabelled(frame, row, token)

    @staticmethod
    def _mislabelled(frame: StepFrame, row: StepRow, token: TokenChunk) -> TokenRejected:
        facts = (
            ("request", token.request, row.request),
            ("epoch", token.epoch, frame.epoch),
            ("step", token.step, frame.step),
            ("position", token.position, row.end_position),
        )
        field, actual = next((name, has) for name, has, due in facts if has != due)
        return TokenRejected("token under the wrong label", field=field, actual=actual)


class HopReceiver:
    """Frames of one epoch from ``hop_from`` to ``hop_to`` as they arrive. Outlives its
    connections."""

    def __init__(
        self,
        *,
        epoch: int,
        hop_from: int,
        hop_to: int,
        fingerprint: bytes,
        limits: HopLimits | None = None,
        boundary: Boundary | None = None,
        finite: FiniteCheck | None = None,
        counters: Counters | None = None,
    ) -> None:
        """``boundary``: None learns it from the first activation that verifies."""
        self.limits = limits or HopLimits()
        self.counters = Counters() if counters is None else counters
        self.epoch = epoch
        self.hop_from = hop_from
        self.hop_to = hop_to
        self.fingerprint = fingerprint
        self.boundary = boundary
        self._finite = finite
        self._tokens = TokenTransferValidator()
        self._gate = SequenceGate(epoch)
        self._held: dict[int, StepFrame] = {}
        self._held_bytes = 0
        self._assembly: PartAssembler | None = None
        self._seen = 0
        """Highest step whose header verified: anything missing up to it was lost."""
        self._nacked = 0
        """The hole a nack was sent for."""
        self._made_wrong = 0
        """Copies of the next step that were refused for their content."""

    @property
    def next_step(self) -> int:
        return self._gate.next_step

    @property
    def hop(self) -> str:
        return f"{self.hop_from}→{self.hop_to}"

    def opened(self) -> int:
        """A new connection: what was held or half assembled is sent again. Returns the next
        step."""
        self._held.clear()
        self._held_bytes = 0
        self._assembly = None
        self._seen = self._nacked = 0
        return self.next_step

    def acknowledgement(self) -> Ack:
        """The last acknowledgement once more, as a sign of life while nothing can be accepted."""
        return Ack(self.epoch, self._gate.last_step)

    def receive(self, message: StepFrame | PartedFrame | FramePart) -> Received:
        """Judge one message. Never raises for what a peer sent; see ``Received``."""
        if isinstance(message, FramePart):
            return self._receive_part(message)
        self._assembly = None
        parted = message if isinstance(message, PartedFrame) else None
        frame = message.frame if isinstance(message, PartedFrame) else message
        try:
            check_limits(frame)
            length = parted.payload_length if parted else None
            check_header(frame, fingerprint=self.fingerprint, payload_length=length)
            order = self._judge_label(frame)
        except EpochFenced as error:
            self.counters.count("frames_fenced")
            return Received(Action.FENCED, error=error)
        except MeshError as error:
            return self.refuse(error)
        self._seen = max(self._seen, frame.step)
        if order is Order.DUPLICATE or frame.step in self._held:
            return self._answer_again()
        if parted is None:
            return self._judge_content(frame)
        try:
            self._assembly = PartAssembler(parted)
        except MeshError as error:
            return self.refuse(error)
        return Received(Action.PENDING)

    def refuse(self, error: MeshError) -> Received:
        """Answer a message that could not even be decoded, or failed a check, with a nack."""
        made_wrong = isinstance(error, NonFiniteActivation | TokenRejected)
        self._made_wrong += made_wrong
        final = made_wrong and self._made_wrong >= MADE_WRONG_COPIES_MAX
        self._count_refusal(error)
        return Received(Action.REFUSE, nack=self._nack(error, retransmit=not final), error=error)

    # ---------------------------------------------------------------- inside

    def _judge_label(self, frame: StepFrame) -> Order:
        order = self._gate.judge(frame.epoch, frame.step)
        if order is Order.STALE_EPOCH:
            raise EpochFenced("frame of an older route", epoch=frame.epoch, current=self.epoch)
        if order is Order.UNKNOWN_EPOCH:
            raise EpochNotOpen("frame of a route not open here", epoch=frame.epoch)
        if (frame.hop_from, frame.hop_to) != (self.hop_from, self.hop_to):
            actual = f"{frame.hop_from}→{frame.hop_to}"
            raise HopMismatch("frame of another hop", step=frame.step, actual=actual)
        return order

    def _receive_part(self, part: FramePart) -> Received:
        assembly = self._assembly
        if assembly is None:
            return Received(Action.PENDING)
        try:
            frame = assembly.add(part)
        except MeshError as error:
            self._assembly = None
            return self.refuse(error)
        if frame is None:
            return Received(Action.PENDING)
        self._assembly = None
        return self._judge_content(frame)

    def _judge_content(self, frame: StepFrame) -> Received:
        ahead = frame.step != self.next_step
        try:
            check_payload(frame)
            self._check_content(frame)
        except MeshError as error:
            if not ahead:
                return self.refuse(error)
            self._count_refusal(error)
            return Received(Action.REFUSE, nack=self._nack_hole(frame.step), error=error)
        return self._hold(frame) if ahead else self._accept(frame)

    def _check_content(self, frame: StepFrame) -> None:
        tensor = frame.tensor
        if self.hop_to == COORDINATOR_HOP:
            self._tokens.check(frame)
        else:
            for row in frame.rows:
                if row.token is not None:
                    raise FrameMalformed("a token ahead of the last stage", step=frame.step)
        if tensor is None:
            return
        if COORDINATOR_HOP in {self.hop_from, self.hop_to}:
            raise FrameMalformed("an activation on the coordinator's hop", step=frame.step)
        boundary = self.boundary or Boundary(tensor.dtype, tensor.shape[-1])
        boundary.check(frame)
        if self._finite is not None and not self._finite(frame):
            raise NonFiniteActivation("NaN or infinity in an activation", step=frame.step)
        self.boundary = boundary

    def _accept(self, frame: StepFrame) -> Received:
        frames = [frame]
        self._gate.admit(frame.epoch, frame.step)
        while (follower := self._held.pop(self.next_step, None)) is not None:
            self._held_bytes -= follower.byte_count
            self._gate.admit(follower.epoch, follower.step)
            frames.append(follower)
        self._made_wrong = 0
        self.counters.count("frames_checked", len(frames))
        nack = self._nack_hole(self._seen)
        ack = Ack(self.epoch, self._gate.last_step)
        return Received(Action.ACCEPT, tuple(frames), ack=ack, nack=nack)

    def _hold(self, frame: StepFrame) -> Received:
        size = frame.byte_count
        room = (
            frame.step < self.next_step + self.limits.inflight_frames_max
            and self._held_bytes + size <= self.limits.inflight_bytes_max
        )
        if room:
            self._held[frame.step] = frame
            self._held_bytes += size
            self.counters.count("frames_held")
        nack = self._nack_hole(frame.step)
        error = None
        if nack is not None:
            text = "a step was skipped"
            error = SequenceGap(text, step=frame.step, expected=self.next_step)
        return Received(Action.HELD if room else Action.REFUSE, nack=nack, error=error)

    def _answer_again(self) -> Received:
        self.counters.count("duplicates_answered")
        ack = Ack(self.epoch, self._gate.last_step, duplicate=True)
        return Received(Action.DUPLICATE, ack=ack)

    def _nack_hole(self, seen: int) -> Nack | None:
        """A nack for the next step if something behind it was seen and none was sent for it yet."""
        if seen < self.next_step or self._nacked == self.next_step:
            return None
        error = SequenceGap("a step was skipped", expected=self.next_step, seen=seen)
        self._count_refusal(error)
        return self._nack(error)

    def _nack(self, error: MeshError, *, retransmit: bool = True) -> Nack:
        self._nacked = self.next_step
        detail = str(error)[:200]
        return Nack(self.epoch, self.next_step, error.reason, detail, retransmit)

    def _count_refusal(self, error: MeshError) -> None:
        error.metadata.setdefault("hop", self.hop)
        self.counters.count(f"frames_rejected.{error.reason.lower()}")
