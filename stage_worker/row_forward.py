"""Running the rows of a step through the span: alone, side by side, or on throw-away caches.

Input and output of a row are lines of the packed tensor (see `stage`). `Work` is one row on its
way: it goes in with its place and its session, and comes out with the bytes of its activation, or
on the last stage its logits or (plain greedy on a GPU) already its token; or with a fault. Nothing
here raises for a row, and nothing here changes a session.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from stage_worker import digests, sampling
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import CacheStore, evaluate, side_by_side
from stage_worker.sampling import Draw
from stage_worker.sessions import RowFault, Session
from stage_worker.tensors import Floats, to_array, to_bytes, to_floats
from stagemesh.frame import FrameKind, RowStatus, StepRow
from stagemesh.tensor import Tensor

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Work:
    """One row being computed: row ``index`` of its step, lines ``[start, stop)`` of the packed
    tensor.

    ``fault_stage`` is set when the fault is not this stage's own. ``touched``: its cache may have
    grown. ``logits`` float32 [positions, vocabulary], for the last positions that wanted any;
    ``judging`` [vocabulary], kept from an earlier step, those that judge the row's first token.
    ``taps``: activations at the layer boundaries that the row asked for and that lie inside the
    span.
    """

    index: int
    row: StepRow
    start: int
    stop: int
    session: Session
    touched: bool = False
    payload: bytes | memoryview = b""
    logits: Floats | None = None
    judging: Floats | None = None
    draw: Draw | None = None
    taps: dict[int, mx.array | None] | None = None
    fault: RowFault | None = None
    fault_stage: int | None = None

    @property
    def is_plain(self) -> bool:
        """Wants the largest logit and nothing else."""
        return sampling.is_plain_greedy(self.session.opening.sampling)


class RowForward:
    """Runs work on one span's model and caches. ``batching``: decode rows may run side by side,
    and if they fit ``padding_room`` positions, whatever their lengths."""

    def __init__(
        self, model: SpanModel, caches: CacheStore, *, batching: bool, padding_room: int
    ) -> None:
        self._model = model
        self._caches = caches
        self._batching = batching
        self._padding_room = padding_room
        self._line_bytes = model.hidden_size * model.dtype.size
        self._reduces_on_device = mx.default_device() == mx.Device(mx.gpu)
        self.batches_split = 0
        """Batched forwards that raised and were computed row by row instead."""

    def run(self, kind: FrameKind, works: Sequence[Work], hidden: Tensor | None) -> int:
        """Compute every row that has no fault yet; returns how many ran side by side.

        ``hidden`` is the whole packed tensor [tokens of all rows, hidden], None on the first stage.
        """
        ready = [work for work in works if work.fault is None]
        batched = 0
        for group in self._groups(kind, ready):
            if len(group) > 1:
                batched += self._run_batch(group, hidden)
            else:
                self._run_alone(kind, group[0], hidden)
        return batched

    def _groups(self, kind: FrameKind, works: Sequence[Work]) -> list[list[Work]]:
        """Works that run side by side, each in the order of the step. One whose cache is lost is
        found out alone, and costs the others nothing."""
        if kind is not FrameKind.DECODE or len(works) < 2 or not self._batching:
            return [[work] for work in works]
        held = [work for work in works if work.row.request in self._caches]
        lengths = {work.row.request: work.session.length for work in held}
        lost = [[work] for work in works if work.row.request not in self._caches]
        return lost + [
            [work for work in held if work.row.request in group]
            for group in side_by_side(lengths, self._padding_room)
        ]

    # -- one row ----------------------------------------------------------------------------------

    def _run_alone(self, kind: FrameKind, work: Work, hidden: Tensor | None) -> None:
        try:
            cache = self._cache_for(kind, work)
            work.touched = True
            self._forward_one(kind, work, hidden, cache)
        except RowFault as fault:
            work.fault = fault
        except Exception as error:
            log.exception("forward failed request=%s", work.row.request.hex())
            work.fault = RowFault(RowStatus.COMPUTE_FAILED, f"{type(error).__name__}: {error}")

    def _cache_for(self, kind: FrameKind, work: Work) -> list[Any]:
        request, length = work.row.request, work.session.length
        if kind is FrameKind.PROBE:
            return self._model.make_cache()
        if request not in self._caches:
            raise RowFault(RowStatus.CACHE_LOST, "session without a cache")
        cache = self._caches.single(request, length)
        held = self._model.cache_length(cache)
        if held is not None and held != length:
            raise RowFault(
                RowStatus.POSITION_MISMATCH, f"cache object holds {held}, session {length}"
            )
        return cache

    def _forward_one(
        self, kind: FrameKind, work: Work, hidden: Tensor | None, cache: list[Any]
    ) -> None:
        tokens = mx.array([work.row.token_ids], mx.int32)
        entering = None
        if hidden is not None:
            entering = to_array(self._lines(hidden, work.start, work.stop))[None]
        if not self._model.is_last:
            work.payload = to_bytes(self._model.forward(tokens, entering, cache))
            return
        wanted = _logits_wanted(kind, work)
        if work.row.boundaries and self._model.has_taps:
            asked = digests.wanted(work.row.boundaries, 0, *(self._model.layer_count,) * 2)
            work.taps = dict.fromkeys(asked)
        output = self._model.forward(
            tokens, entering, cache, logits_last=max(wanted, 1), taps=work.taps
        )
        if wanted:
            work.logits = to_floats(output)[0]
        else:
            # A prefill chunk that yields nothing: last layer's output and head stay uncomputed.
            evaluate(cache)

    def _lines(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        payload = memoryview(tensor.payload)[start * self._line_bytes : stop * self._line_bytes]
        return Tensor(tensor.dtype, (stop - start, self._model.hidden_size), payload)

    # -- rows side by side ------------------------------------------------------------------------

    def _run_batch(self, works: Sequence[Work], hidden: Tensor | None) -> int:
        """One forward for all rows; if it raises, each row alone as if it had not been tried."""
        lengths = {work.row.request: work.session.length for work in works}
        for work in works:
            work.touched = True
        try:
            self._forward_batch(works, hidden, lengths)
        except Exception:
            log.exception("batched forward failed rows=%d; computing them one by one", len(works))
            self.batches_split += 1
            self._caches.restore(lengths)
            for work in works:
                self._run_alone(FrameKind.DECODE, work, hidden)
            return 0
        self._caches.advanced()
        return len(works)

    def _forward_batch(
        self, works: Sequence[Work], hidden: Tensor | None, lengths: dict[bytes, int]
    ) -> None:
        view = self._caches.batch(lengths)
        slots, count = view.slot_of_row, view.slot_count
        token_ids = [0] * count
        for slot, work in zip(slots, works, strict=True):
            token_ids[slot] = work.row.token_ids[0]
        tokens = mx.array(token_ids, mx.int32)[:, None]
        entering = None if hidden is None else self._seated(hidden, works, slots, count)
        output = self._model.forward(tokens, entering, view.cache)
        if self._model.is_last:
            self._take_logits(works, slots, output[:, -1])
            return
        payload = memoryview(to_bytes(output))
        size = self._line_bytes
        for slot, work in zip(slots, works, strict=True):
            work.payload = payload[slot * size : (slot + 1) * size]

    def _take_logits(self, works: Sequence[Work], slots: Sequence[int], logits: mx.array) -> None:
        if self._reduces_on_device and all(work.is_plain for work in works):
            draws = sampling.greedy_on_device(logits)
        else:
            values = to_floats(logits)
            for slot, work in zip(slots, works, strict=True):
                work.logits = values[slot : slot + 1]
            if not all(work.is_plain for work in works):
                return
            draws = sampling.greedy(values)
        for slot, work in zip(slots, works, strict=True):
            work.draw = draws[slot]

    def _seated(
        self, tensor: Tensor, works: Sequence[Work], slots: Sequence[int], slot_count: int
    ) -> mx.array:
        """The rows' lines at their slots, zeros in free slots: [slots, 1, hidden]."""
        lines = np.frombuffer(tensor.payload, np.uint8).reshape(-1, self._line_bytes)
        seated = np.zeros((slot_count, self._line_bytes), np.uint8)
        seated[list(slots)] = lines[[work.start for work in works]]
        shape = (slot_count, 1, self._model.hidden_size)
        return to_array(Tensor(tensor.dtype, shape, seated.reshape(-1).data))


def _logits_wanted(kind: FrameKind, work: Work) -> int:
    """How many of the row's last positions need logits on the last stage."""
    row = work.row
    if kind is FrameKind.SCORE:
        return row.token_count
    if kind is FrameKind.PREFILL and not row.samples:
        return int(row.end_position == work.session.opening.prompt_length)
    return 1
