"""A pipeline of real stages in one process, with places to interfere, and a full model beside it.

Frames are sealed, damaged if the fault says so, and verified on every hop as between processes. A
detector that fires is noted and then *passed over*: the stream goes on as if nobody had looked, so
that each tier is measured on every fault by itself. Only what a stage cannot compute at all (a row
it refuses) ends a stream early.

``Meddled`` stands between a stage and its model; ``OpenStage`` lets a fault at what a stage keeps
of a request. Both belong to this tool and exist nowhere in the product's path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from stage_worker.envelope import Envelope
from stage_worker.hosting import SpanModel
from stage_worker.sessions import Session
from stage_worker.stage import Stage
from stage_worker.tensors import wire_dtype
from stagemesh.checksum import chain_start
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.topology import COORDINATOR_HOP, Span

FINGERPRINT = b"detector"
EPOCH = 1
KV_BUDGET_TOKENS = 1 << 20

Meddling = Callable[[mx.array | None, mx.array], mx.array]
"""Receives what entered a span and what left it; gives what is to leave it."""


class Meddled:
    """A span's model whose output may be tampered with (``after``)."""

    def __init__(self, model: SpanModel) -> None:
        self.hosted = model
        self.after: Meddling | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hosted, name)

    def forward(
        self, tokens: mx.array, hidden: mx.array | None, cache: Sequence[Any], **options: Any
    ) -> mx.array:
        """See ``SpanModel.forward``."""
        output = self.hosted.forward(tokens, hidden, cache, **options)
        return output if self.after is None else self.after(hidden, output)

    @property
    def layers(self) -> list[Any]:
        """The mlx modules of the span's own layers."""
        span = self.hosted.span
        return list(self.hosted.layers[span.first : span.last])

    @contextmanager
    def other_weights(self, change: Callable[[list[Any]], None]) -> Iterator[None]:
        """``change`` may update parameters of the layers; they are put back afterwards."""
        layers = self.layers
        before = [dict(layer.parameters()) for layer in layers]
        try:
            change(layers)
            yield
        finally:
            for layer, parameters in zip(layers, before, strict=True):
                layer.update(parameters)


class OpenStage(Stage):
    """A stage whose requests can be looked into."""

    def cache_of(self, request: bytes) -> list[Any]:
        """The caches of a request, one per layer of this span (and companions)."""
        length = self._held.sessions.find(request).length
        return self.model.owned_cache(self._held.caches.single(request, length))

    def session_of(self, request: bytes) -> Session:
        """What it remembers of a request."""
        return self._held.sessions.find(request)

    def lose(self, request: bytes) -> None:
        """Forget a request altogether."""
        self._held.forget(request)


@dataclass
class Rig:
    """See the module. ``cuts`` are layer boundaries, ends included; ``probes`` the prompts that
    teach the envelopes."""

    directory: Path
    cuts: tuple[int, ...]
    probes: tuple[tuple[int, ...], ...]
    models: list[Meddled] = field(init=False)
    stages: list[OpenStage] = field(init=False)
    reference: Stage = field(init=False)
    envelopes: list[Envelope] = field(init=False)
    step: int = 0

    def __post_init__(self) -> None:
        spans = [Span(a, b) for a, b in zip(self.cuts, self.cuts[1:], strict=False)]
        hosted = [SpanModel.load(self.directory, span) for span in spans]
        self.models = [Meddled(one) for one in hosted]
        self.stages = [self._stage(one, str(index)) for index, one in enumerate(self.models)]
        full = SpanModel.load(self.directory, None)
        self.reference = Stage(full, name="full", kv_budget_tokens=KV_BUDGET_TOKENS, clock_ns=_zero)
        self.reference.open(EPOCH, 0, 1)
        for index, stage in enumerate(self.stages):
            stage.open(EPOCH, index, len(self.stages))
        self.envelopes = self._learn(hosted)

    @property
    def vocab_size(self) -> int:
        return int(self.reference.model.vocab_size)

    @property
    def dtype(self) -> str:
        """Element type of the activations between stages."""
        return wire_dtype(self.reference.model.dtype).name.lower()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages)

    def _stage(self, model: Any, name: str, *, numeric: bool = False) -> OpenStage:
        return OpenStage(
            model, name=name, kv_budget_tokens=KV_BUDGET_TOKENS, clock_ns=_zero, numeric=numeric
        )

    def _learn(self, hosted: Sequence[SpanModel]) -> list[Envelope]:
        """The band of each boundary, learnt as a mesh learns it: at load and from the probes."""
        stages = [
            self._stage(model, str(index), numeric=True) for index, model in enumerate(hosted)
        ]
        for index, stage in enumerate(stages):
            stage.open(EPOCH, index, len(stages))
        for number, prompt in enumerate(self.probes, 1):
            opening = RowOpening(SamplingSpec(), len(prompt), bytes(16), len(prompt))
            row = StepRow(number.to_bytes(16, "big"), 0, prompt, samples=True, opening=opening)
            frame = frame_of(FrameKind.PROBE, number, row)
            for stage in stages:
                frame = stage.step(frame)
        return [stage.envelope for stage in stages]

    def next_step(self) -> int:
        """Number of the next step of this route."""
        self.step += 1
        return self.step

    def close(self, request: bytes) -> None:
        """Free a request everywhere."""
        frame = frame_of(FrameKind.CLOSE, self.next_step(), StepRow(request, 0, ()))
        for stage in self.stages:
            frame = stage.step(frame)

    def scores(
        self, request: bytes, prompt: tuple[int, ...], spec: SamplingSpec, answer: Sequence[int]
    ) -> tuple[Any, ...]:
        """What the full model says of an answer: one score per token."""
        opening = RowOpening(
            spec, len(prompt), chain_start(request, prompt), len(prompt) + len(answer)
        )
        prefill = StepRow(request, 0, prompt, opening=opening)
        scoring = StepRow(request, len(prompt), tuple(answer))
        self.reference.step(frame_of(FrameKind.PREFILL, self.next_step(), prefill))
        done = self.reference.step(frame_of(FrameKind.SCORE, self.next_step(), scoring))
        closing = StepRow(request, 0, ())
        self.reference.step(frame_of(FrameKind.CLOSE, self.next_step(), closing))
        return done.rows[0].scores


def frame_of(kind: FrameKind, step: int, *rows: StepRow) -> StepFrame:
    """A step as the coordinator sends it."""
    return StepFrame(kind, FINGERPRINT, EPOCH, step, COORDINATOR_HOP, 0, rows)


def with_payload(frame: StepFrame, payload: bytes) -> StepFrame:
    """The same frame with other bytes in its tensor, its checksums as they were."""
    if frame.tensor is None:
        return frame
    return replace(frame, tensor=replace(frame.tensor, payload=payload))


def _zero() -> int:
    return 0
