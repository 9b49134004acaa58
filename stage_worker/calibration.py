"""What a stage finds out about its span before it serves: does batching agree, and how large are
outputs?

Both run real forwards on fixed input at load. Batching is only claimed when rows side by side come
out as they do alone, so a model whose attention, rope or state handles the batch axis in its own
way is served row by row rather than wrongly.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import mlx.core as mx

from stage_worker.envelope import Envelope
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import CacheStore, can_batch, evaluate
from stage_worker.tensors import to_floats
from stagemesh.checksum import CHAIN_BYTES
from stagemesh.sampling import RowOpening, SamplingSpec

log = logging.getLogger(__name__)

_LENGTHS = {b"calibration.row1": 1, b"calibration.row2": 3}
"""Two requests of different length, so that one row is padded."""
_TOLERANCE = {mx.float32: 1e-3, mx.float16: 3e-2, mx.bfloat16: 1e-1}
"""Largest relative difference (root mean square) between a row in a batch and alone."""
_OUTPUT_TOKENS = 48
"""Tokens whose activations teach the envelope."""


def probe_opening(prompt_length: int) -> RowOpening:
    """Greedy, no reserve, an all-zero chain: for probe rows that bring no opening."""
    return RowOpening(SamplingSpec(), prompt_length, bytes(CHAIN_BYTES), 0)


def learn_output(model: SpanModel, envelope: Envelope) -> None:
    """Teach ``envelope`` the activations of a first stage for tokens from all over the
    vocabulary."""
    ids = [(i * 7919 + 13) % model.vocab_size for i in range(_OUTPUT_TOKENS)]
    output = model.forward(mx.array([ids], mx.int32), None, model.make_cache())
    envelope.learn(to_floats(output)[0])


def batching_agrees(model: SpanModel) -> bool:
    """Whether decode rows of this span may run side by side."""
    if not (model.batchable and can_batch(model.make_owned_cache())):
        return False
    try:
        difference = _difference(model)
    except Exception:
        log.exception("batched forward fails; decode rows will run one by one")
        return False
    if not difference <= _TOLERANCE.get(model.dtype, 1e-3):
        log.warning("batched rows differ by %.2g; decode rows will run one by one", difference)
        return False
    return True


def _difference(model: SpanModel) -> float:
    """Largest relative difference between rows of a batched decode step and the same rows alone."""
    store = CacheStore(model)
    alone: dict[bytes, list[Any]] = {}
    for request, length in _LENGTHS.items():
        store.open(request)
        cache = store.single(request, 0)
        model.forward(_tokens(model, 1, length), _activation(model, 1, length), cache)
        evaluate(cache)
        alone[request] = model.wrap_cache(copy.deepcopy(model.owned_cache(cache)))
    view = store.batch(_LENGTHS)
    tokens, hidden = _tokens(model, view.slot_count, 1), _activation(model, view.slot_count, 1)
    together = model.forward(tokens, hidden, view.cache)
    worst = 0.0
    for slot, request in zip(view.slot_of_row, _LENGTHS, strict=True):
        row = slice(slot, slot + 1)
        entering = None if hidden is None else hidden[row]
        single = model.forward(tokens[row], entering, alone[request])
        worst = max(worst, _relative(single, together[row]))
    return worst


def _tokens(model: SpanModel, rows: int, count: int) -> mx.array:
    ids = [[(7 * i + 3 * r + 5) % model.vocab_size for i in range(count)] for r in range(rows)]
    return mx.array(ids, mx.int32)


def _activation(model: SpanModel, rows: int, count: int) -> mx.array | None:
    if model.is_first:
        return None
    shape = (rows, count, model.hidden_size)
    return (0.5 * mx.random.normal(shape, key=mx.random.key(7))).astype(model.dtype)


def _relative(reference: mx.array, other: mx.array) -> float:
    left, right = reference.astype(mx.float32), other.astype(mx.float32)
    scale = mx.maximum(mx.sqrt(mx.mean(left * left)), 1e-9)
    return float((mx.sqrt(mx.mean((left - right) ** 2)) / scale).item())  # type: ignore[arg-type]
