"""Keeps the processes of a local mesh running, and ends them all.

Each process writes its output to its own file. A worker that leaves with status 0 was drained and
stays away. One that dies is started again, but only after its exit has been collected and after a
pause that doubles with every death and starts over once a process has lived for a while; one that
keeps dying is given up. Before the mesh has worked once, a death is a failed start: the end of the
right log is shown instead. Every child holds the reading end of a pipe whose writing end only this
process has, so that it notices when this process is gone, however it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.local_mesh import COORDINATOR, ProcessSpec
from stagemesh.errors import StageError

RESTART_WAIT_S_FIRST = 0.5
RESTART_WAIT_S_MAX = 30.0
RESTARTS_MAX = 8
"""Deaths in a row before a process is given up; about two minutes of trying."""
SETTLED_S = 30.0
"""A process that has lived this long has recovered: its next death counts as the first."""
KILL_GRACE_S = 5.0
"""Between SIGTERM's own grace and SIGKILL."""
TAIL_LINES = 15
TAIL_BYTES = 16_384

_log = logging.getLogger(__name__)


class StartFailed(StageError):
    """A process ended before the mesh worked."""

    code, reason = "FAILED_PRECONDITION", "START_FAILED"


def restart_wait_s(deaths: int) -> float:
    """Pause before the next start after ``deaths`` deaths in a row (1 is the first)."""
    return min(RESTART_WAIT_S_MAX, RESTART_WAIT_S_FIRST * float(2 ** max(0, deaths - 1)))


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log file; empty if there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - TAIL_BYTES))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(deque((line for line in text.splitlines() if line.strip()), maxlen=lines))


@dataclass(slots=True)
class Child:
    """One process. state: starting | running | waiting | left | given up | ended."""

    spec: ProcessSpec
    log: Path
    process: asyncio.subprocess.Process | None = None
    state: str = "starting"
    deaths: int = 0
    restarts: int = 0
    started_at: float = 0.0
    status: int | None = None
    watch: asyncio.Task[None] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Process id; 0 while there is no process."""
        alive = self.process is not None and self.process.returncode is None
        return self.process.pid if self.process is not None and alive else 0


class Supervisor:
    """Starts, watches, restarts and ends processes. Belongs to one event loop.

    ``changed`` is called after every start and death; it must not block.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_directory = run_directory
        self.children: dict[str, Child] = {}
        self.gave_up = asyncio.Event()
        """Set when a process that the mesh cannot do without was given up."""
        self._environment = dict(os.environ if environment is None else environment)
        self._changed = changed
        self._proven = False
        self._stopping = False
        self.pipe_read, self._pipe_write = os.pipe()

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of what runs, by name."""
        return {name: child.pid for name, child in self.children.items() if child.pid}

    async def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start every process; returns at once, without waiting for them to work."""
        self.run_directory.mkdir(parents=True, exist_ok=True)
        for spec in specs:
            child = Child(spec, self.run_directory / f"{spec.name}.log")
            self.children[spec.name] = child
            await self._spawn(child)

    def proven(self) -> None:
        """The mesh has worked: from now on a death is answered by a restart."""
        self._proven = True

    def failed_start(self) -> StartFailed | None:
        """What to report when a process ended before the mesh worked; None: none has."""
        for child in self.children.values():
            if child.state == "ended" and not self._stopping:
                return StartFailed(
                    f"{child.spec.name} ended with status {child.status}:\n{tail(child.log)}",
                    worker=child.spec.name,
                    log=child.log,
                )
        return None

    async def stop(self, grace_s: float) -> None:
        """Drain: the coordinator first, so that answers end well, then the others; then force."""
        self._stopping = True
        first = [child for child in self.children.values() if child.spec.name == COORDINATOR]
        others = [child for child in self.children.values() if child.spec.name != COORDINATOR]
        for group in (first, others):
            await self._end(group, grace_s)
        watches = [child.watch for child in self.children.values() if child.watch is not None]
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        self.close()

    def kill(self) -> None:
        """End everyone at once: nobody wants to wait. `stop` must still be awaited."""
        self._stopping = True
        for child in self.children.values():
            self._signal(child, signal.SIGKILL)

    def close(self) -> None:
        """Let go of the pipe; whoever still lives ends by itself."""
        for descriptor in (self.pipe_read, self._pipe_write):
            if descriptor >= 0:
                os.close(descriptor)
        self.pipe_read = self._pipe_write = -1

    # -- one child ---------------------------------------------------------------------------------

    async def _spawn(self, child: Child) -> None:
        with child.log.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                *child.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment | dict(child.spec.environment),
                pass_fds=(self.pipe_read,),
                # Ctrl-C is for the supervisor, which then ends them in order. Not a session: to
                # Linux each is a scheduling group, and a group that is mostly idle, as the
                # coordinator is, waits up to 100 ms for a core beside groups that compute.
                process_group=0,
            )
        child.state = "running"
        child.started_at = asyncio.get_running_loop().time()
        if child.watch is None:
            child.watch = asyncio.create_task(self._watch(child), name=f"watch {child.spec.name}")
        self._changed()

    async def _watch(self, child: Child) -> None:
        """Collect every exit, and start again while that makes sense."""
        while child.process is not None:
            child.status = await child.process.wait()
            lived_s = asyncio.get_running_loop().time() - child.started_at
            child.deaths = 1 if lived_s >= SETTLED_S else child.deaths + 1
            if self._stopping or not self._proven:
                child.state = "ended"
                self._changed()
                return
            if child.status == 0 and child.spec.name != COORDINATOR:
                child.state = "left"  # on purpose: it was drained, and should stay away
                self._changed()
                return
            _log.warning("%s ended with status %s", child.spec.name, child.status)
            if child.deaths > RESTARTS_MAX:
                child.state = "given up"
                _log.error("%s died %d times and is given up", child.spec.name, child.deaths)
                if child.spec.name == COORDINATOR:
                    self.gave_up.set()
                self._changed()
                return
            child.state = "waiting"
            self._changed()
            await asyncio.sleep(restart_wait_s(child.deaths))
            await self._spawn_again(child)

    async def _spawn_again(self, child: Child) -> None:
        """A start that is refused (no memory, no log file) counts as a death and is tried again."""
        child.restarts += 1
        try:
            await self._spawn(child)
        except OSError as error:
            child.started_at = asyncio.get_running_loop().time()
            _log.warning("%s cannot be started: %s", child.spec.name, error)

    async def _end(self, group: Sequence[Child], grace_s: float) -> None:
        for child in group:
            if child.state == "waiting" and child.watch is not None:
                child.watch.cancel()  # it was about to be started again
            self._signal(child, signal.SIGTERM)
        running = [child.process for child in group if child.process is not None and child.pid]
        if running:
            waits = [asyncio.create_task(process.wait()) for process in running]
            _, late = await asyncio.wait(waits, timeout=grace_s + KILL_GRACE_S)
            for child in group if late else ():
                _log.warning("%s did not end in time and is killed", child.spec.name)
                self._signal(child, signal.SIGKILL)
            await asyncio.gather(*waits)
        for child in group:
            child.state = "ended"

    @staticmethod
    def _signal(child: Child, number: signal.Signals) -> None:
        if child.process is not None and child.pid:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(number)
