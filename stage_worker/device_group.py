"""The processes of one worker's devices, from outside: started together, ended together.

Each member is a process of its own that joins a ``mx.distributed`` ring and then answers commands:
one JSON object per line in, one out. A command goes to all members, and all must answer in time.
When one does not (it ended, it is stopped, it says that a barrier broke), nothing can be saved: a
collective cannot be cancelled and a ring cannot be rebuilt inside a process. So *all* members are
ended, killed if need be, and the caller gets one BarrierBroken that names who failed and how.
``restart`` starts a new generation, as often as ``restarts_max`` allows; no command is repeated.

Pipes are read and written by threads: a member that is stopped neither empties its own nor may it
hold up the others' commands or the time limit.
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
ANSWER_CHARACTERS_MAX = 1 << 28
"""Of one answer; the largest carries an activation."""
AGREE_S_MAX = 1.0
"""How long the others may take to say what they saw, once one member has failed."""

_log = logging.getLogger(__name__)

_Answers = queue.Queue[tuple[int, dict[str, Any] | None]]


class _Member:
    """One process. Its answers go into ``answers`` under its rank, None at the end of its
    output."""

    def __init__(
        self,
        program: Sequence[str],
        environment: Mapping[str, str],
        rank: int,
        answers: _Answers,
    ) -> None:
        # A group of its own: an interrupt from the terminal is for the worker, which ends it.
        self.process = subprocess.Popen(  # noqa: S603 - the worker's own program
            list(program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
            process_group=0,
        )
        self._rank = rank
        self._answers = answers
        self._commands: queue.Queue[str | None] = queue.Queue()
        self._threads = [
            threading.Thread(target=self._read, daemon=True, name=f"device-{rank}-answers"),
            threading.Thread(target=self._write, daemon=True, name=f"device-{rank}-commands"),
        ]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            while line := self.process.stdout.readline(ANSWER_CHARACTERS_MAX):
                try:
                    self._answers.put((self._rank, dict(json.loads(line))))
                except (ValueError, TypeError):
                    _log.warning("a device said something else: %s", line[:200].rstrip())
        self._answers.put((self._rank, None))

    def _write(self) -> None:
        """Whoever is gone or does not read is missed by his answer."""
        while (line := self._commands.get()) is not None and self.process.stdin is not None:
            try:
                self.process.stdin.write(line)
                self.process.stdin.flush()
            except OSError:
                return

    def tell(self, line: str) -> None:
        """Have a command written."""
        self._commands.put(line)

    def kill(self) -> None:
        """A stopped process takes no other signal."""
        self._commands.put(None)
        self.process.kill()

    def wait(self) -> None:
        """Until it and its threads are gone."""
        self.process.wait(END_S_MAX)
        for thread in self._threads:
            thread.join(END_S_MAX)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # What was left to be written has nobody to read it.
                    continue


class DeviceGroup:
    """``size`` members, each started as ``program``; a context manager. Belongs to one thread; only
    ``end`` may be called from another: it ends what that one waits for."""

    def __init__(
        self,
        program: Sequence[str],
        size: int,
        *,
        start_s_max: float = 30.0,
        answer_s_max: float = 10.0,
        restarts_max: int = 3,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if size < 1:
            raise InvalidConfiguration("a group needs a member", setting="size")
        self._program = tuple(program)
        self._size = size
        self._start_s_max = start_s_max
        self._answer_s_max = answer_s_max
        self._restarts_left = restarts_max
        self._environment = dict(environment or {})
        self._members: list[_Member] = []
        self._answers: _Answers = queue.Queue()
        self._lock = threading.Lock()
        """Of the two fields around it."""
        self._ended = False
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
        self._answers = queue.Queue()
        with tempfile.TemporaryDirectory(prefix="stagemesh-ring-") as folder:
            hosts = Path(folder) / "hosts.json"
            hosts.write_text(json.dumps([[address] for address in _addresses(self._size)]))
            for rank in range(self._size):
                ring = {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)}
                self._add(rank, {**self._environment, **ring})
            self._collect(self._members, self._start_s_max)

    def _add(self, rank: int, environment: Mapping[str, str]) -> None:
        with self._lock:
            if self._ended:
                raise BarrierBroken("the group has ended", generation=self.generation)
            self._members.append(_Member(self._program, environment, rank, self._answers))

    def run(
        self, command: Mapping[str, Any], *, answer_s_max: float | None = None
    ) -> list[dict[str, Any]]:
        """Every member's answer, in member order. Raises BarrierBroken, and the group has ended."""
        return self._run([json.dumps(command) + "\n"] * self._size, answer_s_max)

    def run_each(self, commands: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`run` with a command for each member."""
        return self._run([json.dumps(command) + "\n" for command in commands], None)

    def _run(self, lines: Sequence[str], answer_s_max: float | None) -> list[dict[str, Any]]:
        members = self._members
        if not members:
            raise BarrierBroken("the group has ended", generation=self.generation)
        for member, line in zip(members, lines, strict=True):
            member.tell(line)
        return self._collect(members, answer_s_max or self._answer_s_max)

    def restart(self) -> None:
        """A new generation of processes. Raises BarrierBroken when there were too many."""
        if self._restarts_left < 1:
            self.close()
            raise BarrierBroken("restarts_max is reached", generation=self.generation)
        self._restarts_left -= 1
        self.start()

    def close(self) -> None:
        """End every member. Idempotent."""
        with self._lock:
            members, self._members = self._members, []
        for member in members:
            member.kill()
        for member in members:
            member.wait()

    def end(self) -> None:
        """`close`, from any thread and for good: no member is started any more."""
        with self._lock:
            self._ended = True
        self.close()

    def _collect(self, members: Sequence[_Member], seconds: float) -> list[dict[str, Any]]:
        """One answer of each member, or the end of all."""
        deadline = time.monotonic() + seconds
        answers: dict[int, dict[str, Any]] = {}
        failures: dict[int, str] = {}
        while len(answers) + len(failures) < self._size:
            try:
                rank, answer = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                missing = set(range(self._size)) - answers.keys() - failures.keys()
                failures |= dict.fromkeys(missing, f"no answer in {seconds:g} s")
                break
            broken = answer.get("broken") if answer is not None else None
            if answer is not None and broken is None:
                answers[rank] = answer
                continue
            # What a member says before it ends says more than its exit status.
            said = broken.get("detail") if isinstance(broken, dict) else None
            failures.setdefault(rank, str(said) if said else _how_it_ended(members[rank]))
            deadline = min(deadline, time.monotonic() + AGREE_S_MAX)
        if not failures:
            return [answers[rank] for rank in range(self._size)]
        self.close()
        ordered = sorted(failures)
        text = "; ".join(f"member {rank}: {failures[rank]}" for rank in ordered)
        names = ",".join(map(str, ordered))
        raise BarrierBroken(text, generation=self.generation, members=names)


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
