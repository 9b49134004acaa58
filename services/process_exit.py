"""How a command's process ends: with its exit status, whatever threads are still about.

When CPython finalizes, a daemon thread that asks for the interpreter's lock is ended by unwinding
its stack. gRPC's pollers are such threads, with C++ frames on their stacks that may not be unwound:
now and then the process then dies of ``std::terminate``, and a mesh that drained well reports
status -6. So nothing of C++ is left to finalization: ``ExitStatus.register`` puts a hook in before
any library does. Exit hooks run last in, first out, behind the end of every thread that Python
waits for; so this one runs when all others have, and leaves at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


class ExitStatus:
    """What the process will report. A command that raises never sets it: that is a failure."""

    def __init__(self, unless_set: int = 1) -> None:
        self.value = unless_set

    @classmethod
    def register(cls) -> ExitStatus:
        """To be called before anything that registers exit hooks is imported."""
        status = cls()
        atexit.register(status._leave)
        return status

    def _leave(self) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()  # closed, or its reader is gone: nobody is left to be told
        os._exit(self.value)
