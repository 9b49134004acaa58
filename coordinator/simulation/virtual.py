"""Virtual time and the processes that live in it.

``VirtualTime`` is a queue of actions ordered by (time, order of scheduling): nothing sleeps, an
hour costs what happens in it, and equal runs have equal orders.

``Process`` is what a fault can kill or stop. Whatever is to happen in a process is scheduled
through it: a dead one does nothing, a stopped one (SIGSTOP) does everything later, in order, when
it is continued: timers that have expired meanwhile, and messages that its kernel has kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Timer:
    """A scheduled action; ``cancel`` it or let it run."""

    __slots__ = ("action", "when")

    def __init__(self, when: float, action: Action) -> None:
        self.when = when
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class VirtualTime:
    """Seconds since the run began."""

    __slots__ = ("_heap", "_order", "events", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, when: float, action: Action) -> Timer:
        """Run ``action`` at ``when``; what is in the past runs next."""
        timer = Timer(max(when, self.now), action)
        self._order += 1
        heapq.heappush(self._heap, (timer.when, self._order, timer))
        return timer

    def after(self, seconds: float, action: Action) -> Timer:
        """Run ``action`` in ``seconds``."""
        return self.at(self.now + seconds, action)

    def run_until(self, condition: Callable[[], bool], end: float, *, events_max: int) -> bool:
        """Let things happen until ``condition`` holds (True), or ``end`` or ``events_max`` is
        reached (False)."""
        heap = self._heap
        while not condition():
            if not heap or heap[0][0] > end or self.events >= events_max:
                self.now = max(self.now, end)
                return False
            when, _, timer = heapq.heappop(heap)
            action = timer.action
            if action is None:
                continue
            self.now = when
            self.events += 1
            action()
        return True


class Process:
    """One operating system process, as far as its peers can tell."""

    __slots__ = ("alive", "at_death", "frozen", "name", "time", "waiting")

    def __init__(self, name: str, time: VirtualTime) -> None:
        self.name = name
        self.time = time
        self.alive = True
        self.frozen = False
        self.waiting: list[Action] = []
        self.at_death: list[Action] = []
        """What its kernel does when it is gone: connections are reset."""

    def do(self, action: Action) -> None:
        """Now, or when it is continued, or never."""
        if self.frozen:
            self.waiting.append(action)
        elif self.alive:
            action()

    def after(self, seconds: float, action: Action) -> Timer:
        """``do`` it in ``seconds``; may still be cancelled while it waits for a stopped process."""

        def due() -> None:
            if timer.action is not None:
                action()

        timer = self.time.after(seconds, lambda: self.do(due))
        return timer

    def stop(self) -> None:
        """SIGSTOP."""
        if self.alive:
            self.frozen = True

    def resume(self) -> None:
        """SIGCONT: everything that waited happens, in order."""
        if not self.frozen:
            return
        self.frozen = False
        waiting, self.waiting = self.waiting, []
        for action in waiting:
            self.time.after(0.0, lambda action=action: self.do(action))  # type: ignore[misc]

    def kill(self) -> None:
        """SIGKILL: nothing happens in it any more."""
        if not self.alive:
            return
        self.alive = self.frozen = False
        self.waiting.clear()
        for action in self.at_death:
            action()
        self.at_death.clear()
