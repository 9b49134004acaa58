"""Computing one step of every kind before anybody waits for it.

A GPU's kernels are compiled when a shape first needs them: seconds each, twenty for a quantized
product. To a coordinator, a step that takes twenty seconds is a stage that hangs. So a worker whose
device compiles computes, before it registers, what requests will ask of it: probes whose lengths
double (products are tiled by how many rows they have), a prefill in two chunks, a score, and
decode steps of several rows. On a CPU nothing is compiled, and nothing is done (`compiles_late`).

It goes through `Stage.step`, as every request does, on a stage of its own: caches, counters and
envelope are thrown away with it. What enters a span that does not begin with the embedding is
noise, so a row that comes back outsized or not finite says nothing; one whose forward raised says
that requests would fare no better.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from stage_worker.calibration import probe_opening
from stage_worker.hosting import SpanModel
from stage_worker.stage import Stage
from stage_worker.tensors import to_tensor
from stagemesh.errors import ComputeFailed
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.tensor import Tensor

PROBE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHUNK_TOKENS = 16
PROMPT_TOKENS = 4
"""Of each request that decodes."""
ROWS = (1, 2, 4, 8, 16)
POSITIONS_PER_REQUEST = 256
"""What a cache takes at least, however few positions it holds."""
WORTH_TELLING_S = 1.0

_KV_TOKENS = POSITIONS_PER_REQUEST * (ROWS[-1] + 1)
_EPOCH = 1
_CHUNKED = b"warm-up.chunked."
_PROBE = b"warm-up.probe..."

log = logging.getLogger(__name__)

Planned = tuple[FrameKind, list[StepRow]]


def compiles_late() -> bool:
    """Whether this process's device compiles kernels at their first use."""
    return mx.default_device().type != mx.DeviceType.cpu


def warm_up(
    model: SpanModel,
    *,
    kv_budget_tokens: int,
    tell: Callable[[str], None] = log.info,
    now: Callable[[], float] = time.monotonic,
) -> int:
    """Compute every kind of step once; returns how many steps. ``tell`` hears of slow ones and of
    the end. Raises ComputeFailed."""
    began, count = now(), 0
    scratch = Stage(
        model, name="warm-up", kv_budget_tokens=_KV_TOKENS, clock_ns=lambda: 0, numeric=False
    )
    try:
        scratch.open(_EPOCH, *_place(model))
        for count, (kind, rows) in enumerate(_plan(model, _rows_max(kv_budget_tokens)), start=1):
            begun = now()
            _compute(scratch, count, kind, rows)
            if (took_s := now() - begun) >= WORTH_TELLING_S:
                tell(f"first {_said(kind, rows)}: {took_s:.1f} s")
    finally:
        scratch.fence(_EPOCH)
    tell(f"warmed up with {count} steps in {now() - began:.1f} s")
    return count


def _place(model: SpanModel) -> tuple[int, int]:
    """Index and number of stages on some route that the span fits."""
    before, behind = not model.is_first, not model.is_last
    return int(before), 1 + before + behind


def _rows_max(kv_budget_tokens: int) -> int:
    """As many as the worker has promised memory for."""
    return max(1, min(ROWS[-1], kv_budget_tokens // POSITIONS_PER_REQUEST))


def _plan(model: SpanModel, rows_max: int) -> Iterator[Planned]:
    """The steps, in order. None needs to know what another came to."""
    span = model.span
    boundaries = tuple(range(span.first + 1, span.last + 1))
    for count in PROBE_TOKENS:
        yield FrameKind.PROBE, [_row(model, _PROBE, 0, count, boundaries=boundaries)]
    for first in (0, CHUNK_TOKENS):
        row = _row(model, _CHUNKED, first, CHUNK_TOKENS, prompt=2 * CHUNK_TOKENS)
        yield FrameKind.PREFILL, [row]
    if model.is_last:
        yield FrameKind.SCORE, [_row(model, _CHUNKED, 2 * CHUNK_TOKENS, CHUNK_TOKENS)]
    lengths = {b"warm-up.row%05d" % number: 0 for number in range(rows_max)}
    yield FrameKind.PREFILL, _grown(model, lengths, rows_max, PROMPT_TOKENS)
    for count in ROWS:
        if count <= rows_max:
            yield FrameKind.DECODE, _grown(model, lengths, count, 1)


def _grown(model: SpanModel, lengths: dict[bytes, int], rows: int, count: int) -> list[StepRow]:
    """The next ``count`` tokens of the first ``rows`` requests."""
    made = []
    for request in list(lengths)[:rows]:
        made.append(_row(model, request, lengths[request], count, prompt=PROMPT_TOKENS))
        lengths[request] += count
    return made


def _row(
    model: SpanModel,
    request: bytes,
    first: int,
    count: int,
    *,
    prompt: int = 0,
    boundaries: tuple[int, ...] = (),
) -> StepRow:
    """``count`` tokens from all over the vocabulary."""
    ids = tuple((7919 * place + 13) % model.vocab_size for place in range(first, first + count))
    opening = probe_opening(prompt) if prompt and not first else None
    samples = first + count >= prompt
    return StepRow(request, first, ids, samples, opening, boundaries=boundaries)


def _compute(stage: Stage, step: int, kind: FrameKind, rows: list[StepRow]) -> None:
    place = stage.stage_index
    tensor = _noise(stage.model, sum(row.token_count for row in rows)) if place else None
    frame = StepFrame(kind, b"", stage.epoch, step, place - 1, place, tuple(rows), tensor)
    for row in stage.step(frame).rows:
        if row.status is RowStatus.COMPUTE_FAILED:
            raise ComputeFailed(f"the first {_said(kind, rows)} failed: {row.fault_detail}")


def _noise(model: SpanModel, lines: int) -> Tensor:
    noise = mx.random.normal((lines, model.hidden_size), key=mx.random.key(7))
    return to_tensor((0.5 * noise).astype(model.dtype))


def _said(kind: FrameKind, rows: list[StepRow]) -> str:
    """``decode of 4 rows``, ``prefill of 16 tokens``."""
    if kind is FrameKind.DECODE:
        return f"decode of {len(rows)} rows"
    return f"{kind.name.lower()} of {sum(row.token_count for row in rows)} tokens"
