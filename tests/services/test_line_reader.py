"""Lines of standard input on the event loop, and a chat that Ctrl-C ends at its prompt."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.line_reader import LineReader

WAIT_S = 60.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        try:
            os.close(descriptor)
        except OSError:
            continue


async def test_lines_come_whole_however_they_were_written(pipe):
    reading, writing = pipe
    reader = LineReader(reading)
    first = asyncio.create_task(reader.line())
    for part in (b"gr\xc3", b"\xbc\xc3\x9fe", b"\nzwei\n\ndrei"):
        os.write(writing, part)
        await asyncio.sleep(0)
    assert await first == "grüße"
    assert [await reader.line(), await reader.line()] == ["zwei", ""]
    os.close(writing)
    assert [await reader.line(), await reader.line()] == ["drei", None]


async def test_a_wait_for_a_line_can_be_given_up_and_nothing_is_lost(pipe):
    reading, writing = pipe
    reader = LineReader(reading)
    waiting = asyncio.create_task(reader.line())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    os.write(writing, b"still here\n")
    assert await reader.line() == "still here"


async def test_a_plain_file_is_read_to_its_end(tmp_path):
    path = tmp_path / "questions"
    path.write_bytes(b"one\ntwo\n")
    with path.open("rb") as file:
        reader = LineReader(file.fileno())
        assert [await reader.line() for _ in range(3)] == ["one", "two", None]


def test_ctrl_c_at_the_prompt_of_a_chat_ends_it():
    keyboard, terminal = pty.openpty()
    # Nobody listens there, and nobody is asked anything yet.
    command = [sys.executable, "-m", "services", "chat", "--address", "127.0.0.1:1"]
    with subprocess.Popen(command, stdin=terminal, stdout=subprocess.PIPE) as chat:
        os.close(terminal)
        assert chat.stdout is not None
        assert chat.stdout.read(2) == b"> "
        chat.send_signal(signal.SIGINT)
        try:
            assert chat.wait(WAIT_S) == 130
        finally:
            chat.kill()
            os.close(keyboard)
