"""Whether a step's activation is what it should be: as it came, and as it leaves.

As it came, each row's lines must be those that the stage before marked (``check_marked``). As they
leave, they are held against the band that was learnt for this boundary (``SizeCheck``). What is
wrong with a row is written into its ``Work``; nothing here raises for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from stage_worker.envelope import Envelope
from stage_worker.one_line import OneLine
from stage_worker.row_forward import Work
from stage_worker.sessions import RowFault
from stage_worker.tensors import Floats, float_view
from stagemesh.checksum import crc32c
from stagemesh.frame import FrameKind, RowStatus
from stagemesh.guards import Counters
from stagemesh.tensor import DType, Tensor

TIMED_EVERY = 8
"""Checks of sizes of which one is timed and counts for all: asking for this thread's CPU time
twice costs as much as a check of anything smaller."""


def check_marked(tensor: Tensor, works: Sequence[Work], sender: int) -> None:
    """The other half of a pair: the stage before marked each row's lines as it computed them.
    What differs now was damaged where no hop's checksum was: before it was sealed there, or
    after it was verified here. What does not is what the hop found finite on arrival."""
    lines, size = memoryview(tensor.payload), tensor.shape[1] * tensor.dtype.itemsize
    for work in works:
        marks = work.row.marks
        if not marks:
            continue
        found = crc32c(lines[work.start * size : work.stop * size])
        if found != marks[-1].output_crc32c:
            said = f"activation {found:08x} is not the {marks[-1].output_crc32c:08x} marked"
            work.fault = RowFault(RowStatus.CORRUPTED, said)
            work.fault_stage = sender


def came_so(tensor: Tensor | None, work: Work) -> bool:
    """Whether NaN or infinity was in what the row received. The hop refuses such frames, so it is
    asked only once there is a fault to be laid at somebody's door."""
    if tensor is None:
        return False
    return not bool(np.isfinite(float_view(tensor)[work.start : work.stop]).all())


class SizeCheck:
    """Holds what leaves a stage against ``envelope``, and says now and then in ``counters`` what
    that costs, in CPU time of the compute thread (``cpu_ns``), which is where it is called."""

    def __init__(
        self,
        envelope: Envelope,
        dtype: DType,
        hidden_size: int,
        counters: Counters,
        cpu_ns: Callable[[], int],
    ) -> None:
        self._counters = counters
        self._cpu_ns = cpu_ns
        self._checks = 0
        self._envelope = envelope
        self._dtype = dtype
        self._hidden_size = hidden_size
        self._one_line = OneLine(hidden_size)

    def check(self, works: Sequence[Work], kind: FrameKind) -> None:
        """All rows at once; one by one if that fails. The first probe teaches an envelope that
        knows nothing yet."""
        self._checks += 1
        if self._checks % TIMED_EVERY:
            self._check(works, kind)
            return
        began = self._cpu_ns()
        self._check(works, kind)
        spent_us = (self._cpu_ns() - began) * TIMED_EVERY // 1000
        self._counters.count("validation_us.numeric", spent_us)

    def _check(self, works: Sequence[Work], kind: FrameKind) -> None:
        payload = works[0].payload if len(works) == 1 else b"".join(w.payload for w in works)
        values = self._values(payload)
        if kind is FrameKind.PROBE and self._envelope.band is None:
            self._envelope.learn(values)
        if self._envelope.check(values)[0] is RowStatus.OK:
            return
        for work in works:
            status, detail = self._envelope.check(self._values(work.payload))
            if status is not RowStatus.OK:
                work.fault = RowFault(status, detail)

    def _values(self, payload: bytes | memoryview) -> Floats:
        size = self._hidden_size
        if self._dtype is DType.F32 and len(payload) == self._one_line.byte_count:
            return self._one_line.of(payload)
        shape = (len(payload) // (size * self._dtype.itemsize), size)
        return float_view(Tensor(self._dtype, shape, payload))
