"""How much may be on the wire unacknowledged: a number of frames and a number of bytes.

A sender adds each step it puts on the wire and frees them cumulatively when they are acknowledged.
What does not fit waits in the sender's ledger, so that a slow receiver slows its sender instead of
filling its memory. A frame larger than ``bytes_max`` may travel alone: an empty window always fits
one frame, or a long prefill could never be sent.

Invariant: ``frames <= frames_max``, and ``size <= bytes_max`` whenever more than one frame is in
flight.
"""

from __future__ import annotations

from collections import deque


class InflightWindow:
    """Steps in flight, in increasing order. Misuse raises ValueError: it is a bug, not an event."""

    __slots__ = ("_entries", "bytes_max", "frames_max", "size")

    def __init__(self, *, frames_max: int, bytes_max: int) -> None:
        self._entries: deque[tuple[int, int]] = deque()
        self.size = 0
        """Bytes in flight."""
        self.resize(frames_max=frames_max, bytes_max=bytes_max)

    def resize(self, *, frames_max: int, bytes_max: int) -> None:
        """New bounds; what is in flight stays, and nothing is added until it fits again."""
        if frames_max < 1 or bytes_max < 1:
            raise ValueError(
                f"a window of {frames_max} frames and {bytes_max} bytes admits nothing"
            )
        self.frames_max = frames_max
        self.bytes_max = bytes_max

    def fits(self, size: int) -> bool:
        """Whether a frame of ``size`` bytes may be added now."""
        if not self._entries:
            return True
        return len(self._entries) < self.frames_max and self.size + size <= self.bytes_max

    def add(self, step: int, size: int) -> None:
        """Put ``step`` in flight. Raises ValueError if it does not fit or is not behind the last
        one."""
        if size < 0:
            raise ValueError(f"step {step} has a negative size")
        if self._entries and step <= self._entries[-1][0]:
            raise ValueError(f"step {step} added behind step {self._entries[-1][0]}")
        if not self.fits(size):
            raise ValueError(f"step {step} of {size} bytes does not fit {self}")
        self._entries.append((step, size))
        self.size += size

    def free_through(self, step: int) -> int:
        """Take every step up to and including ``step`` out of flight; returns how many there
        were."""
        freed = 0
        while self._entries and self._entries[0][0] <= step:
            self.size -= self._entries.popleft()[1]
            freed += 1
        return freed

    def clear(self) -> None:
        """Nothing is in flight any more: the connection it was on is gone."""
        self._entries.clear()
        self.size = 0

    @property
    def frames(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Not even an empty frame may be added."""
        return not self.fits(0)

    def __str__(self) -> str:
        return f"window {self.frames}/{self.frames_max} frames {self.size}/{self.bytes_max} B"
