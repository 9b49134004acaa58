"""Stop strings that never leak, not even in part. Pure.

Text arrives in pieces that know nothing of stop strings. A piece's end that could be the beginning
of a stop string is held back until more text decides. The match that is *completed* first ends the
answer, and of several completed by the same character the longest, which is what reading one
character at a time would find: the result does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Released:
    """Text that may be shown, and the stop string that was found behind it (``""``: none)."""

    text: str
    matched: str = ""


class StopStrings:
    """Watches one answer. Empty stop strings are refused by the edge and ignored here."""

    __slots__ = ("_held", "_matched", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._held = ""
        self._matched = ""

    @property
    def held(self) -> str:
        """Text that is not shown because a stop string may begin in it."""
        return self._held

    def feed(self, text: str) -> Released:
        """Add text; after a match nothing is released any more."""
        if self._matched:
            return Released("", self._matched)
        whole = self._held + text
        found = self._first_match(whole)
        if found is not None:
            start, self._matched = found
            self._held = ""
            return Released(whole[:start], self._matched)
        cut = len(whole) - self._undecided(whole)
        self._held = whole[cut:]
        return Released(whole[:cut])

    def finish(self) -> Released:
        """No more text will come: what was held back was no stop string."""
        text, self._held = self._held, ""
        return Released("" if self._matched else text, self._matched)

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = (
            (at + len(stop), -len(stop), stop)
            for stop in self._stops
            if (at := text.find(stop)) >= 0
        )
        best = min(matches, default=None)
        return None if best is None else (best[0] - len(best[2]), best[2])

    def _undecided(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
