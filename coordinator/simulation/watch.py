"""The referee: what must hold in every run, judged from the outside.

Nothing here asks the mesh whether it thinks it is right. ``Watch`` sees what really happened, in
the order it happened: each frame as it was sealed, each frame that passed a receiver, each step a
stage computed, each instruction of the machine, each token a client received. The answers it
compares with come from ``echo.oracle``, a straight loop without frames, stages or mesh.

    I1  what a client receives is the oracle's answer so far
    I2  answer indices are consecutive; one terminal, and nothing behind it unless the client comes
        back for an answer that failed, which then goes on at the next index
    I3  what passes a receiver is a frame as it was sealed; nothing of a fenced epoch is computed
    I4  one writer per request: tokens come from no fenced epoch, and a request is sent on a route
        only when every other route has been told to forget it
    I5  a stage computes each step once and in order, and each position once per life of its cache
    I6  when faults have stopped, every request ends in time, and a new one is answered
    I7  at the end nothing is left: no session, ledger, held frame, cache, debt or endpoint
    I8  not more tokens than asked for; what is billed is what was delivered
    I10 a link is opened only when every worker has really arrived, with the same weights
    I11 retransmissions stay within what was damaged plus the budget
    I12 no more frames are in flight on a hop than its window admits
    I13 no stage caches more positions than it said it has room for
    I14 what a client was shown is in the file when the coordinator dies
    I15 a sender gives a frame up only when its receiver has accepted it
    I16 what nacks make a sender repeat is paid from its budget
    I17 no ledger keeps more frames than it may
    I18 a token that passes the last hop is whole, and belongs to the row it came in
    I19 a barrier does not outlive its deadline: behind it, it is broken because of it
    CHECK  the machine's and the senders' own invariants;  CRASH  nothing raises
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator import instructions as do
from coordinator.barrier import Barrier, BarrierState, Trigger
from coordinator.events import (
    Event,
    FrameReturned,
    GenerationRequested,
    RequestFailed,
    TimePassed,
    WorkerProgressed,
)
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, RowStatus, StepFrame
from stagemesh.hop_sender import HopSender
from stagemesh.topology import COORDINATOR_HOP

if TYPE_CHECKING:
    from coordinator.simulation.worker import SimWorker

VIOLATIONS_MAX = 5
"""Of one run; the first is what matters."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant, in words."""

    invariant: str
    detail: str
    at: float

    def __str__(self) -> str:
        return f"{self.invariant} at {self.at:.4f}: {self.detail}"


@dataclass(slots=True)
class CacheLife:
    """What a stage's cache of one request should hold."""

    length: int = 0


@dataclass(slots=True)
class Account:
    """What a sender may still repeat because of nacks, by the referee's own count."""

    room: float
    sent: int = 0


@dataclass(slots=True)
class Watch:
    """See the module. ``now`` gives virtual time."""

    now: Callable[[], float] = lambda: 0.0
    violations: list[Violation] = field(default_factory=list)
    steps_computed: int = 0
    events: int = 0
    tokens: int = 0
    resumptions: int = 0
    """Of answers that had begun."""
    _digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    _sealed: dict[tuple[int, int, int], StepFrame] = field(default_factory=dict)
    _passed: dict[tuple[int, int], int] = field(default_factory=dict)
    _computed: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _lives: dict[tuple[str, str, int, bytes], CacheLife] = field(default_factory=dict)
    _arrived: dict[tuple[str, int], str] = field(default_factory=dict)
    _fenced: set[int] = field(default_factory=set)
    _writers: dict[bytes, set[int]] = field(default_factory=dict)
    _ended: set[bytes] = field(default_factory=set)
    _failed: set[bytes] = field(default_factory=set)
    """Ended with an error that may be gone on from."""
    _paid: dict[HopSender, Account] = field(default_factory=dict)
    _forming: dict[Barrier, None] = field(default_factory=dict)

    def violate(self, invariant: str, detail: str) -> None:
        """Note a broken invariant."""
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(invariant, detail, self.now()))

    @property
    def digest(self) -> str:
        """Of everything that happened; equal runs have equal ones."""
        return self._digest.hexdigest()

    # Frames

    def sent(self, frame: StepFrame, sender: HopSender) -> None:
        """A frame was sealed and put in ``sender``'s ledger."""
        if sender.unacknowledged > sender.limits.ledger_frames_max:
            self.violate("I17", f"{sender.unacknowledged} frames in the ledger: {sender}")
        key = (frame.epoch, frame.hop_from, frame.step)
        if key in self._sealed:
            self.violate("I5", f"step sealed twice: {frame}")
        self._sealed[key] = frame

    def on_the_wire(self, sender: HopSender) -> None:
        """A sender has put on the wire what it may."""
        limits = sender.limits
        unacknowledged = sender.cursor - 1 - sender.acked
        if unacknowledged > limits.inflight_frames_max:
            self.violate("I12", f"{unacknowledged} frames in flight: {sender}")
        account = self._account(sender)
        if sender.cursor - 1 > account.sent:
            earned = limits.retransmit_budget_ratio * (sender.cursor - 1 - account.sent)
            account.room = min(limits.retransmit_budget_burst, account.room + earned)
            account.sent = sender.cursor - 1
        try:
            sender.check()
        except ValueError as error:
            self.crashed("sender", error)

    def acknowledged(self, sender: HopSender) -> None:
        """A sender has heeded an answer: what it keeps no more must have arrived."""
        accepted = self._passed.get((sender.epoch, sender.hop_from), 0)
        if sender.acked > accepted:
            self.violate("I15", f"step {sender.acked} freed, {accepted} accepted: {sender}")

    def repeated(self, sender: HopSender) -> None:
        """A nack was granted: its frame will be sent again."""
        account = self._account(sender)
        account.room -= 1
        if account.room < -0.001:  # sums of tenths
            self.violate("I16", f"a nack was granted beyond the budget: {sender}")

    def _account(self, sender: HopSender) -> Account:
        return self._paid.setdefault(sender, Account(sender.limits.retransmit_budget_burst))

    def delivered(self, frame: StepFrame, hop_from: int, *, fenced: int = 0) -> None:
        """A frame passed every check of the receiver behind ``hop_from``, which refuses everything
        up to ``fenced``."""
        hop = (frame.epoch, hop_from)
        self._passed[hop] = max(frame.step, self._passed.get(hop, 0))
        if frame.epoch <= fenced:
            self.violate("I3", f"accepted a frame of fenced epoch {frame.epoch}: {frame}")
        if frame.hop_to == COORDINATOR_HOP:
            self._tokens_returned(frame)
        sealed = self._sealed.get((frame.epoch, hop_from, frame.step))
        if frame is sealed:
            return
        if sealed is None:
            self.violate("I3", f"accepted a frame nobody sent: {frame}")
        elif not _same(frame, sealed):
            self.violate("I3", f"accepted a damaged frame: {frame}")

    def _tokens_returned(self, frame: StepFrame) -> None:
        for row in frame.rows:
            token = row.token
            if row.status is not RowStatus.OK or not (row.samples or token):
                continue
            if token is None or not row.samples:
                self.violate("I18", f"{frame}: a token is missing, or nobody asked for it")
                continue
            said = (token.request, token.epoch, token.step, token.position)
            if said != (row.request, frame.epoch, frame.step, row.end_position):
                self.violate("I18", f"{frame}: {token} under another label")
            if token.checksum != token.sealed().checksum:
                self.violate("I18", f"{frame}: {token} is not what was drawn")

    def computed(self, worker: SimWorker, frame: StepFrame, result: StepFrame) -> None:
        """A stage carried out a step."""
        self.steps_computed += 1
        epoch, info = frame.epoch, worker.info
        key = (info.name, info.instance, epoch)
        before = self._computed.get(key, 0)
        if frame.step != before + 1:
            self.violate("I5", f"{worker.name} computed step {frame.step} behind step {before}")
        self._computed[key] = max(before, frame.step)
        if frame.kind is FrameKind.PROBE:
            return
        for row, done in zip(frame.rows, result.rows, strict=True):
            life_key = (info.name, info.instance, epoch, row.request)
            if frame.kind is FrameKind.CLOSE:
                self._lives.pop(life_key, None)
                continue
            if row.status is not RowStatus.OK or done.status is not RowStatus.OK:
                continue
            if row.opening is not None:
                self._lives[life_key] = CacheLife()
            life = self._lives.setdefault(life_key, CacheLife())
            if frame.kind is FrameKind.REWIND:
                life.length = min(life.length, row.first_position)
                continue
            if row.first_position != life.length:
                said = f"position {row.first_position} applied to a cache of {life.length}"
                self.violate("I5", f"{worker.name} epoch {epoch}: {said}")
            life.length = row.first_position + row.token_count
        self._within_budget(worker)

    def _within_budget(self, worker: SimWorker) -> None:
        """No worker caches more positions than it said it has room for."""
        budget, stage = worker.info.kv_budget_tokens, worker.runner.stage
        if budget and stage is not None and stage.kv_tokens > budget:
            self.violate("I13", f"{worker.name} caches {stage.kv_tokens} of {budget} positions")

    def forgot(self, worker: SimWorker, *, shorter: bool = False) -> None:
        """A fault took a worker's caches, or (``shorter``) the last position of each."""
        name, instance = worker.info.name, worker.info.instance
        for key in [key for key in self._lives if key[:2] == (name, instance)]:
            if shorter:
                self._lives[key].length = max(0, self._lives[key].length - 1)
            else:
                del self._lives[key]

    # The machine

    def coordinator_died(self, ended: set[bytes], failed: set[bytes]) -> None:
        """The next one knows what was kept (``ended``: requests whose end was; ``failed``: those of
        them that may be asked for again, perhaps not for the first time, since what was asked last
        may not have been kept), and nothing of the epochs there were: it may use none of them, nor
        believe what comes from them."""
        self._fenced |= {epoch for epoch, _, _ in self._sealed}
        self._fenced |= {epoch for _, epoch in self._arrived}
        self._ended, self._failed = set(ended), set(failed)

    def arrived(self, worker: SimWorker, epoch: int) -> None:
        """A worker has its place on a route, with these weights."""
        self._arrived[worker.name, epoch] = worker.hosted

    def handled(self, event: Event, instructions: list[do.Instruction]) -> None:
        """The machine has answered an event."""
        self.events += 1
        text = type(event).__name__
        self._told(event)
        if isinstance(event, FrameReturned):
            text += f"{event.frame.epoch}.{event.frame.step}"
        elif isinstance(event, WorkerProgressed):
            text += f"{event.worker}{event.computed_step}"
        self._digest.update(f"{self.now():.9f}{text}{len(instructions)}".encode())
        writers: list[tuple[bytes, int]] = []
        for instruction in instructions:
            match instruction:
                case do.SendStep(frame=frame):
                    self._step_sent(frame, writers)
                case do.AcceptTokens(request=request, chunks=chunks):
                    self._delivered(request, [chunk.token_id for chunk in chunks])
                case do.PublishEvent(type="ChunkGenerated", request=request):
                    self._accepted(request, int(instruction.attributes["epoch"]))
                case do.FenceEpoch(epoch=epoch):
                    self._fenced.add(epoch)
                case do.FinishRequest(request=request) | do.FailRequest(request=request):
                    self._terminal(instruction)
                case do.OpenLink(route=route):
                    self._link_opened(route.epoch, route.names)
        for request, epoch in writers:
            self._one_writer(request, epoch)

    def barriers(self, event: Event, forming: tuple[Barrier, ...]) -> None:
        """What is forming behind an event."""
        if not forming and not self._forming:
            return
        for barrier in self._forming:
            ended_at, timely = barrier.ended_at, barrier.cause is Trigger.EXPIRED
            if ended_at is not None and ended_at >= barrier.deadline and not timely:
                self.violate("I19", f"ended behind its deadline by another cause: {barrier}")
        self._forming = dict.fromkeys(forming)
        if isinstance(event, TimePassed):
            for barrier in forming:
                if barrier.state is BarrierState.FORMING and self.now() >= barrier.deadline:
                    self.violate("I19", f"still forming behind its deadline: {barrier}")

    def _step_sent(self, frame: StepFrame, writers: list[tuple[bytes, int]]) -> None:
        self._digest.update(b"s%d.%d" % (frame.epoch, frame.step))
        if frame.kind is FrameKind.PROBE:
            return
        for row in frame.rows:
            routes = self._writers.setdefault(row.request, set())
            if frame.kind is FrameKind.CLOSE:
                routes.discard(frame.epoch)
            elif row.samples:  # a shadow computes the same request, but draws nothing
                routes.add(frame.epoch)
                writers.append((row.request, frame.epoch))

    def _one_writer(self, request: bytes, epoch: int) -> None:
        others = self._writers[request] - self._fenced - {epoch}
        if others and epoch in self._writers[request]:
            said = f"sent on epoch {epoch} while epochs {sorted(others)} still hold it"
            self.violate("I4", f"r{request[-1]} {said}")

    def _accepted(self, request: bytes, epoch: int) -> None:
        """A token has passed every check; it may be delivered much later."""
        if epoch in self._fenced:
            self.violate("I4", f"r{request[-1]} accepted a token of fenced epoch {epoch}")

    def _delivered(self, request: bytes, token_ids: list[int]) -> None:
        self.tokens += len(token_ids)
        self._digest.update(f"a{request[-1]}{token_ids}".encode())
        if request in self._ended:
            self.violate("I2", f"r{request[-1]} was given a token behind its end")

    def _told(self, event: Event) -> None:
        if isinstance(event, GenerationRequested):
            self._requested(event)
        elif isinstance(event, RequestFailed) and event.request in self._ended:
            self._failed.add(event.request)  # its end could not be kept

    def _requested(self, event: GenerationRequested) -> None:
        """What had failed may be asked for again: another end will follow, and no other token."""
        request = event.request
        if event.resumed_after and request not in self._ended:
            self.violate("I2", f"r{request[-1]} was resumed while it ran")
        if request in self._ended and request not in self._failed:
            self.violate("I2", f"r{request[-1]} was asked for again although it had not failed")
        self.resumptions += bool(event.resumed_after and event.accepted)
        self._ended.discard(request)
        self._failed.discard(request)

    def _terminal(self, instruction: do.FinishRequest | do.FailRequest) -> None:
        request = instruction.request
        self._digest.update(b"t%d" % request[-1] + type(instruction).__name__.encode())
        if request in self._ended:
            self.violate("I2", f"r{request[-1]} ended twice")
        self._ended.add(request)
        if isinstance(instruction, do.FailRequest) and instruction.error.is_resumable:
            self._failed.add(request)

    def _link_opened(self, epoch: int, names: tuple[str, ...]) -> None:
        missing = [name for name in names if (name, epoch) not in self._arrived]
        if missing:
            self.violate("I10", f"epoch {epoch} went on without {', '.join(missing)}")
        weights = {self._arrived.get((name, epoch)) for name in names}
        if len(weights) > 1 and not missing:
            self.violate("I10", f"epoch {epoch} was opened across different weights")

    def crashed(self, where: str, error: BaseException) -> None:
        """Something raised that should not."""
        kind = "CHECK" if isinstance(error, MeshError | ValueError) else "CRASH"
        frames = traceback.extract_tb(error.__traceback__)
        at = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        self.violate(kind, f"{where}: {type(error).__name__}: {error}{at}")


_pack_header = StepFrame.pack_header
"""As it is before any planted bug may change it."""


def _same(frame: StepFrame, sealed: StepFrame) -> bool:
    """Equal in everything that must be covered by checksums; a payload may be another object."""
    if _pack_header(frame) != _pack_header(sealed):
        return False
    ours, theirs = frame.tensor, sealed.tensor
    if ours is None or theirs is None:
        return ours is theirs
    return bytes(ours.payload) == bytes(theirs.payload)
