"""The sending half of a hop: keep every frame until it is acknowledged, and send again only what is
missing.

The *ledger* holds sealed frames from the first unacknowledged step on. ``offer`` appends;
``transmissions`` says what to put on the wire now, as far as the window allows; acknowledgements
are cumulative and free both. Nothing here waits or reads a clock: the owner asks again at
``next_deadline``.

A frame is sent again for one of three reasons, and each is bounded:

* the receiver *nacked* it: at once the first time, then after exponentially growing waits with full
  jitter. One retransmission is pending at a time. A nack that answers no copy we sent is stale and
  ignored, so a repeated nack cannot start a storm, and a *budget* (a tenth of the frames sent) caps
  what nacks may cost; past it, the timer decides.
* the *timer* ran out without a sign of life. It adapts to the ``RoundTrip`` (a wait that proved too
  short stays doubled until a round trip can be measured again, or that of a path that has become
  slow never would be), and backs off exponentially with full jitter. Only the oldest frame is sent
  again: the receiver keeps what came out of turn. If more was lost, each partial acknowledgement
  releases the next (RFC 6582), unless the acknowledgement of that one follows within a round trip:
  then the timer had been too eager.
* the connection was *opened* again: from the step the receiver says it expects.

Any acknowledgement is a sign of life, also one that repeats an old step: a receiver whose queue is
full says so by repeating its last one. Silence past ``silence_s_max``, or too many copies of one
frame while the receiver does answer, is a ``failure``; the route's owner then finds another way. A
path that stalls for less than that costs copies and no route. Invariant: ``acked < cursor <=
next_step``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from stagemesh.errors import (
    FrameCorrupted,
    FrameMalformed,
    InvalidRequest,
    MeshError,
    Overloaded,
    SequenceGap,
    StageUnreachable,
    by_reason,
)
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.hop_limits import HopLimits
from stagemesh.round_trip import RoundTrip
from stagemesh.sequence import FIRST_STEP
from stagemesh.window import InflightWindow


@dataclass(slots=True)
class _Entry:
    frame: StepFrame
    size: int
    copies: int = 0
    """Sent on this connection."""
    nacks: int = 0
    sent_before: bool = False
    """On an earlier connection: its next copy is a retransmission, too."""
    sent_at: float = 0.0


class HopSender:
    """Frames of one epoch from ``hop_from`` to ``hop_to``. ``draw`` is always uniform in [0, 1)."""

    def __init__(
        self,
        *,
        epoch: int,
        hop_from: int,
        hop_to: int,
        fingerprint: bytes,
        limits: HopLimits | None = None,
        counters: Counters | None = None,
    ) -> None:
        self.limits = limits or HopLimits()
        self.counters = Counters() if counters is None else counters
        self.epoch = epoch
        self.hop_from = hop_from
        self.hop_to = hop_to
        self.fingerprint = fingerprint
        self.next_step = FIRST_STEP
        """The step ``offer`` takes next."""
        self.cursor = FIRST_STEP
        """The first step not yet sent on this connection."""
        self.acked = FIRST_STEP - 1
        self.connected = False
        self.failure: MeshError | None = None
        """Set once, when this hop is given up; nothing is sent afterwards."""
        self._ledger: dict[int, _Entry] = {}
        self._ledger_bytes = 0
        self._window = InflightWindow(
            frames_max=self.limits.inflight_frames_max, bytes_max=self.limits.inflight_bytes_max
        )
        self._round_trip = RoundTrip(self.limits)
        self._budget = self.limits.retransmit_budget_burst
        self._pending: tuple[float, int] | None = None
        """The one retransmission that is due: (when, step)."""
        self._timer: float | None = None
        self._timeouts = 0
        self._too_eager = 0
        """Answers to copies nobody needed, since a round trip was last measured."""
        self._recover_through = 0
        """Behind a timeout: the last step that may have been lost with the one sent again."""
        self._alive_at = 0.0

    # ---------------------------------------------------------------- what the owner brings

    def offer(self, frame: StepFrame) -> StepFrame:
        """Seal ``frame`` and keep it until it is acknowledged; returns the sealed frame.

        Raises SequenceGap unless it is the next step of this hop, Overloaded if the ledger is full
        (ask ``writable`` first), or the ``failure`` this hop was given up with.
        """
        if self.failure is not None:
            raise self.failure
        label = (frame.epoch, frame.hop_from, frame.hop_to, frame.fingerprint)
        if label != (self.epoch, self.hop_from, self.hop_to, self.fingerprint):
            raise SequenceGap("frame offered to another hop", frame=frame)
        if frame.step != self.next_step:
            raise SequenceGap("step out of turn", step=frame.step, expected=self.next_step)
        if not self.writable:
            raise Overloaded("ledger is full", frames=len(self._ledger), size=self._ledger_bytes)
        try:
            sealed = frame.sealed()
        except (struct.error, OverflowError, ValueError, InvalidRequest) as error:
            text = "frame field out of range"
            raise FrameMalformed(text, step=frame.step, detail=error) from error
        size = sealed.byte_count
        self._ledger[frame.step] = _Entry(sealed, size)
        self._ledger_bytes += size
        self.next_step += 1
        return sealed

    def on_opened(
        self, next_step: int, now: float, *, frames_max: int = 0, bytes_max: int = 0
    ) -> None:
        """The connection stands; the receiver expects ``next_step`` and states its own window (0:
        none)."""
        self._window.clear()
        self._window.resize(
            frames_max=min(frames_max or 2**31, self.limits.inflight_frames_max),
            bytes_max=min(bytes_max or 2**63, self.limits.inflight_bytes_max),
        )
        if not self.acked < next_step <= self.next_step:
            text = "receiver expects a step that is not in the ledger"
            facts = {"expected": next_step, "acked": self.acked, "next": self.next_step}
            self._fail(SequenceGap(text, **facts))
            return
        self._free_through(next_step - 1)
        for entry in self._ledger.values():
            entry.sent_before = entry.sent_before or entry.copies > 0
            entry.copies = entry.nacks = 0
        self.cursor = next_step
        self._pending, self._timer, self._recover_through = None, None, 0
        self._timeouts = self._too_eager = 0
        self._alive_at = now
        self.connected = True

    def on_closed(self) -> None:
        """The connection is gone; frames stay in the ledger until the next ``on_opened``."""
        self.connected = False
        self._pending = self._timer = None

    def on_ack(
        self, step: int, now: float, *, epoch: int | None = None, duplicate: bool = False
    ) -> int:
        """Everything through ``step`` was accepted; returns how many frames that freed.

        ``duplicate``: it answers a copy of a frame that had been accepted, so the timer was too
        eager.
        """
        if (epoch is not None and epoch != self.epoch) or step >= self.cursor:
            self.counters.count("acks_ignored")
            return 0
        self._alive_at = now
        self._timeouts = 0
        if duplicate:
            self._recover_through = 0
            self._too_eager = min(self._too_eager + 1, 16)
        if step <= self.acked:
            self._restart_timer(now, 0.0 if duplicate else self.limits.hold_off_s)
            return 0
        self._sample_round_trip(step, now)
        freed = self._free_through(step)
        self._window.free_through(step)
        if self._pending is not None and self._pending[1] <= step:
            self._pending = None
        if step >= self._recover_through:
            self._recover_through = 0
        elif self._pending is None and step + 1 < self.cursor:
            self._pending = (now + self._round_trip.patience_s, step + 1)
        self._restart_timer(now)
        return freed

    def on_nack(
        self,
        next_step: int,
        reason: str,
        retransmit: bool,
        now: float,
        *,
        epoch: int | None = None,
        draw: float = 1.0,
    ) -> None:
        """The receiver refused a frame and wants ``next_step``; ``reason`` names an error class."""
        if epoch is not None and epoch != self.epoch:
            self.counters.count("nacks_ignored")
            return
        if next_step > self.acked + 1:
            self.on_ack(next_step - 1, now)
        self._alive_at = now
        if not retransmit:
            kind = by_reason().get(reason, FrameCorrupted)
            self._fail(kind("receiver refused the frame for good", step=next_step))
            return
        entry = self._ledger.get(next_step)
        if entry is None or next_step >= self.cursor:
            self.counters.count("nacks_ignored")
            return
        entry.nacks += 1
        if entry.nacks > entry.copies or self._pending is not None:
            self.counters.count("nacks_ignored")
        elif entry.copies >= self.limits.copies_max:
            self._fail_refused(entry, reason)
        elif self._budget < 1:
            self.counters.count("retransmits_deferred")
        else:
            self._budget -= 1
            wait = self._nack_wait_s(entry.nacks)
            self._pending = (now + draw * wait, next_step)

    def on_time(self, now: float, *, draw: float = 1.0) -> None:
        """Time has passed: notice silence and expired timers. Call at ``next_deadline`` or
        later."""
        if not self.connected or self.failure is not None or not self._window.frames:
            return
        if now >= self._alive_at + self.limits.silence_s_max:  # the very sum next_deadline names
            silence = f"{now - self._alive_at:.1f}"
            self._fail(StageUnreachable("no sign of life", silence_s=silence, step=self.acked + 1))
            return
        if self._timer is None or now < self._timer:
            return
        entry = self._ledger[self.acked + 1]
        if entry.copies >= self.limits.copies_max:
            if self._alive_at > entry.sent_at:
                self._fail_refused(entry, StageUnreachable.reason)
            else:
                # Nobody has refused it: the path is silent, and silence has its own bound.
                self._timer = self._alive_at + self.limits.silence_s_max
            return
        self._timeouts += 1
        self._recover_through = self.cursor - 1
        self._pending = (now, self.acked + 1)
        backoff = self._round_trip.wait_s * 2.0 ** min(self._timeouts, 16)
        self._restart_timer(now, draw * min(backoff, self.limits.retransmit_wait_s_max))

    # ---------------------------------------------------------------- what the owner does

    def transmissions(self, now: float) -> list[StepFrame]:
        """Frames to put on the wire now, in this order; each call hands each frame out once."""
        if not self.connected or self.failure is not None:
            return []
        frames = []
        if self._pending is not None and now >= self._pending[0]:
            frames.append(self._send(self._ledger[self._pending[1]], now))
            self._pending = None
        while self.cursor < self.next_step:
            entry = self._ledger[self.cursor]
            if not self._window.fits(entry.size):
                self.counters.count("window_waits")
                break
            self._window.add(self.cursor, entry.size)
            self.cursor += 1
            frames.append(self._send(entry, now))
        if frames and self._timer is None:
            self._alive_at = now
            self._restart_timer(now)
        return frames

    def next_deadline(self, now: float) -> float | None:
        """When to call ``on_time`` and ``transmissions`` again at the latest; None: only upon
        events.

        A retransmission that is ``due`` already does not count: its turn is now.
        """
        if not self.connected or self.failure is not None or not self._window.frames:
            return None
        due = self._alive_at + self.limits.silence_s_max
        if self._timer is not None:
            due = min(due, self._timer)
        if self._pending is not None and self._pending[0] > now:
            due = min(due, self._pending[0])
        return max(due, now)

    def due(self, now: float) -> bool:
        """Whether ``transmissions`` has something to hand out now."""
        if not self.connected or self.failure is not None:
            return False
        if self._pending is not None and now >= self._pending[0]:
            return True
        return self.cursor < self.next_step and self._window.fits(self._ledger[self.cursor].size)

    def abandon(self, error: MeshError) -> None:
        """The owner gives this hop up; ``offer`` raises ``error`` from now on."""
        self._fail(error)

    @property
    def writable(self) -> bool:
        """Whether ``offer`` has room. An empty ledger takes a frame of any size."""
        if not self._ledger:
            return True
        return (
            len(self._ledger) < self.limits.ledger_frames_max
            and self._ledger_bytes < self.limits.ledger_bytes_max
        )

    @property
    def unacknowledged(self) -> int:
        """Frames in the ledger, sent or not."""
        return len(self._ledger)

    @property
    def round_trip_s(self) -> float | None:
        """From sending a frame to its acknowledgement, smoothed, seconds; None before the first."""
        return self._round_trip.smoothed_s

    @property
    def exhausted(self) -> bool:
        return self.failure is not None

    def check(self) -> None:
        """Raise ValueError if an invariant does not hold; for tests and the simulator."""
        if not self.acked < self.cursor <= self.next_step:
            raise ValueError(f"{self}: acked < cursor <= next does not hold")
        if list(self._ledger) != list(range(self.acked + 1, self.next_step)):
            raise ValueError(f"{self}: ledger has holes")
        if self._ledger_bytes != sum(entry.size for entry in self._ledger.values()):
            raise ValueError(f"{self}: ledger bytes do not add up")

    def __str__(self) -> str:
        return (
            f"sender {self.hop_from}→{self.hop_to} epoch={self.epoch} acked={self.acked} "
            f"sent={self.cursor - 1} next={self.next_step}"
        )

    # ---------------------------------------------------------------- inside

    def _send(self, entry: _Entry, now: float) -> StepFrame:
        if entry.copies or entry.sent_before:
            self.counters.count("frames_retransmitted")
        else:
            ratio, burst = self.limits.retransmit_budget_ratio, self.limits.retransmit_budget_burst
            self._budget = min(burst, self._budget + ratio)
        entry.copies += 1
        entry.sent_at = now
        return entry.frame

    def _free_through(self, step: int) -> int:
        freed = 0
        while self.acked < step:
            self.acked += 1
            self._ledger_bytes -= self._ledger.pop(self.acked).size
            freed += 1
        return freed

    def _sample_round_trip(self, step: int, now: float) -> None:
        """Karn's rule, and no sample from an acknowledgement that waited for an earlier step."""
        frames = (self._ledger[freed] for freed in range(self.acked + 1, step + 1))
        if all(entry.copies == 1 and not entry.sent_before for entry in frames):
            self._round_trip.observe(now - self._ledger[step].sent_at)
            self._too_eager = 0

    def _restart_timer(self, now: float, backoff_s: float = 0.0) -> None:
        if not self._window.frames:
            self._timer = None
            return
        allowance = self._window.size / self.limits.bytes_per_s_min
        wait = self._round_trip.wait_s * 2.0**self._too_eager
        self._timer = now + min(wait, self.limits.retransmit_wait_s_max) + allowance + backoff_s

    def _nack_wait_s(self, nacks: int) -> float:
        """Longest wait before the retransmission for the n-th nack of a frame; none for the
        first."""
        if nacks <= 1:
            return 0.0
        wait = self.limits.nack_wait_s_initial * 2.0 ** min(nacks - 2, 16)
        return min(self.limits.nack_wait_s_max, wait)

    def _fail_refused(self, entry: _Entry, reason: str) -> None:
        kind = by_reason().get(reason, FrameCorrupted)
        copies = entry.copies
        self._fail(kind("frame not accepted", step=entry.frame.step, copies=copies))

    def _fail(self, error: MeshError) -> None:
        if self.failure is None:
            error.metadata.setdefault("hop", f"{self.hop_from}→{self.hop_to}")
            error.metadata.setdefault("epoch", str(self.epoch))
            self.failure = error
        self._pending = self._timer = None
