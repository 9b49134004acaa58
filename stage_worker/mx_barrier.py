"""A barrier of one worker's own devices: processes that share a ``mx.distributed`` group.

The ring under such a group has no tags, no sizes and no deadline: a member that is one operation
ahead gets another operation's bytes, and a member whose peer has stopped waits for ever. So every
meeting is one collective of one fixed shape, in which each member states what it believes (name,
epoch, generation, a digest of its state), and whoever sees a difference refuses.

A collective that has begun cannot be cancelled, and a second one is never issued in its place: on
the members where the first had succeeded it would be one too many, and from then on everybody would
be out of step. Hence two rules. A ``Meeting`` that has failed once refuses everything. And a
collective that does not end in time ends its *process*: ``Watchdog`` says why on standard output
and leaves with ``EXIT_BARRIER_BROKEN``; ``device_group`` then ends the other members and may start
all of them anew. mlx releases the interpreter while it waits, so the watchdog's thread does run.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np

from stagemesh.checksum import crc32c
from stagemesh.errors import BarrierBroken, InvalidConfiguration
from stagemesh.frame import StepFrame

EXIT_BARRIER_BROKEN = 75
"""Exit status of a member that was stuck in a collective."""
WORDS = 16
"""Unsigned 32-bit words of one member's statement; the last is a CRC32C of the others."""
FIELDS_MAX = WORDS - 4
_MAGIC = 0x534D4D42
"""``SMMB``: what a raw collective's bytes do not begin with."""
_ALL_SUM = mx.distributed.all_sum
"""Bound here: `tensor_parallel` puts a checked one in its place while a model computes."""


class Operation(enum.IntEnum):
    """What a member is about to do; members that disagree are out of step."""

    BARRIER = 1
    ALL_SUM = 2
    ALL_GATHER = 3
    RESULT = 4
    """Comparing what came out of the collective before."""


class Watchdog:
    """Ends the process when what it watches takes too long. One thread; ``close`` ends it."""

    def __init__(
        self,
        *,
        end: Callable[[str], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``end`` is called once, on the watchdog's thread; None says why and ends the process."""
        self._end = end or leave
        self._now = now
        self._changed = threading.Condition()
        self._due: float | None = None
        self._what = ""
        self._closed = False
        threading.Thread(target=self._run, name="barrier-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """Whatever runs inside must end in time."""
        self._set(self._now() + seconds, f"{what} not over after {seconds:g} s")
        try:
            yield
        finally:
            self._set(None, "")

    def close(self) -> None:
        """Watch no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _set(self, due: float | None, what: str) -> None:
        with self._changed:
            self._due, self._what = due, what
            self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                left = None if self._due is None else self._due - self._now()
                if left is not None and left <= 0:
                    self._due = None
                    self._end(self._what)
                    continue
                self._changed.wait(left)


def leave(why: str) -> None:
    """End this process at once: it is inside a collective that nothing can cancel."""
    document = {"broken": {"cause": "expired", "detail": why}}
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()
    os._exit(EXIT_BARRIER_BROKEN)


class Meeting:
    """One member's end of a group at one epoch. Belongs to one thread.

    ``exchange`` is the only collective in here, always of one shape and type, so that members that
    are out of step still understand each other well enough to see it.
    """

    def __init__(
        self, group: Any, *, epoch: int, timeout_s: float, watchdog: Watchdog | None = None
    ) -> None:
        if timeout_s <= 0 or not 0 <= epoch < 2**64:
            raise InvalidConfiguration("a meeting needs an epoch and a time limit")
        self.group = group
        self.epoch = epoch
        self.timeout_s = timeout_s
        self.sequence = 0
        """Collectives begun; part of every statement."""
        self.broken: BarrierBroken | None = None
        self._watchdog = watchdog or Watchdog()

    def barrier(self, name: str, generation: int, state: Mapping[str, str] | None = None) -> None:
        """Until every member is here with the same state. Raises BarrierBroken; ends the process
        if somebody does not come in time."""
        fields = (digest(name.encode()), generation, digest(canonical(state or {})))
        self.agree(Operation.BARRIER, fields, ("name", "generation", "state"))

    def agree(self, operation: Operation, fields: Sequence[int], names: Sequence[str]) -> None:
        """Every member states the same ``fields`` (u32), or BarrierBroken says what differs."""
        own = self._statement(operation, fields)
        rows = self.exchange(own)
        labels = ("", "epoch", "epoch", "operation", "sequence", *names)
        for rank, row in enumerate(rows):
            if row[0] != _MAGIC or row[-1] != digest(_pack(row[:-1])):
                self.fail(f"member {rank} is out of step: it was in another collective", rank)
            for label, mine, theirs in zip(labels, own, row, strict=False):
                if label and mine != theirs:
                    said = f"{label} of member {rank} is {theirs:#x}, here it is {mine:#x}"
                    self.fail(said, rank)

    def exchange(self, own: Sequence[int]) -> list[list[int]]:
        """Every member's words, in member order."""
        table = np.zeros((self.group.size(), WORDS), np.uint32)
        table[self.group.rank()] = own
        total = self.collective(lambda: _ALL_SUM(mx.array(table), group=self.group), "meeting")
        return [[int(word) for word in row] for row in np.array(total)]

    @contextlib.contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """Another time limit while members do what may take each of them a different time."""
        before, self.timeout_s = self.timeout_s, seconds
        try:
            yield
        finally:
            self.timeout_s = before

    def collective(self, begin: Callable[[], mx.array], what: str) -> mx.array:
        """Run one collective to its end, on time. Raises BarrierBroken if a peer is lost."""
        if self.broken is not None:
            raise self.broken
        self.sequence += 1
        try:
            with self._watchdog.limit(self.timeout_s, what):
                result = begin()
                mx.eval(result)
        except (RuntimeError, ValueError) as error:
            self.fail(f"{what}: {error}")
        return result

    def fail(self, detail: str, rank: int | None = None) -> NoReturn:
        """Refuse everything from now on. Raises BarrierBroken."""
        self.broken = BarrierBroken(
            detail, epoch=self.epoch, member=self.group.rank(), culprit=rank, sequence=self.sequence
        )
        raise self.broken

    def _statement(self, operation: Operation, fields: Sequence[int]) -> list[int]:
        if len(fields) > FIELDS_MAX - 2:
            raise InvalidConfiguration("a statement has too many fields", fields=len(fields))
        words = [_MAGIC, self.epoch & 0xFFFFFFFF, self.epoch >> 32, int(operation), self.sequence]
        words += [field & 0xFFFFFFFF for field in fields]
        words += [0] * (WORDS - 1 - len(words))
        return [*words, digest(_pack(words))]


def digest(data: bytes) -> int:
    """CRC32C of ``data``."""
    return crc32c(data)


def canonical(state: Mapping[str, str]) -> bytes:
    """The same bytes for the same state, whatever its order."""
    return json.dumps(sorted(state.items())).encode()


def frame_state(frame: StepFrame) -> dict[str, str]:
    """What stands for every field of a sealed frame."""
    return {"header": f"{frame.header_crc32c:08x}", "payload": f"{frame.payload_crc32c:08x}"}


def _pack(words: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)
