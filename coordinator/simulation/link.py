"""The sending end of a hop in memory: the real ``HopSender`` on a simulated connection.

Follows ``services.stage_link`` rule by rule: dial until the successor answers (a first link waits
for a successor that is still opening the route), carry, report an outage once, dial again with
bounded jitter, give up when the budget is spent, when connections make no progress, or upon a
refusal that dialling again cannot change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.simulation.network import Connection, Network
from coordinator.simulation.prng import Prng
from coordinator.simulation.virtual import Process, Timer
from coordinator.simulation.watch import Watch
from coordinator.simulation.wire import Garbage
from stagemesh.errors import (
    AccessDenied,
    EpochFenced,
    EpochNotOpen,
    FingerprintMismatch,
    FrameError,
    HopMismatch,
    MeshError,
    StageUnreachable,
)
from stagemesh.frame import StepFrame
from stagemesh.guards import Counters
from stagemesh.transport import Ack, HopFault, HopLimits, HopSender, Nack, wire_messages

OPEN_S_MAX = 10.0
RECONNECT_S_MAX = 3.0
ANSWER_S_MAX = 2.0
OPEN_ATTEMPTS_MAX = 200
RECONNECT_ATTEMPTS_MAX = 12
CONNECTIONS_WITHOUT_PROGRESS_MAX = 4
RECONNECT_WAIT_S_INITIAL = 0.02
RECONNECT_WAIT_S_MAX = 0.5

FINAL = (EpochFenced, FingerprintMismatch, HopMismatch, FrameError, AccessDenied)
"""Refusals that dialling again cannot change."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What a predecessor says when it dials."""

    epoch: int
    hop_from: int
    hop_to: int
    fingerprint: bytes
    worker: str


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a successor answers: where it stands, and its window."""

    next_step: int
    frames_max: int
    bytes_max: int


class SimLink:
    """See the module. ``watch`` is told of every frame as it was sealed."""

    def __init__(
        self,
        process: Process,
        network: Network,
        address: str,
        opening: Opening,
        *,
        peer: str,
        limits: HopLimits,
        counters: Counters,
        prng: Prng,
        on_fault: Callable[[HopFault], None],
        on_opened: Callable[[], None],
        on_broken: Callable[[MeshError], None],
        watch: Watch,
    ) -> None:
        self.sender = HopSender(
            epoch=opening.epoch,
            hop_from=opening.hop_from,
            hop_to=opening.hop_to,
            fingerprint=opening.fingerprint,
            limits=limits,
            counters=counters,
        )
        self.counters = counters
        self.peer = peer
        self.connection: Connection | None = None
        self.closed = False
        self.broken = False
        self._process, self._network, self._address = process, network, address
        self._opening, self._prng = opening, prng
        self._on_fault, self._on_opened, self._on_broken = on_fault, on_opened, on_broken
        self._watch = watch
        self._connections = 0
        self._idle_connections = 0
        self._acked_before = 0
        self._attempts = 0
        self._dialling_since = 0.0
        self._standing = False
        self._reported = False
        self._timer: Timer | None = None
        self._answer_timer: Timer | None = None
        self._dial_number = 0

    # What the owner calls

    def open(self) -> None:
        """Begin to dial."""
        self._begin()

    def send(self, frame: StepFrame) -> None:
        """Seal, keep, transmit. Raises what ``HopSender.offer`` raises."""
        self._watch.sent(self.sender.offer(frame), self.sender)
        self._pump()

    def close(self) -> None:
        """Give up what was not acknowledged."""
        self.closed = True
        self._disconnect(StageUnreachable("closed by the predecessor"))

    # Connecting

    @property
    def _now(self) -> float:
        return self._network.time.now

    def _begin(self) -> None:
        self._acked_before = self.sender.acked
        self._attempts = 0
        self._dialling_since = self._now
        self._dial()

    def _dial(self) -> None:
        if self.closed or self.broken:
            return
        self._disconnect(StageUnreachable("dialled again"))
        self._attempts += 1
        self._dial_number += 1
        number = self._dial_number
        self._answer_timer = self._process.after(
            ANSWER_S_MAX, lambda: self._failed(StageUnreachable("no answer to the opening"), number)
        )
        connection = self._network.dial(
            self._process,
            self._address,
            self._opening,
            lambda error: self._failed(error, number),
        )
        self.connection = connection
        if connection is None:
            return
        connection.down.deliver = lambda message: self._received(connection, message, number)
        connection.on_client_closed = lambda error: self._ended(connection, error, number)

    def _received(self, connection: Connection, message: Any, number: int) -> None:
        if self.connection is not connection or self.closed or self.broken:
            return
        if isinstance(message, LinkState) and not self._standing:
            self._stand(message)
        elif self._standing:
            self._heed(message)

    def _stand(self, state: LinkState) -> None:
        self._cancel_answer()
        self.sender.on_opened(
            state.next_step, self._now, frames_max=state.frames_max, bytes_max=state.bytes_max
        )
        self._standing, self._reported = True, False
        self._connections += 1
        if self._connections > 1:
            self.counters.count("links_reopened")
        else:
            self._on_opened()
        self._pump()

    def _ended(self, connection: Connection, error: MeshError, number: int) -> None:
        """The connection is gone, or was refused."""
        if self.connection is not connection or self.closed or self.broken:
            return
        if not self._standing:
            self._failed(error, number)
            return
        self._disconnect(error)
        if self.sender.failure is not None:
            self._give_up(self.sender.failure)
            return
        self._report(error)
        progressed = self.sender.acked != self._acked_before
        self._idle_connections = 0 if progressed else self._idle_connections + 1
        if isinstance(error, FINAL) or self._idle_connections >= CONNECTIONS_WITHOUT_PROGRESS_MAX:
            self._give_up(error)
        else:
            self._begin()

    def _failed(self, error: MeshError, number: int) -> None:
        """One attempt to dial came to nothing: another one, or the end."""
        if number != self._dial_number or self._standing or self.closed or self.broken:
            return
        self._dial_number += 1
        self._disconnect(error)
        if isinstance(error, FINAL):
            self._give_up(error)
            return
        if not isinstance(error, EpochNotOpen):
            self._report(error)
        first = self._connections == 0
        attempts_max = OPEN_ATTEMPTS_MAX if first else RECONNECT_ATTEMPTS_MAX
        total_s = OPEN_S_MAX if first else RECONNECT_S_MAX
        bound = RECONNECT_WAIT_S_INITIAL * 2.0 ** min(self._attempts - 1, 16)
        wait = self._prng.random() * min(RECONNECT_WAIT_S_MAX, bound)
        elapsed = self._now - self._dialling_since
        if self._attempts >= attempts_max or elapsed + wait >= total_s:
            self._give_up(error)
            return
        self._process.after(wait, self._dial)

    def _disconnect(self, error: MeshError) -> None:
        self._standing = False
        self._cancel_answer()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.sender.on_closed()
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.cut(error, tell="server")

    def _cancel_answer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _give_up(self, error: MeshError) -> None:
        if self.broken or self.closed:
            return
        self.broken = True
        self.sender.abandon(error)
        self._disconnect(error)
        self._report(error, fatal=True)
        self._on_broken(error)

    # Carrying

    def _heed(self, answer: Ack | Nack | Garbage) -> None:
        sender = self.sender
        if isinstance(answer, Ack):
            sender.on_ack(answer.step, self._now, epoch=answer.epoch, duplicate=answer.duplicate)
        elif isinstance(answer, Nack):
            refused = self._nacks_refused()
            sender.on_nack(
                answer.next_step,
                answer.reason,
                answer.retransmit,
                self._now,
                epoch=answer.epoch,
                draw=self._prng.random(),
            )
            if refused == self._nacks_refused() and sender.failure is None:
                self._watch.repeated(sender)
        else:
            self.counters.count("acks_ignored")
        self._watch.acknowledged(sender)
        self._pump()

    def _nacks_refused(self) -> int:
        return self.counters["nacks_ignored"] + self.counters["retransmits_deferred"]

    def _pump(self) -> None:
        connection = self.connection
        if not self._standing or connection is None:
            return
        sender = self.sender
        for frame in sender.transmissions(self._now):
            for message in wire_messages(frame):
                connection.up.send(message)
        self._watch.on_the_wire(sender)
        if sender.failure is not None:
            self._give_up(sender.failure)
            return
        self._arm()

    def _arm(self) -> None:
        due = self.sender.next_deadline(self._now)
        if due is None or (self._timer is not None and self._timer.when <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._process.after(due - self._now, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self._standing:
            return
        self.sender.on_time(self._now, draw=self._prng.random())
        self._pump()

    def _report(self, error: MeshError, *, fatal: bool = False) -> None:
        if self._reported and not fatal:
            return
        self._reported = True
        sender = self.sender
        self._on_fault(
            HopFault(
                epoch=sender.epoch,
                step=sender.acked + 1,
                hop_from=sender.hop_from,
                hop_to=sender.hop_to,
                reason=error.reason,
                detail=str(error),
                fatal=fatal,
                peer=self.peer,
            )
        )
