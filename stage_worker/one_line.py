"""The values of one token, looked at without making an array for them.

A decode step brings one token, and what is asked of it is one product. Making an array over its
bytes costs more than that product, behind a forward above all, when nothing of numpy is in a cache.
So there is one array, and the bytes are copied into it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class OneLine:
    """Room for one token of ``size`` float32 elements. For one thread; what ``of`` returned is
    overwritten by the next call."""

    __slots__ = ("_bytes", "_values", "byte_count")

    def __init__(self, size: int) -> None:
        self._values: npt.NDArray[np.float32] = np.empty((1, size), np.float32)
        self._bytes = self._values.data.cast("B")
        self.byte_count = self._bytes.nbytes

    def of(self, payload: bytes | memoryview) -> npt.NDArray[np.float32]:
        """float32 [1, size] with these bytes, of which there must be ``byte_count``."""
        self._bytes[:] = payload
        return self._values
