"""Looks at the mesh while it is under stress: counters, events, memory of every process.

A counter starts again when its process does; what is kept here only grows.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import psutil

from services.client import MeshClient
from services.local_mesh import COORDINATOR
from services.stress.verdict import Life
from stagemesh.errors import MeshError

LOOK_S = 0.5
POLL_S = 0.05
FOLLOW_AGAIN_S = 0.2
ANSWER_S_MAX = 5.0
MIB = 1024.0 * 1024.0
_CLOSINGS = ("RouteClosed", "RouteRefused")


async def until(holds: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
    """Wait until it holds; False if it does not in time."""
    try:
        async with asyncio.timeout(limit_s):
            while not await holds():
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. ``tokens``: delivered since the beginning."""

    at: float
    tokens: int
    rss_mib: Mapping[str, float]


@dataclass(slots=True)
class Watch:
    """Belongs to one event loop. ``pids``: process ids by name, now. ``outside``: numbers that
    clients keep, by path (``client:…``)."""

    client: MeshClient
    pids: Callable[[], Mapping[str, int]]
    outside: Callable[[], Mapping[str, int]]
    clock: Callable[[], float] = time.monotonic
    ages: dict[int, float] = field(default_factory=dict)
    """When each process was born, by id."""
    samples: list[Sample] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    """Recoveries by cause."""
    counts: Counter[str] = field(default_factory=Counter)
    _last: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    _members: dict[str, list[str]] = field(default_factory=dict)
    """Workers of each route that stands or is being opened, by epoch."""
    _coordinator: int = 0
    _followed: dict[int, tuple[int, int]] = field(default_factory=dict)
    _readings: dict[tuple[str, int], list[tuple[float, int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    async def run(self) -> None:
        """Look for ever."""
        following = asyncio.create_task(self._follow())
        try:
            while True:
                await self.look()
                await asyncio.sleep(LOOK_S)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def look(self) -> None:
        """Once."""
        self._weigh()
        with contextlib.suppress(MeshError, TimeoutError):
            async with asyncio.timeout(ANSWER_S_MAX):
                seen = await self.client.diagnostics()
            self._add("coordinator", seen.counters)
            for one in seen.workers:
                self._add(one.worker, one.counters)

    def reading(self) -> dict[str, int]:
        """Every path's number now; see ``paths``."""
        return {**self.counts, **self.outside()}

    def counters(self) -> dict[str, int]:
        """Guards' counters, all processes together."""
        prefix = "counter:"
        return {
            name.removeprefix(prefix): count
            for name, count in self.counts.items()
            if name.startswith(prefix) and "@" not in name
        }

    def lives(self) -> list[Life]:
        """Of every process that there was."""
        return [
            Life(name, pid, *zip(*found, strict=True))
            for (name, pid), found in sorted(self._readings.items())
        ]

    def _add(self, process: str, counters: Mapping[str, int]) -> None:
        last = self._last[process]
        if any(counters.get(name, 0) < value for name, value in last.items()):
            last.clear()  # another process has this name now, and counts from the beginning
        for name, value in counters.items():
            more = value - last.get(name, 0)
            self.counts[f"counter:{name}"] += more
            self.counts[f"counter:{name}@{process}"] += more
            last[name] = value

    def _weigh(self) -> None:
        found: dict[str, float] = {}
        for name, pid in self.pids().items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                self.ages.setdefault(pid, process.create_time())
                with process.oneshot():
                    rss = process.memory_info().rss / MIB
                    handles = process.num_fds(), process.num_threads()
                found[name] = rss
                self._readings[name, pid].append((rss, *handles))
        self.samples.append(Sample(self.clock(), self.outside().get("client:tokens", 0), found))

    async def _follow(self) -> None:
        """Events, over every coordinator there is."""
        while True:
            self._leave_routes_behind()
            with contextlib.suppress(MeshError):
                async with aclosing(self.client.follow((), 1)) as responses:
                    async for response in responses:
                        if response.HasField("event"):
                            self._note(response.event)
            await asyncio.sleep(FOLLOW_AGAIN_S)

    def _leave_routes_behind(self) -> None:
        """A coordinator's routes end with it, and nobody says so."""
        pid = self.pids().get(COORDINATOR, 0)
        if pid != self._coordinator:
            self._coordinator = pid
            for epoch in tuple(self._members):
                self._closed(epoch)

    def _note(self, event: Any) -> None:
        place = (event.time_unix_ns, event.offset)  # offsets begin again with a coordinator
        if place <= self._followed.get(event.topic, (0, 0)):
            return  # seen before the stream broke
        self._followed[event.topic] = place
        kind, facts = str(event.type), event.attributes
        self.counts[f"event:{kind}"] += 1
        if event.worker:
            self.counts[f"event:{kind}@{event.worker}"] += 1
        if kind in ("RecoveryFinished", "RecoveryOvertaken"):
            self.causes[facts.get("cause", "")] += 1
            self.counts[f"cause:{facts.get('cause', '')}"] += 1
        elif kind == "RouteOpening":
            self._members[facts.get("epoch", "")] = facts.get("workers", "").split()
        elif kind in _CLOSINGS:
            self._closed(facts.get("epoch", ""))

    def _closed(self, epoch: str) -> None:
        self.counts["route:closed"] += 1
        self.counts[f"event:RouteClosed@{epoch}"] += 1
        for name in self._members.pop(epoch, ()):
            self.counts[f"route:closed@{name}"] += 1
