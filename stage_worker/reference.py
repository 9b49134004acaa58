"""The independent path: mlx-lm's own model, loaded and run by mlx-lm, in one process.

Nothing here hosts a span, keeps a session or speaks of frames. A model is loaded by mlx-lm's
loader, unpacked by mlx-lm's own dequantisation, and run by mlx-lm's ``generate_step``, whose hook
for logits processors hands over the raw logits of each step. What the mesh computes with another
code path (layers cut apart, caches aliased, rows batched, prompts cut in chunks) is here one plain
call of the model. Two things are shared with the mesh on purpose, because they define what is to be
computed and are published: the drawing of a token from logits (``sampling``), and the element type.

*Taps* watch what chosen layers put out, and keep CRC32C digests of the last lines, so that a route
can be bisected by comparing what its stages said they handed on.

`free_run` generates by itself. `follow` is teacher-forced: it consumes the tokens it is given, in
chunks as a mesh would cut them, and says what it would have chosen at each.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from stage_worker import sampling
from stage_worker.tensors import Floats, to_bytes, to_floats, wire_dtype
from stagemesh.checksum import crc32c
from stagemesh.errors import InvalidConfiguration, ModelRefused
from stagemesh.sampling import SamplingSpec

CHUNK_TOKENS = 256
"""Prompt tokens per forward of a run of its own: not where a mesh cuts, on purpose. Whoever
compares the bits of a fast matrix library gives the mesh's chunk instead."""
DIGEST_LINES_MAX = 512
"""Lines of a boundary that are kept: as many prompt tokens as the last chunk may have had."""

_DTYPES = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}

Digests = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One answer index: logits float32 [vocabulary] in this context, what would be drawn from them,
    and for each tapped boundary the digests its last lines may have."""

    logits: Floats
    drawn: sampling.Draw
    digests: Digests


@dataclass(slots=True)
class Trace:
    """Steps in order. ``token_ids`` are the tokens that were drawn, not those that were given."""

    steps: list[Step] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [step.drawn.token_id for step in self.steps]


class Reference:
    """A whole model in this process. Not thread-safe."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model = model
        self.layer_count = len(model.layers)
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, directory: Path, *, dtype: str = "auto") -> Reference:
        """By mlx-lm's loader. ``dtype``: ``f32``, ``f16``, ``bf16``, ``stored`` or ``auto`` (f32 on
        a CPU, as stored elsewhere). Raises ModelRefused, InvalidConfiguration."""
        if dtype not in {"auto", "stored", *_DTYPES}:
            raise InvalidConfiguration(f"{dtype!r} is not an element type", setting="dtype")
        try:
            model, _config = mlx_lm_utils.load_model(directory, lazy=False)
            tokenizer = mlx_lm_utils.load_tokenizer(directory)
        except Exception as error:
            first_line = (str(error).strip() or repr(error)).splitlines()[0][:300]
            raise ModelRefused(f"mlx-lm cannot load this model: {first_line}") from error
        return cls(unpacked(model, dtype), tokenizer)

    @property
    def dtype(self) -> str:
        """Element type of the activations, such as ``f32``."""
        logits = self.model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(self.model))
        return wire_dtype(logits.dtype).name.lower()

    # -- running ----------------------------------------------------------------------------------

    def free_run(
        self,
        prompt: Sequence[int],
        count: int,
        spec: SamplingSpec,
        *,
        boundaries: Sequence[int] = (),
        chunk: int = CHUNK_TOKENS,
    ) -> Trace:
        """``count`` tokens behind ``prompt`` by mlx-lm's generation loop. ``boundaries`` are layer
        counts: 12 is the output of layer 11."""
        trace = Trace()
        history = list(prompt)
        with _Taps(self.model, boundaries) as taps:

            def look(_tokens: mx.array, logits: mx.array) -> mx.array:
                trace.steps.append(_step(to_floats(logits)[0], spec, history, len(prompt), taps))
                history.append(trace.steps[-1].drawn.token_id)
                return logits

            steps = generate_step(
                mx.array(list(prompt), mx.int32),
                self.model,
                # One token more is drawn than is yielded: the loop computes a step ahead.
                max_tokens=count - 1,
                logits_processors=[look],
                sampler=lambda _logprobs: mx.array([history[-1]], mx.int32),
                prefill_step_size=chunk,
            )
            for _token, _logprobs in steps:
                pass
        return trace

    def follow(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        spec: SamplingSpec,
        *,
        boundaries: Sequence[int] = (),
        chunk: int = CHUNK_TOKENS,
    ) -> Trace:
        """What would be chosen at each of ``tokens``, each consumed once it has been judged."""
        trace = Trace()
        history = list(prompt)
        cache = make_prompt_cache(self.model)
        with _Taps(self.model, boundaries) as taps:
            for first in range(0, len(prompt), chunk):
                logits = self._forward(prompt[first : first + chunk], cache)
            for token_id in tokens:
                trace.steps.append(_step(logits, spec, history, len(prompt), taps))
                history.append(token_id)
                if len(trace.steps) < len(tokens):
                    logits = self._forward([token_id], cache)
        return trace

    def _forward(self, token_ids: Sequence[int], cache: list[Any]) -> Floats:
        """Logits behind the last token."""
        output = self.model(mx.array([list(token_ids)], mx.int32), cache=cache)
        logits: Floats = to_floats(output[:, -1])[0]
        return logits

    # -- text -------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Raw text as mlx-lm's ``stream_generate`` would."""
        start = self._tokenizer.bos_token
        special = start is None or not text.startswith(start)
        return [int(one) for one in self._tokenizer.encode(text, add_special_tokens=special)]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation by the model's own template, with the cue for the assistant's turn."""
        found = self._tokenizer.apply_chat_template(
            [dict(one) for one in messages], add_generation_prompt=True, tokenize=True
        )
        ids = found["input_ids"] if isinstance(found, dict) else found
        return [int(one) for one in ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """All ids at once, by the tokenizer itself."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def unpacked(model: Any, dtype: str) -> Any:
    """``model`` in the element type ``dtype``, packed weights unpacked, in place."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    name = ("f32" if on_cpu else "stored") if dtype == "auto" else dtype
    wanted = _DTYPES.get(name)
    if wanted is None:
        return model
    # Scales first: what is unpacked is then computed in the wanted type.
    keep = getattr(model, "cast_predicate", None) if wanted != mx.float32 else None
    if keep is None:
        model.set_dtype(wanted)
    else:
        flat: Any = tree_flatten(model.parameters())
        casts = [
            (path, array.astype(wanted) if _casts(path, array, keep) else array)
            for path, array in flat
        ]
        model.update(tree_unflatten(casts))
    model = mlx_lm_utils.dequantize_model(model)
    mx.eval(model.parameters())
    return model


def _casts(path: str, array: mx.array, keep: Any) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating) and keep(path))


def _step(
    logits: Floats, spec: SamplingSpec, history: Sequence[int], prompt_length: int, taps: _Taps
) -> Step:
    drawn = sampling.draw(logits, spec, len(history), history, prompt_length)
    digests = taps.digests(every_cut=len(history) == prompt_length)
    return Step(np.array(logits, np.float32), drawn, digests)


# -- judging --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """A delivered token in the reference's eyes; see ``coordinator.validation`` for the fields."""

    token_id: int
    margin: float
    gap: float
    rank: int
    logits: tuple[float, float]
    logprobs: tuple[float, ...]
    digests: Digests


def judge_step(
    step: Step,
    spec: SamplingSpec,
    history: Sequence[int],
    prompt_length: int,
    token_id: int,
    reported: Sequence[int],
) -> Judged:
    """Judge ``token_id``, delivered behind ``history``; ``reported`` are the ids whose
    log-probabilities the mesh gave."""
    position = len(history)
    adjusted = sampling.adjust(step.logits, spec, history, prompt_length)
    verdict = sampling.judge(step.logits, spec, position, history, prompt_length, token_id)
    greedy = spec.temperature == 0.0
    scores = adjusted if greedy else sampling.perturbed(adjusted, spec, position)
    logprobs = adjusted - np.float32(_log_sum_exp(adjusted))
    chosen = step.drawn.token_id
    return Judged(
        token_id=chosen,
        margin=step.drawn.margin,
        gap=verdict.gap if verdict is not None else sampling.DISTANCE_MAX,
        rank=1 + int((scores > scores[token_id]).sum()),
        logits=(float(adjusted[token_id]), float(adjusted[chosen])),
        logprobs=tuple(max(float(logprobs[one]), -1e9) for one in reported),
        digests=step.digests,
    )


def _log_sum_exp(logits: Floats) -> float:
    top = float(logits.max())
    return top + math.log(float(np.exp((logits - top).astype(np.float64)).sum()))


# -- taps -----------------------------------------------------------------------------------------


class _Taps:
    """Watches what chosen layers put out while the block lasts."""

    def __init__(self, model: Any, boundaries: Sequence[int]) -> None:
        self._layers = [model.layers[layer - 1] for layer in boundaries]
        self._classes = [type(layer) for layer in self._layers]
        self._lines: list[deque[bytes]] = [deque(maxlen=DIGEST_LINES_MAX) for _ in boundaries]

    def __enter__(self) -> Self:
        for layer, kind, lines in zip(self._layers, self._classes, self._lines, strict=True):
            layer.__class__ = _watched(kind, lines)
        return self

    def __exit__(self, *_error: object) -> None:
        for layer, kind in zip(self._layers, self._classes, strict=True):
            layer.__class__ = kind

    def digests(self, *, every_cut: bool) -> Digests:
        """Per boundary, the CRC32C of the last line; or of the last 1, 2, 3 … lines together, as
        nobody knows where the mesh cut the prompt."""
        if not every_cut:
            return tuple((crc32c(lines[-1]),) for lines in self._lines)
        return tuple(_suffix_digests(lines) for lines in self._lines)


def _suffix_digests(lines: Sequence[bytes]) -> tuple[int, ...]:
    whole = memoryview(b"".join(lines))
    size = len(lines[-1])
    return tuple(crc32c(whole[len(whole) - count * size :]) for count in range(1, len(lines) + 1))


def _watched(base: Any, lines: deque[bytes]) -> type:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        output = base.__call__(self, *args, **options)
        kept = output[0, -DIGEST_LINES_MAX:]
        data = to_bytes(kept)
        size = len(data) // kept.shape[0]
        lines.extend(data[at : at + size] for at in range(0, len(data), size))
        return output

    return type(base.__name__, (base,), {"__call__": call})
