"""Every barrier that is forming, and the last ones that ended.

The book routes an arrival to its barrier by (name, epoch, generation), files what has ended for
operators, and counts: barriers formed, completed, broken by cause, arrivals repeated and refused by
reason; and how long they took to end, in microseconds (``barrier_wait_us``). A rendezvous that is
tried again is a new barrier with the next generation; what still arrives for the old one is refused
and counted, and can neither complete nor break the new one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping

from coordinator.barrier import Arrival, Barrier, BarrierKey, BarrierOutcome, BarrierState
from coordinator.events import BarrierArrived
from stagemesh.errors import InvalidConfiguration
from stagemesh.guards import Counters
from stagemesh.topology import WorkerName

ENDED_BARRIERS_KEPT = 64
"""Barriers that have ended, kept for operators."""
CHECKPOINTS_KEPT = 64
"""Checkpoints that were passed, kept apart: they are many, and would push out all others."""


class BarrierBook:
    """Every barrier that is forming, and the last ones that ended, for admin and for routing
    arrivals."""

    def __init__(
        self, *, ended_kept: int = ENDED_BARRIERS_KEPT, counters: Counters | None = None
    ) -> None:
        self.counters = Counters() if counters is None else counters
        self._forming: OrderedDict[BarrierKey, Barrier] = OrderedDict()
        self._ended: deque[Barrier] = deque(maxlen=ended_kept)
        self._passed: deque[Barrier] = deque(maxlen=CHECKPOINTS_KEPT)

    def form(
        self,
        name: str,
        epoch: int,
        participants: Iterable[WorkerName],
        now: float,
        *,
        timeout_s: float,
        generation: int = 1,
        agree: Iterable[str] = (),
        expect: Mapping[str, str] | None = None,
    ) -> Barrier:
        """Begin a rendezvous. Raises InvalidConfiguration if one with this key is forming."""
        key = (name, epoch, generation)
        if key in self._forming:
            raise InvalidConfiguration("this barrier is forming already", barrier=name, epoch=epoch)
        barrier = Barrier(
            name,
            epoch,
            generation,
            participants,
            now,
            now + timeout_s,
            agree=agree,
            expect=expect,
        )
        self._forming[key] = barrier
        self.counters.count("barriers_formed")
        return barrier

    def get(self, name: str, epoch: int, generation: int) -> Barrier | None:
        """The barrier with this key, forming or (recently) ended."""
        key = (name, epoch, generation)
        found = self._forming.get(key)
        if found is not None:
            return found
        return next((barrier for barrier in reversed(self._ended) if barrier.key == key), None)

    def arrive(self, event: BarrierArrived, now: float) -> tuple[Barrier | None, Arrival]:
        """Route an arrival or a refusal to its barrier; refused ones are counted by reason."""
        barrier = self.get(event.name, event.epoch, event.generation)
        if barrier is None:
            arrival = self._why_unknown(event)
        elif event.refusal:
            forming = barrier.state is BarrierState.FORMING
            barrier.refuse(event.worker, event.refusal, now)
            broke = forming and barrier.state is BarrierState.BROKEN
            arrival = Arrival.BROKE if broke else Arrival.LATE
            if event.worker not in barrier.participants:
                arrival = Arrival.STRANGER
        else:
            arrival = barrier.arrive(event.worker, event.facts, now)
        if arrival is Arrival.REPEATED:
            self.counters.count("barriers_repeated")
        elif arrival not in (Arrival.COUNTED, Arrival.BROKE):
            self.counters.count(f"arrivals_refused.{arrival.value}")
        self._sweep()
        return barrier, arrival

    def depart(self, worker: WorkerName, reason: str, now: float) -> list[Barrier]:
        """A worker is gone; returns the barriers that broke by it."""
        for barrier in self._forming.values():
            barrier.depart(worker, reason, now)
        return self._sweep()

    def abandon(self, barrier: Barrier, reason: str, now: float) -> None:
        """The coordinator itself no longer needs this rendezvous; it breaks and is filed."""
        barrier.abandon(reason, now)
        self._sweep()

    def expire(self, now: float) -> list[Barrier]:
        """Break what is past its deadline; returns it."""
        for barrier in self._forming.values():
            barrier.expire(now)
        return self._sweep()

    def note_progress(self, worker: WorkerName, text: str, now: float) -> None:
        """Pass the last thing known of ``worker`` to everything that waits for it."""
        for barrier in self._forming.values():
            barrier.note_progress(worker, text, now)

    def record(self, barrier: Barrier) -> None:
        """File a barrier that was judged elsewhere at once (a checkpoint), and count it."""
        self.counters.count("barriers_formed")
        self._file(barrier, self._passed if barrier.state is BarrierState.COMPLETE else self._ended)

    @property
    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do; None if nothing is forming."""
        return min((barrier.deadline for barrier in self._forming.values()), default=None)

    @property
    def forming(self) -> tuple[Barrier, ...]:
        """Oldest first."""
        return tuple(self._forming.values())

    @property
    def ended(self) -> tuple[Barrier, ...]:
        """Oldest first; bounded."""
        return tuple(self._ended)

    def outcomes(self) -> list[BarrierOutcome]:
        """Everything known: forming, then the newest that ended, then checkpoints passed."""
        ended = (*reversed(self._ended), *reversed(self._passed))
        return [barrier.outcome() for barrier in (*self._forming.values(), *ended)]

    def _why_unknown(self, event: BarrierArrived) -> Arrival:
        same_name = [barrier for barrier in self._forming.values() if barrier.name == event.name]
        if any(barrier.epoch == event.epoch for barrier in same_name):
            return Arrival.WRONG_GENERATION
        return Arrival.WRONG_EPOCH if same_name else Arrival.UNKNOWN

    def _sweep(self) -> list[Barrier]:
        """Move what has ended out of the forming ones; returns it."""
        done = [b for b in self._forming.values() if b.state is not BarrierState.FORMING]
        for barrier in done:
            del self._forming[barrier.key]
            self._file(barrier, self._ended)
        return done

    def _file(self, barrier: Barrier, shelf: deque[Barrier]) -> None:
        shelf.append(barrier)
        if barrier.ended_at is not None and barrier.ended_at > barrier.formed_at:
            waited_us = round(1e6 * (barrier.ended_at - barrier.formed_at))
            self.counters.count(f"barrier_wait_us.{barrier.state.value}", waited_us)
        if barrier.state is BarrierState.COMPLETE:
            self.counters.count("barriers_completed")
        elif barrier.cause is not None:
            self.counters.count(f"barriers_broken.{barrier.cause.value}")
