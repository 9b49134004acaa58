"""When a process looks for reference cycles: little at a time while it works, at everything when it
has nothing else to do.

Python's collector looks at what is new (generation 0) and, after so many such looks, at all that
has survived one. A look takes up to a microsecond for each object there is, and every stream waits
for it. A coordinator keeps some ten objects for each token it has sent, so it must not look at old
ones while it makes tokens: one such look was a pause of 400 ms each 40,000 tokens. Hardly anything
here is cyclic (a handful of gRPC's own objects for each call, and nearly all of those are found
while they are new), so what survives may wait for a quiet moment.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

COLLECT_OBJECTS = 500
"""New container objects before the collector looks at them. Every token kept makes a handful, and
looking takes about a microsecond each, because they have left the processor's caches: this is a
pause of half a millisecond, and 50,000 would be one of 50, felt by every stream."""
COLLECT_OLDER = (200_000, 10)
"""Looks at new objects before older ones are looked at in the middle of work: an hour at full
load, and for a process that is never quiet only."""
LOOKS_BEFORE_OLDER = 2_000
"""Looks at new objects that make it worth looking at everything when it is quiet."""
QUIET_S = 0.5
"""It is quiet when nothing was to be done at two moments that far apart."""


def calm_collector() -> None:
    """Look at new objects only, from now on; call once everything is loaded, which is never looked
    at again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_OBJECTS, *COLLECT_OLDER)


async def collect_when_quiet(is_quiet: Callable[[], bool], *, quiet_s: float = QUIET_S) -> None:
    """Look at everything whenever that is due and ``is_quiet``. Until cancelled."""
    was_quiet = False
    while True:
        await asyncio.sleep(quiet_s)
        quiet = is_quiet()
        if quiet and was_quiet and gc.get_count()[1] >= LOOKS_BEFORE_OLDER:
            gc.collect()
        was_quiet = quiet
