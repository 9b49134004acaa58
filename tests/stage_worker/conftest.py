"""A tiny llama and a route of real stages in one process, frames sealed and verified between
them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import llama

from stage_worker.hosting import SpanModel
from stage_worker.stage import Stage
from stagemesh.checksum import chain_over, chain_start
from stagemesh.frame import FrameKind, StepFrame, StepRow, verify
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.topology import Span

FINGERPRINT = b"mesh-001"

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 199,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def key(name: str) -> bytes:
    """A 16-byte request id."""
    return name.encode().ljust(16, b".")


@dataclass
class Pipeline:
    """Stages of one route; `send` passes a step through all of them, as the links would."""

    stages: list[Stage]
    epoch: int = 1
    next_step: int = 1
    hops: list[StepFrame] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, stage in enumerate(self.stages):
            stage.open(self.epoch, index, len(self.stages))

    def send(
        self, kind: FrameKind, rows: Sequence[StepRow], *, alter: Callable[..., Any] | None = None
    ) -> StepFrame:
        """``alter(frame)`` may return another frame for each hop after the first stage."""
        frame = StepFrame(kind, FINGERPRINT, self.epoch, self.next_step, -1, 0, tuple(rows))
        self.next_step += 1
        self.hops = []
        for stage in self.stages:
            frame = frame.sealed()
            verify(frame, fingerprint=FINGERPRINT)
            self.hops.append(frame)
            frame = stage.step(frame)
            if alter is not None and frame.hop_to >= 0:
                frame = alter(frame)
        frame = frame.sealed()
        verify(frame, fingerprint=FINGERPRINT)
        return frame

    def generate(
        self,
        name: str,
        prompt: Sequence[int],
        count: int,
        spec: SamplingSpec | None = None,
        *,
        accepted: Sequence[int] = (),
        chunk: int = 512,
    ) -> list[int]:
        """Greedy (or ``spec``) continuation of prompt + accepted, one request alone in each
        step."""
        tokens = [*prompt, *accepted]
        found = [self.prefill(name, prompt, spec, accepted=accepted, chunk=chunk).token.token_id]
        while len(found) < count:
            row = StepRow(key(name), len(tokens) + len(found) - 1, (found[-1],), samples=True)
            answer = self.send(FrameKind.DECODE, [row]).rows[0]
            assert answer.token is not None, answer
            found.append(answer.token.token_id)
        return found

    def prefill(
        self,
        name: str,
        prompt: Sequence[int],
        spec: SamplingSpec | None = None,
        *,
        accepted: Sequence[int] = (),
        chunk: int = 512,
        samples: bool = True,
    ) -> Any:
        """Prefill in chunks; the last row as it came back."""
        tokens = (*prompt, *accepted)
        opening = opening_for(name, prompt, spec, accepted=accepted)
        row = None
        for first in range(0, len(tokens), chunk):
            ids = tokens[first : first + chunk]
            ends = first + len(ids) == len(tokens)
            row = StepRow(key(name), first, ids, samples and ends, opening if first == 0 else None)
            row = self.send(FrameKind.PREFILL, [row]).rows[0]
            assert row.status == 0, row
        return row

    def decode(self, wanted: dict[str, tuple[int, int]]) -> StepFrame:
        """One decode step: name → (position, token id)."""
        rows = [StepRow(key(n), p, (t,), samples=True) for n, (p, t) in wanted.items()]
        return self.send(FrameKind.DECODE, rows)


def opening_for(
    name: str,
    prompt: Sequence[int],
    spec: SamplingSpec | None = None,
    *,
    accepted: Sequence[int] = (),
    reserve: int = 64,
) -> RowOpening:
    """What the coordinator sends with the first row."""
    chain = chain_over(chain_start(key(name), prompt), len(prompt), accepted)
    return RowOpening(spec or SamplingSpec(), len(prompt), chain, reserve)


@pytest.fixture(scope="session")
def tiny_llama() -> llama.Model:
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(TINY_LLAMA))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def spans_of_llama(tiny_llama: llama.Model) -> Callable[[tuple[int, ...]], list[SpanModel]]:
    """Hosted spans for cut points, shared: a SpanModel keeps no state of a request."""
    hosted: dict[tuple[int, int], SpanModel] = {}

    def build(cuts: tuple[int, ...]) -> list[SpanModel]:
        for ends in itertools.pairwise(cuts):
            if ends not in hosted:
                hosted[ends] = SpanModel.from_model(tiny_llama, TINY_LLAMA, Span(*ends))
        return [hosted[ends] for ends in itertools.pairwise(cuts)]

    return build


@pytest.fixture(scope="session")
def pipeline(spans_of_llama: Any) -> Callable[..., Pipeline]:
    """``pipeline(0, 3, 6)``: a route of two stages over the tiny llama."""

    def build(*cuts: int, budget: int = 4096, numeric: bool = True, epoch: int = 1) -> Pipeline:
        stages = [
            Stage(
                model,
                name=f"worker-{index}",
                kv_budget_tokens=budget,
                clock_ns=lambda: 1_700_000_000_000_000_000,
                numeric=numeric,
            )
            for index, model in enumerate(spans_of_llama(cuts or (0, 6)))
        ]
        return Pipeline(stages, epoch)

    return build


@pytest.fixture
def rig() -> Any:
    """The helpers above, for test files (which are not importable from one another)."""
    return SimpleNamespace(
        key=key,
        opening_for=opening_for,
        Pipeline=Pipeline,
        TINY_LLAMA=TINY_LLAMA,
        FINGERPRINT=FINGERPRINT,
    )
