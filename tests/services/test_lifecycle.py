"""How a process ends: signals, the parent's pipe, the kernel's word, and the grace of an orphan."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.lifecycle import EXIT_INTERRUPTED, EXIT_ORPHANED, StopSignal

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0

ORDERLY = """
import asyncio, sys
from services import lifecycle

async def main():
    stop = lifecycle.StopSignal()
    stop.listen_to_signals()
    stop.follow_parent(int(sys.argv[1]))
    print("up", flush=True)
    print(await stop.wait(), stop.orphaned, flush=True)

asyncio.run(main())
"""

STUCK = """
import asyncio, sys
from services import lifecycle

lifecycle.ORPHAN_GRACE_S = 0.1

async def main():
    stop = lifecycle.StopSignal()
    stop.listen_to_signals()
    stop.follow_parent(int(sys.argv[1]))
    print("up", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def start(program: str, pipe: int = -1) -> subprocess.Popen[str]:
    """A child that has said that it is up."""
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(pipe)],
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(pipe,) if pipe >= 0 else (),
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


def last_words(child: subprocess.Popen[str]) -> str:
    said, _ = child.communicate(timeout=LIMIT_S)
    return said.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    child = start(ORDERLY)
    child.send_signal(number)
    assert last_words(child) == f"{number.name} False"
    assert child.returncode == 0


def test_a_second_signal_ends_at_once() -> None:
    child = start(STUCK)
    child.send_signal(signal.SIGTERM)
    assert child.stdout is not None
    assert child.stdout.readline() == "stopping\n"
    child.send_signal(signal.SIGTERM)
    assert child.wait(LIMIT_S) == EXIT_INTERRUPTED


def test_the_end_of_the_parents_pipe_is_the_end_of_the_child() -> None:
    read, write = os.pipe()
    child = start(ORDERLY, read)
    os.close(read)
    os.close(write)
    assert last_words(child) == "the parent process is gone True"
    assert child.returncode == 0


def test_an_orphan_that_does_not_come_to_an_end_is_ended() -> None:
    read, write = os.pipe()
    child = start(STUCK, read)
    os.close(read)
    os.close(write)
    assert child.wait(LIMIT_S) == EXIT_ORPHANED


PARENT = """
import subprocess, sys
program, pipe = sys.argv[1:]
subprocess.Popen([sys.executable, "-c", program, pipe], pass_fds=(int(pipe),))
sys.stdin.read()
"""


def test_a_dead_parent_is_noticed_by_the_kernel_where_it_can_and_by_the_pipe_elsewhere() -> None:
    read, write = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, ORDERLY, str(read)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(read,),
        cwd=ROOT,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    expected = "SIGTERM False\n"
    if not sys.platform.startswith("linux"):
        os.close(write)
        expected = "the parent process is gone True\n"
    assert parent.stdout.readline() == expected
    parent.communicate(timeout=LIMIT_S)
    os.close(read)


async def test_only_the_first_reason_counts() -> None:
    stop = StopSignal()
    stop.set("drained")
    stop.set("later")
    async with asyncio.timeout(LIMIT_S):
        assert await stop.wait() == "drained"
    assert stop.orphaned is False
