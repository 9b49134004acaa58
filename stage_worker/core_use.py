"""How many threads the matrix products of a step get.

Stages that compute at the same time must share the machine's cores: a thread that waits for a core
someone else holds makes every product slower than one thread would. But the stages of a single
stream take turns, and the one whose turn it is may have them all. Which of the two it is, a stage
can tell from itself: from its *duty*, the part of the time in which it computes. A stage of n that
take turns has a duty of 1/n, one of a full pipe nearly 1.

So a decode step gets ``share / duty`` threads, between ``share`` and ``most``; the duty is a moving
average that falls slowly and rises at once, since too many threads cost more than too few. The same
goes for a prompt that is one chunk, and for the first chunk of a longer one on the first stage.
Every other chunk is computed while other stages compute those before and behind it: it gets the
share. On a route of one stage nobody else has a turn, so decoding there gets all.

Measured on two cores (SmolLM2, 30 layers without the head, OpenBLAS 0.3.34 with AVX2 kernels,
float32, ms): a decode step of 1 row takes 44 with one thread and 31 with two; of 8 rows 58 and 43.

All this holds while the machine is this mesh's. Where somebody else wants the cores as well (a
restarting stage that imports and loads, another program), a product on several threads waits for
the one that has no core, in each of its hundreds of products a step: a decode step of 30 ms took
500 to 1,000 ms. So while the threads of this process lack cores (``notice``), every step gets the
share.

``apply`` sets the number in the library; it is called only when the number changes. Pure otherwise:
the clock is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from stage_worker.core_wait import CoreTimes
from stagemesh.frame import FrameKind, StepFrame

CONTENTION_MAX = 0.42
"""Threads that want a core and have none for more of the time than this are too many. Measured (two
cores, OpenBLAS, quarters of a second): stages that take turns 0.15 to 0.34, a full worker alone on
its machine 0.15 to 0.30, beside one busy process 0.46 to 0.63, beside a busy pipeline 0.6 to 0.8.
"""
WANTED_SHARE_MIN = 0.25
"""… unless hardly any thread wanted one."""
CONTENDED_HOLD_S = 2.0
"""How long a step then gets the share at least, before more are tried again."""
FALL_WEIGHT = 0.5
"""Weight of a step that was less busy than those before it."""


class CoreUse:
    """See the module. ``share`` threads are this process's own, ``most`` while the others wait."""

    def __init__(self, share: int, most: int, apply: Callable[[int], None]) -> None:
        self.share = max(1, share)
        self.most = max(self.share, most)
        self.threads = self.share
        self.duty = 1.0
        self._apply = apply
        self._began_at = 0.0
        self._ended_at: float | None = None
        self._contended_until = 0.0

    def notice(self, times: CoreTimes, elapsed_s: float, now: float) -> None:
        """What the process's threads got of the cores in the ``elapsed_s`` until ``now`` (on the
        clock of ``begin``). From any thread: a step under way is helped, too, from its next product
        on (OpenBLAS reads the number at each; lowering it is a plain store)."""
        wanted_s = times.ran_s + times.waited_s
        if wanted_s >= WANTED_SHARE_MIN * elapsed_s and times.contention > CONTENTION_MAX:
            self._contended_until = now + CONTENDED_HOLD_S
            self._use(self.share)

    def begin(self, frame: StepFrame, stage_count: int, now: float) -> None:
        """A step is about to be computed."""
        if self._ended_at is not None:
            busy_s, idle_s = self._ended_at - self._began_at, max(0.0, now - self._ended_at)
            self._note(busy_s / (busy_s + idle_s) if busy_s > 0 else 0.0)
        self._began_at = now
        crowded = now < self._contended_until
        self._use(self.share if crowded else self._wanted(frame, stage_count))

    def end(self, now: float) -> None:
        """The step that was begun last is computed."""
        self._ended_at = now

    def _use(self, threads: int) -> None:
        if threads != self.threads:
            self.threads = threads
            self._apply(threads)

    def _note(self, duty: float) -> None:
        falling = self.duty + FALL_WEIGHT * (duty - self.duty)
        self.duty = max(duty, falling)

    def _wanted(self, frame: StepFrame, stage_count: int) -> int:
        if frame.kind is FrameKind.DECODE and stage_count == 1:
            return self.most
        takes_turns = frame.kind is FrameKind.DECODE or _is_alone(frame)
        if not takes_turns:
            return self.share
        return max(self.share, min(self.most, round(self.share / max(self.duty, 0.01))))


def _is_alone(frame: StepFrame) -> bool:
    """A prompt's first chunk, of which no other stage computes anything yet."""
    return frame.kind is FrameKind.PREFILL and all(
        row.first_position == 0 and (row.samples or frame.hop_to == 0) for row in frame.rows
    )
