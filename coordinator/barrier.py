"""A rendezvous at the coordinator: everybody arrives in time, or it breaks and says who did not and
why.

A barrier is keyed (name, epoch, generation) and has a fixed set of participants and a deadline. It
is judged in one place, from data, so there is no second collective to issue and nothing to cancel:
after it has broken, a new attempt is a *new barrier* with the next generation, and whatever still
arrives for the old one is refused. Arrival is idempotent. A barrier never completes before every
participant has arrived with facts that agree, and never after its deadline.

    FORMING  -arrived-->      FORMING          somebody is still missing
    FORMING  -all_arrived-->  COMPLETE
    FORMING  -disagreed, contradicted, refused, departed, expired, abandoned-->  BROKEN
    COMPLETE, BROKEN: final

Time is a parameter. Waiting, retrying and jitter belong to the shell.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stagemesh.errors import BarrierBroken, InvalidConfiguration
from stagemesh.topology import WorkerName

FACTS_MAX = 64
"""Facts of one arrival."""
FACT_CHARACTERS_MAX = 1024

BarrierKey = tuple[str, int, int]
"""(name, epoch, generation)."""


class BarrierState(enum.Enum):
    FORMING = "forming"
    COMPLETE = "complete"
    BROKEN = "broken"


class Trigger(enum.Enum):
    """What may move a barrier."""

    ARRIVED = "arrived"
    ALL_ARRIVED = "all_arrived"
    DISAGREED = "disagreed"
    CONTRADICTED = "contradicted"
    """A worker arrived twice with different facts: it is not the worker that arrived before."""
    REFUSED = "refused"
    DEPARTED = "departed"
    EXPIRED = "expired"
    ABANDONED = "abandoned"
    """The coordinator no longer needs the rendezvous."""


TRANSITIONS: Mapping[tuple[BarrierState, Trigger], BarrierState] = {
    (BarrierState.FORMING, Trigger.ARRIVED): BarrierState.FORMING,
    (BarrierState.FORMING, Trigger.ALL_ARRIVED): BarrierState.COMPLETE,
    (BarrierState.FORMING, Trigger.DISAGREED): BarrierState.BROKEN,
    (BarrierState.FORMING, Trigger.CONTRADICTED): BarrierState.BROKEN,
    (BarrierState.FORMING, Trigger.REFUSED): BarrierState.BROKEN,
    (BarrierState.FORMING, Trigger.DEPARTED): BarrierState.BROKEN,
    (BarrierState.FORMING, Trigger.EXPIRED): BarrierState.BROKEN,
    (BarrierState.FORMING, Trigger.ABANDONED): BarrierState.BROKEN,
}
"""A pair that is not listed changes nothing."""


class Arrival(enum.Enum):
    """What became of one arrival."""

    COUNTED = "counted"
    REPEATED = "repeated"
    """Seen before with the same facts; answered as before."""
    BROKE = "broke"
    """It broke the barrier (its facts disagree)."""
    STRANGER = "stranger"
    """Not a participant; nothing changed."""
    WRONG_EPOCH = "wrong_epoch"
    WRONG_GENERATION = "wrong_generation"
    LATE = "late"
    """The barrier had ended (or its deadline had passed) without this worker."""
    UNKNOWN = "unknown"
    """There is no such barrier."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The last thing known of a participant: free text and when it was learnt."""

    text: str
    at: float


@dataclass(frozen=True, slots=True)
class BarrierOutcome:
    """How a barrier stands or ended. ``culprits``: who broke it; ``absent``: who had not
    arrived."""

    name: str
    epoch: int
    generation: int
    state: BarrierState
    participants: tuple[WorkerName, ...]
    arrived: tuple[WorkerName, ...]
    absent: tuple[WorkerName, ...]
    culprits: tuple[WorkerName, ...]
    cause: Trigger | None
    detail: str
    formed_at: float
    ended_at: float | None
    last_progress: Mapping[WorkerName, Progress] = field(default_factory=dict)
    deadline: float = 0.0

    @property
    def complete(self) -> bool:
        return self.state is BarrierState.COMPLETE

    def error(self) -> BarrierBroken:
        """The outcome as an error, for a caller that needs the rendezvous to go on."""
        return BarrierBroken(
            self.detail or "barrier did not complete",
            barrier=self.name,
            epoch=self.epoch,
            generation=self.generation,
            absent=",".join(self.absent) or None,
            culprits=",".join(self.culprits) or None,
        )

    def __str__(self) -> str:
        missing = f" absent={','.join(self.absent)}" if self.absent else ""
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"barrier {self.name} epoch={self.epoch} generation={self.generation} "
            f"{self.state.value}{missing}{detail}"
        )


class Barrier:
    """One attempt at one rendezvous.

    ``deadline`` is absolute, on the clock of ``now``. ``agree`` names facts that must be equal for
    all participants; ``expect`` gives facts whose value is known beforehand, so that whoever
    differs is named exactly. A fact that is missing differs."""

    def __init__(
        self,
        name: str,
        epoch: int,
        generation: int,
        participants: Iterable[WorkerName],
        formed_at: float,
        deadline: float,
        *,
        agree: Iterable[str] = (),
        expect: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.generation = generation
        self.participants = tuple(dict.fromkeys(participants))
        self.formed_at = formed_at
        self.deadline = deadline
        self.agree = frozenset(agree)
        self.expect = dict(expect or {})
        self.state = BarrierState.FORMING
        self.ended_at: float | None = None
        self.cause: Trigger | None = None
        self.culprits: tuple[WorkerName, ...] = ()
        self.detail = ""
        self._arrived: dict[WorkerName, dict[str, str]] = {}
        self._progress: dict[WorkerName, Progress] = {}
        if not self.participants:
            raise InvalidConfiguration("a barrier needs a participant", barrier=name)
        if deadline <= formed_at:
            raise InvalidConfiguration("a barrier needs a deadline in the future", barrier=name)

    @property
    def key(self) -> BarrierKey:
        return (self.name, self.epoch, self.generation)

    @property
    def absent(self) -> tuple[WorkerName, ...]:
        """Participants that have not arrived, in participant order."""
        return tuple(worker for worker in self.participants if worker not in self._arrived)

    @property
    def facts(self) -> Mapping[WorkerName, Mapping[str, str]]:
        """What each worker that arrived has said."""
        return self._arrived

    def arrive(
        self,
        worker: WorkerName,
        facts: Mapping[str, str],
        now: float,
        *,
        epoch: int | None = None,
        generation: int | None = None,
    ) -> Arrival:
        """Count ``worker`` as present. Facts over the limits are cut; they would then disagree."""
        if epoch is not None and epoch != self.epoch:
            return Arrival.WRONG_EPOCH
        if generation is not None and generation != self.generation:
            return Arrival.WRONG_GENERATION
        if worker not in self.participants:
            return Arrival.STRANGER
        self.expire(now)
        facts = _bounded(facts)
        before = self._arrived.get(worker)
        if self.state is not BarrierState.FORMING:
            return Arrival.REPEATED if before == facts else Arrival.LATE
        if before is not None and before == facts:
            return Arrival.REPEATED
        if before is not None:
            self._end(Trigger.CONTRADICTED, now, (worker,), _changed(worker, before, facts))
            return Arrival.BROKE
        self._arrived[worker] = facts
        if not self._facts_agree(worker, facts, now):
            return Arrival.BROKE
        self._move(Trigger.ARRIVED if self.absent else Trigger.ALL_ARRIVED, now)
        return Arrival.COUNTED

    def refuse(self, worker: WorkerName, reason: str, now: float) -> None:
        """``worker`` says it will never arrive."""
        if worker in self.participants:
            self.expire(now)
            said = f"{worker} refused: {reason[:FACT_CHARACTERS_MAX]}"
            self._end(Trigger.REFUSED, now, (worker,), said)

    def depart(self, worker: WorkerName, reason: str, now: float) -> None:
        """``worker`` is gone; also one that had arrived breaks what is still forming."""
        if worker in self.participants:
            self.expire(now)
            self._end(Trigger.DEPARTED, now, (worker,), f"{worker} left: {reason}")

    def abandon(self, reason: str, now: float) -> None:
        """The coordinator no longer needs this rendezvous; nobody is to blame."""
        self.expire(now)
        self._end(Trigger.ABANDONED, now, (), f"abandoned: {reason}")

    def expire(self, now: float) -> bool:
        """Break if the deadline has passed; True if the barrier is (now) broken."""
        if self.state is BarrierState.FORMING and now >= self.deadline:
            missing = "; ".join(self._absence(worker, now) for worker in self.absent)
            waited = self.deadline - self.formed_at
            self._end(Trigger.EXPIRED, now, self.absent, f"after {waited:.3f} s absent: {missing}")
        return self.state is BarrierState.BROKEN

    def note_progress(self, worker: WorkerName, text: str, now: float) -> None:
        """Remember the last thing known of a participant, for the report on absentees."""
        if worker in self.participants and self.state is BarrierState.FORMING:
            self._progress[worker] = Progress(text[:FACT_CHARACTERS_MAX], now)

    def outcome(self) -> BarrierOutcome:
        """How it stands now."""
        absent = self.absent
        return BarrierOutcome(
            name=self.name,
            epoch=self.epoch,
            generation=self.generation,
            state=self.state,
            participants=self.participants,
            arrived=tuple(worker for worker in self.participants if worker in self._arrived),
            absent=absent,
            culprits=self.culprits,
            cause=self.cause,
            detail=self.detail,
            formed_at=self.formed_at,
            ended_at=self.ended_at,
            last_progress={w: self._progress[w] for w in absent if w in self._progress},
            deadline=self.deadline,
        )

    def _facts_agree(self, worker: WorkerName, facts: Mapping[str, str], now: float) -> bool:
        for fact, wanted in self.expect.items():
            if facts.get(fact) != wanted:
                said = f"{worker} has {fact}={facts.get(fact)!r}, expected {wanted!r}"
                self._end(Trigger.DISAGREED, now, (worker,), said)
                return False
        for fact in sorted(self.agree):
            held = {other: known.get(fact) for other, known in self._arrived.items()}
            if None in held.values() or len(set(held.values())) > 1:
                said = ", ".join(f"{other} has {value!r}" for other, value in held.items())
                self._end(Trigger.DISAGREED, now, _minority(held), f"{fact} differs: {said}")
                return False
        return True

    def _absence(self, worker: WorkerName, now: float) -> str:
        last = self._progress.get(worker)
        if last is None:
            return f"{worker} (never heard of since the barrier formed)"
        return f"{worker} (last: {last.text}, {now - last.at:.3f} s ago)"

    def _end(
        self, trigger: Trigger, now: float, culprits: tuple[WorkerName, ...], detail: str
    ) -> None:
        if self._move(trigger, now):
            self.culprits = culprits
            self.detail = detail

    def _move(self, trigger: Trigger, now: float) -> bool:
        """Take the transition, if the table has one; True if the barrier ended by it."""
        target = TRANSITIONS.get((self.state, trigger))
        if target is None or target is self.state:
            return False
        self.state = target
        self.cause = trigger
        self.ended_at = now
        return True

    def __str__(self) -> str:
        return str(self.outcome())


def _bounded(facts: Mapping[str, str]) -> dict[str, str]:
    kept = sorted(facts.items())[:FACTS_MAX]
    return {str(name): str(value)[:FACT_CHARACTERS_MAX] for name, value in kept}


def _changed(worker: WorkerName, before: Mapping[str, str], after: Mapping[str, str]) -> str:
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return f"{worker} arrived again with other facts: {', '.join(names)}"


def _minority(held: Mapping[WorkerName, str | None]) -> tuple[WorkerName, ...]:
    """Workers that lack the fact, else those outside the largest group, else (a tie) all."""
    lacking = tuple(worker for worker, value in held.items() if value is None)
    if lacking:
        return lacking
    votes: dict[str | None, int] = {}
    for value in held.values():
        votes[value] = votes.get(value, 0) + 1
    most = max(votes.values())
    leaders = [value for value, count in votes.items() if count == most]
    if len(leaders) > 1:
        return tuple(held)
    return tuple(worker for worker, value in held.items() if value != leaders[0])
