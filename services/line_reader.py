"""Lines of standard input, for a program whose event loop goes on.

A thread that waits in ``input`` cannot be interrupted, and a program waits for its threads: Ctrl-C
at a prompt would not end it. So the loop itself watches the descriptor and reads what is there. A
terminal hands over whole lines and does the editing within one.
"""

from __future__ import annotations

import asyncio
import os

READ_BYTES_MAX = 65_536
"""Most bytes taken at once; a longer line takes several turns."""


class LineReader:
    """Reads lines from a descriptor, which stays as it is: blocking, and shared with others."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = b""
        self._ended = False

    async def line(self) -> str | None:
        """The next line without its end; None when there is none left."""
        while b"\n" not in self._held and not self._ended:
            await self._readable()
            received = os.read(self._descriptor, READ_BYTES_MAX)
            self._ended = not received
            self._held += received
        line, newline, self._held = self._held.partition(b"\n")
        return line.decode("utf-8", "replace") if newline or line else None

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:  # a plain file: never waited for
            return
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)
