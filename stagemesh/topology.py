"""Who hosts what: spans of layers, workers, and routes through them.

A *span* is a half-open range of layers. A *worker* hosts one span; a worker whose span is every
layer is a *full worker* and nothing else distinguishes it. A *route* is an ordered tuple of workers
whose spans cover every layer exactly once, opened at an *epoch*, a number that only grows.
``stage_index`` 0 is the stage with the first layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NewType

from stagemesh.errors import InvalidConfiguration

WorkerName = NewType("WorkerName", str)
Epoch = NewType("Epoch", int)

EXACT = "exact"
"""Capability of a worker whose kernels are bit-exact: equal rows give equal bits however they are
batched, chunked or split."""
COORDINATOR_HOP = -1
"""Hop index of the coordinator, which stands before stage 0 and behind the last stage."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Layers ``[first, last)``; ``0 <= first < last``."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.last:
            raise InvalidConfiguration(f"span {self.first}-{self.last} is empty or negative")

    def __len__(self) -> int:
        return self.last - self.first

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, text: str) -> Span:
        """``"0-12"`` means layers 0 to 11. Raises InvalidConfiguration."""
        first, dash, last = text.strip().partition("-")
        if not (dash and first.isdecimal() and last.isdecimal()):
            raise InvalidConfiguration(f"span {text!r} is not FIRST-LAST", setting="span")
        return cls(int(first), int(last))


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself when it registers.

    ``fingerprint`` is the SHA-256 (hex) over the whole model it was given: config, every tensor's
    digest, tokenizer. ``span_fingerprint`` covers the tensors it actually holds.
    ``kv_budget_tokens`` is the number of cached positions it has memory for.
    """

    name: WorkerName
    address: str
    span: Span
    layer_count: int
    fingerprint: str
    span_fingerprint: str
    dtype: str
    pid: int = 0
    instance: str = ""
    """Unique per process start: a restarted worker has the same name and another instance."""
    kv_budget_tokens: int = 0
    memory_bytes: int = 0
    capabilities: frozenset[str] = field(default_factory=frozenset)

    @property
    def is_full(self) -> bool:
        return self.span.first == 0 and self.span.last == self.layer_count


@dataclass(frozen=True, slots=True)
class Route:
    """Workers in stage order at one epoch. ``fingerprint8`` is what every frame carries."""

    epoch: Epoch
    workers: tuple[WorkerInfo, ...]

    @property
    def stage_count(self) -> int:
        return len(self.workers)

    @property
    def fingerprint8(self) -> bytes:
        return bytes.fromhex(self.workers[0].fingerprint)[:8]

    @property
    def names(self) -> tuple[WorkerName, ...]:
        return tuple(worker.name for worker in self.workers)

    def __str__(self) -> str:
        return f"route epoch={self.epoch} " + "→".join(f"{w.name}[{w.span}]" for w in self.workers)
