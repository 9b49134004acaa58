"""How a process of the mesh ends: on a signal, with its parent, or on its own.

SIGTERM and SIGINT ask for an orderly end, once; a second signal ends at once. A process that a
supervisor started must not outlive it, even when the supervisor is killed with -9 and can tell
nobody. Two means, because neither is enough: on Linux the kernel sends SIGTERM when the parent
dies, and everywhere the supervisor holds the writing end of a pipe whose end-of-file a thread waits
for. If the orderly end then takes longer than ``ORPHAN_GRACE_S``, the process ends without it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

ORPHAN_GRACE_S = 5.0
"""Nobody waits for an orphan's work: it may say good-bye, no more."""
EXIT_ORPHANED = 70
EXIT_INTERRUPTED = 130

_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


class StopSignal:
    """Set once by a signal, by the parent's death or by the process itself; ``wait`` for it.

    Belongs to one event loop. ``orphaned`` tells that there is nobody left to finish work for.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self.reason = ""
        self.orphaned = False

    def set(self, reason: str) -> None:
        """Ask for the end; only the first reason counts."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    async def wait(self) -> str:
        """The reason, once there is one."""
        await self._event.wait()
        return self.reason

    def listen_to_signals(self) -> None:
        """SIGTERM and SIGINT ask for an orderly end; the second one ends at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        if self._event.is_set():
            os._exit(EXIT_INTERRUPTED)
        self.set(signal.Signals(number).name)

    def follow_parent(self, pipe: int = -1) -> None:
        """End with the parent. ``pipe``: descriptor whose end-of-file means that it died; -1 is
        none.
        """
        if pipe < 0:
            return
        _ask_kernel()
        watcher = threading.Thread(
            target=_wait_for_end_of_file, args=(pipe, self._on_orphaned), daemon=True, name="parent"
        )
        watcher.start()

    def _on_orphaned(self) -> None:
        """Runs on the watcher's thread."""
        try:
            self._loop.call_soon_threadsafe(self._note_orphaned)
        except RuntimeError:
            os._exit(EXIT_ORPHANED)  # The loop is closed: the process is past its orderly end.
        deadline = threading.Timer(ORPHAN_GRACE_S, os._exit, (EXIT_ORPHANED,))
        deadline.daemon = True
        deadline.start()

    def _note_orphaned(self) -> None:
        self.orphaned = True
        self.set("the parent process is gone")


def _ask_kernel() -> None:
    """Have Linux send SIGTERM when the parent dies; elsewhere, and if refused, the pipe is
    enough.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        _log.debug("PR_SET_PDEATHSIG refused: %s", os.strerror(ctypes.get_errno()))


def _wait_for_end_of_file(pipe: int, then: Callable[[], None]) -> None:
    try:
        while os.read(pipe, 64):
            pass
    except OSError as error:
        _log.warning("parent pipe %d cannot be read: %s", pipe, error.strerror)
        return
    then()
