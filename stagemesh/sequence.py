"""Order: is this item the next one, one seen before, one too far ahead, or of another epoch?

Within one epoch the step numbers of a hop are consecutive from 1, and the positions of a stream are
consecutive from a first position both sides know. So one number, the next expected one, decides
every case, and memory stays constant however long a stream gets.

What was *never sent* cannot be told from what was *lost* by looking only at what arrived: a checker
that takes the smallest and largest number seen for the range calls a stream without its head or its
tail complete. Here the head is known before the first item (``first``), and the tail by an end
marker that carries the number of items (``finish``); until both have matched nothing is complete.

``SequenceGate`` guards a hop and is strict: it moves only over the next step.
``SequenceIntegrityChecker`` guards a stream, keeps counts for a report, and may be told to go on
behind a loss."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from stagemesh.errors import (
    DuplicateFrame,
    EpochFenced,
    EpochNotOpen,
    InvalidConfiguration,
    SequenceGap,
)

FIRST_STEP = 1
"""Step number every epoch begins with."""


class Order(enum.Enum):
    """Where an item stands in its sequence."""

    NEXT = "next"
    DUPLICATE = "duplicate"
    """Before the next expected number: it was seen, or it was given up by ``skip_to``."""
    GAP = "gap"
    """Behind the next expected number: something in between has not arrived."""
    STALE_EPOCH = "stale_epoch"
    UNKNOWN_EPOCH = "unknown_epoch"
    """Newer than the epoch that is open here."""
    EXCESS = "excess"
    """Behind the end marker, or more items than the end marker admits."""


class End(enum.Enum):
    """What an end marker proves."""

    COMPLETE = "complete"
    TAIL_LOST = "tail_lost"
    HEAD_LOST = "head_lost"
    """The first items were given up, or nothing arrived although something was sent."""
    HOLES = "holes"
    """The end was reached, but items were skipped on the way."""
    EXCESS = "excess"


@dataclass(slots=True)
class SequenceGate:
    """The receiving end of one hop at one epoch. ``next_step``: the only step number let through.

    ``judge`` looks, ``admit`` looks and moves. Nothing else changes ``next_step``; a retransmission
    therefore cannot be computed twice. Invariant: ``next_step >= 1``.
    """

    epoch: int
    next_step: int = FIRST_STEP

    def judge(self, epoch: int, step: int) -> Order:
        """Where a frame stands, without letting it through."""
        if epoch != self.epoch:
            return Order.STALE_EPOCH if epoch < self.epoch else Order.UNKNOWN_EPOCH
        if step == self.next_step:
            return Order.NEXT
        return Order.DUPLICATE if step < self.next_step else Order.GAP

    def admit(self, epoch: int, step: int) -> Order:
        """``judge``, and step over the number if it is the next."""
        order = self.judge(epoch, step)
        if order is Order.NEXT:
            self.next_step += 1
        return order

    def require(self, epoch: int, step: int) -> None:
        """``admit``, or raise EpochFenced, EpochNotOpen, SequenceGap or DuplicateFrame."""
        order = self.admit(epoch, step)
        if order is Order.NEXT:
            return
        facts = {"epoch": epoch, "step": step, "expected": self.next_step}
        if order is Order.DUPLICATE:
            raise DuplicateFrame("step seen before", **facts)
        if order is Order.GAP:
            raise SequenceGap("a step was skipped", missing=self.missing(step), **facts)
        if order is Order.STALE_EPOCH:
            raise EpochFenced("frame of an older route", current=self.epoch, **facts)
        raise EpochNotOpen("frame of a route that is not open here", current=self.epoch, **facts)

    def missing(self, step: int) -> range:
        """Steps to ask for again when ``step`` arrived: those from the next expected up to it."""
        return range(self.next_step, max(step, self.next_step))

    @property
    def last_step(self) -> int:
        """Highest step let through; 0 if none."""
        return self.next_step - 1

    def reopen(self, epoch: int) -> None:
        """Start a newer epoch at step 1. Raises EpochFenced for an epoch that is not newer."""
        if epoch <= self.epoch:
            raise EpochFenced("an epoch only grows", epoch=epoch, current=self.epoch)
        self.epoch = epoch
        self.next_step = FIRST_STEP

    def __str__(self) -> str:
        return f"gate epoch={self.epoch} next={self.next_step}"


@dataclass(frozen=True, slots=True)
class SequenceReport:
    """Counts of one stream so far. ``accepted + lost == next_number - first`` always holds."""

    first: int
    next_number: int
    accepted: int
    duplicates: int
    gaps: int
    lost: int
    fenced: int
    excess: int
    head_lost: bool
    finished: bool


class SequenceIntegrityChecker:
    """Judges a stream of consecutive numbers (positions, indices, offsets, steps) as it arrives.

    ``first``: the number the stream must begin with; without it a lost head could not be seen.
    ``follow_epochs``: positions go on across epochs (a stream that moves to a new route continues
    at the next position), so a newer epoch simply becomes the current one. Without it the owner
    says ``begin_epoch``, and a newer epoch before that is UNKNOWN_EPOCH. Constant memory."""

    __slots__ = (
        "_accepted",
        "_duplicates",
        "_end",
        "_excess",
        "_fenced",
        "_first",
        "_follow_epochs",
        "_gaps",
        "_head_lost",
        "_lost",
        "epoch",
        "next_number",
    )

    def __init__(self, *, first: int = 0, epoch: int = 0, follow_epochs: bool = False) -> None:
        if first < 0 or epoch < 0:
            raise InvalidConfiguration("a sequence starts at a number that is not negative")
        self.epoch = epoch
        self.next_number = first
        self._first = first
        self._follow_epochs = follow_epochs
        self._accepted = self._duplicates = self._gaps = self._lost = 0
        self._fenced = self._excess = 0
        self._head_lost = False
        self._end: int | None = None

    def observe(self, number: int, *, epoch: int | None = None, count: int = 1) -> Order:
        """Judge the ``count`` consecutive items that begin at ``number``; move over them if next.

        Items that overlap what was seen (begin before the next number) are a DUPLICATE as a whole.
        """
        if epoch is not None and epoch != self.epoch:
            if epoch < self.epoch:
                self._fenced += 1
                return Order.STALE_EPOCH
            if not self._follow_epochs:
                return Order.UNKNOWN_EPOCH
            self.epoch = epoch
        if self._end is not None and number + count > self._end:
            self._excess += 1
            return Order.EXCESS
        if number == self.next_number:
            self.next_number += count
            self._accepted += count
            return Order.NEXT
        if number < self.next_number:
            self._duplicates += 1
            return Order.DUPLICATE
        self._gaps += 1
        return Order.GAP

    def missing(self, number: int) -> range:
        """Numbers not seen before ``number``."""
        return range(self.next_number, max(number, self.next_number))

    def skip_to(self, number: int) -> range:
        """Give up what is missing before ``number``, so that the stream can go on; returns it."""
        lost = self.missing(number)
        self._head_lost = self._head_lost or (bool(lost) and self._accepted == 0)
        self._lost += len(lost)
        self.next_number = max(number, self.next_number)
        return lost

    def begin_epoch(self, epoch: int, *, first: int | None = None) -> None:
        """Open a newer epoch; ``first`` restarts the numbering (steps), None continues it
        (positions).

        Raises EpochFenced if ``epoch`` is not newer.
        """
        if epoch <= self.epoch:
            raise EpochFenced("an epoch only grows", epoch=epoch, current=self.epoch)
        self.epoch = epoch
        if first is None:
            return
        self._first = self.next_number = first
        self._accepted = self._lost = 0
        self._head_lost = False
        self._end = None

    def rewind_to(self, number: int) -> None:
        """Expect ``number`` again: what stood there was withdrawn. Never before ``first``."""
        if not self._first <= number <= self.next_number:
            raise InvalidConfiguration(
                "a sequence rewinds only over what it has seen", to=number, next=self.next_number
            )
        self._accepted = max(0, self._accepted - (self.next_number - number))
        self._lost = (number - self._first) - self._accepted
        self.next_number = number
        self._end = None

    def finish(self, total: int) -> End:
        """The sender's end marker: ``total`` items were sent from ``first`` on.

        Idempotent. After a TAIL_LOST the missing items may still arrive; ask again then.
        """
        end = self._first + total
        if self.next_number > end:
            self._excess += 1
            return End.EXCESS
        self._end = end
        if self.next_number < end:
            return End.TAIL_LOST if self._accepted else End.HEAD_LOST
        if self._head_lost:
            return End.HEAD_LOST
        return End.HOLES if self._lost else End.COMPLETE

    @property
    def report(self) -> SequenceReport:
        """Everything counted so far."""
        return SequenceReport(
            first=self._first,
            next_number=self.next_number,
            accepted=self._accepted,
            duplicates=self._duplicates,
            gaps=self._gaps,
            lost=self._lost,
            fenced=self._fenced,
            excess=self._excess,
            head_lost=self._head_lost,
            finished=self._end is not None and self.next_number == self._end,
        )

    def __str__(self) -> str:
        return (
            f"sequence epoch={self.epoch} first={self._first} next={self.next_number} "
            f"lost={self._lost} duplicates={self._duplicates}"
        )
