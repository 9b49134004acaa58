"""The processes of one worker's devices, from outside: started together, ended together.

Each member is a process of its own that joins a ``mx.distributed`` ring and then answers commands:
one JSON object per line in, one out. A command goes to all members, and all must answer in time.
When one does not (it ended, it is stopped, it says that a barrier broke), nothing can be saved: a
collective cannot be cancelled and a ring cannot be rebuilt inside a process. So *all* members are
ended, killed if need be, and the caller gets one BarrierBroken that names who failed and how.
``restart`` starts a new generation, as often as ``restarts_max`` allows; no command is repeated.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stage_worker.mx_barrier import EXIT_BARRIER_BROKEN
from stagemesh.errors import BarrierBroken, InvalidConfiguration

END_S_MAX = 5.0
START_ATTEMPTS_MAX = 3
ANSWER_CHARACTERS_MAX = 1_000_000

_log = logging.getLogger(__name__)


class _Member:
    """One process; its answers come through a queue, None at the end of its output."""

    def __init__(self, program: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - the worker's own program
            list(program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True, name="device-answers").start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                try:
                    self.answers.put(json.loads(line[:ANSWER_CHARACTERS_MAX]))
                except ValueError:
                    _log.warning("a device said something else: %s", line[:200].rstrip())
        self.answers.put(None)

    def tell(self, command: Mapping[str, Any]) -> bool:
        """Write a command; False if the process is gone."""
        if self.process.stdin is None:
            return False
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def end(self) -> None:
        """Kill it (a stopped process takes no other signal) and wait until it is gone."""
        self.process.kill()
        self.process.wait(END_S_MAX)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class DeviceGroup:
    """``size`` members, each started as ``program``; a context manager. Belongs to one thread."""

    def __init__(
        self,
        program: Sequence[str],
        size: int,
        *,
        start_s_max: float = 30.0,
        answer_s_max: float = 10.0,
        restarts_max: int = 3,
    ) -> None:
        if size < 1:
            raise InvalidConfiguration("a group needs a member", setting="size")
        self._program = tuple(program)
        self._size = size
        self._start_s_max = start_s_max
        self._answer_s_max = answer_s_max
        self._restarts_left = restarts_max
        self._members: list[_Member] = []
        self.generation = 0
        """How often the members were started; part of every barrier's key."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in member order; none once the group has ended."""
        return tuple(member.process.pid for member in self._members)

    def start(self) -> None:
        """Start every member and wait until all have met. Raises BarrierBroken."""
        for attempt in range(1, START_ATTEMPTS_MAX + 1):
            try:
                self._start()
            except BarrierBroken as error:  # most likely somebody else took a port meanwhile
                if attempt == START_ATTEMPTS_MAX:
                    raise
                _log.warning("devices did not meet at attempt %d: %s", attempt, error)
            else:
                return

    def _start(self) -> None:
        self.close()
        self.generation += 1
        with tempfile.TemporaryDirectory(prefix="stagemesh-ring-") as folder:
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[address] for address in _addresses(self._size)]))
            for rank in range(self._size):
                environment = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
                self._members.append(_Member(self._program, environment))
            self._collect(self._start_s_max)

    def run(self, command: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every member's answer, in member order. Raises BarrierBroken, and the group has ended."""
        return self.run_each([command] * self._size)

    def run_each(self, commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`run` with a command for each member."""
        if not self._members:
            raise BarrierBroken("the group has ended", generation=self.generation)
        for member, command in zip(self._members, commands, strict=True):
            member.tell(command)
        return self._collect(self._answer_s_max)

    def restart(self) -> None:
        """A new generation of processes. Raises BarrierBroken when there were too many."""
        if self._restarts_left < 1:
            self.close()
            raise BarrierBroken("restarts_max is reached", generation=self.generation)
        self._restarts_left -= 1
        self.start()

    def close(self) -> None:
        """End every member. Idempotent."""
        members, self._members = self._members, []
        for member in members:
            member.end()

    def _collect(self, seconds: float) -> list[dict[str, Any]]:
        """One answer of each member, or the end of all."""
        deadline = time.monotonic() + seconds
        answers: list[dict[str, Any]] = []
        failures: dict[int, str] = {}
        for rank, member in enumerate(self._members):
            try:
                answer = member.answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                failures[rank] = f"no answer in {seconds:g} s"
                continue
            if answer is None:
                failures[rank] = _how_it_ended(member)
            elif "broken" in answer:
                failures[rank] = str(answer["broken"].get("detail", "broken"))
            else:
                answers.append(answer)
        if not failures:
            return answers
        self.close()
        said = "; ".join(f"member {rank}: {why}" for rank, why in failures.items())
        members = ",".join(map(str, failures))
        raise BarrierBroken(said, generation=self.generation, members=members)


def _how_it_ended(member: _Member) -> str:
    try:
        status = member.process.wait(END_S_MAX)
    except subprocess.TimeoutExpired:
        return "closed its output"
    if status == EXIT_BARRIER_BROKEN:
        return "ended, stuck in a collective"
    return f"ended with status {status}"


def _addresses(count: int) -> list[str]:
    """Free ports of the loopback interface, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    finally:
        for one in sockets:
            one.close()
