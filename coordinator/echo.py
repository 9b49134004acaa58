"""A model without mathematics: layers of integer hash chains, for meshes in memory.

It keeps what matters of a transformer to a pipeline: each layer has a cache with one entry per
position, each output depends on *all* cached entries before it, and the result does not depend on
how layers are split or prompts are chunked. A missing, stale, doubled or swapped entry therefore
changes every later token, so that a wrong recovery cannot hide. Honest and deterministic; nothing
in it knows about faults.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stagemesh.checksum import chain_next, chain_over, crc32c, history_digest
from stagemesh.frame import BoundaryDigest, FrameKind, RowStatus, Score, StepFrame, StepRow
from stagemesh.sampling import SamplingSpec
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk
from stagemesh.topology import COORDINATOR_HOP, WorkerInfo

VOCAB_SIZE = 997
_MASK = 2**64 - 1


def mix(first: int, second: int, third: int = 0) -> int:
    """A 64-bit hash of three integers (a splitmix finaliser)."""
    value = (first * 0x9E3779B97F4A7C15 ^ second * 0xC2B2AE3D27D4EB4F ^ third) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def embed(token_id: int, position: int) -> int:
    """What the first layer receives."""
    return mix(token_id, position, 7)


def draw(hidden: int, sampling: SamplingSpec, position: int) -> tuple[int, float]:
    """Token id and margin behind the last layer: a pure function of (seed, position, hidden)."""
    if sampling.temperature > 0:
        hidden = mix(hidden, sampling.seed, position)
    return hidden % VOCAB_SIZE, 0.25 + (hidden >> 40) % 1024 / 256


@dataclass(slots=True)
class EchoCache:
    """One request's cache on one stage: per layer one rolling entry per position."""

    layers: list[list[int]]
    sampling: SamplingSpec
    chain: bytes
    prompt_length: int = 0
    token_ids: list[int] = field(default_factory=list)
    reserved: int = 0
    pending: int | None = None
    """What the last layer said behind the last position, if a later SCORE row may need it."""
    chain_before: bytes = b""
    """Chain digest behind the token before the one drawn last."""
    chain_base: tuple[int, bytes] | None = None
    """Where the opening's chain ends, and it."""
    chain_end: int = 0

    def link_before(self, position: int) -> bytes:
        """Chain digest behind the token at ``position`` - 1; the first call fixes where the
        opening's chain ends."""
        if self.chain_base is None:
            self.chain_base, self.chain_end = (position, self.chain), position
        if position < self.chain_end:
            self.chain_end, self.chain = self.chain_base
        added = self.token_ids[self.chain_end : position]
        self.chain = chain_over(self.chain, self.chain_end, added)
        self.chain_end = position
        return self.chain

    def forward(
        self,
        first_layer: int,
        hidden: Sequence[int],
        taps: dict[int, list[int]] | None = None,
    ) -> list[int]:
        """Run new positions through this stage's layers, appending to the cache. ``taps``: its keys
        are layer boundaries whose values are wanted."""
        values = list(hidden)
        for offset, entries in enumerate(self.layers):
            layer = first_layer + offset
            for index, value in enumerate(values):
                rolling = mix(entries[-1] if entries else layer + 1, value, 1)
                entries.append(rolling)
                values[index] = mix(rolling, value, layer + 2)
            if taps and layer + 1 in taps:
                taps[layer + 1] = list(values)
        return values

    def trim(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        for entries in self.layers:
            del entries[length:]
        del self.token_ids[length:]
        self.pending = None

    @property
    def length(self) -> int:
        return len(self.token_ids)


class EchoStage:
    """One stage of one route: caches by request, one step at a time."""

    def __init__(self, info: WorkerInfo, epoch: int, stage_index: int, stage_count: int) -> None:
        self.info = info
        self.epoch = epoch
        self.stage_index = stage_index
        self.stage_count = stage_count
        self.caches: dict[bytes, EchoCache] = {}

    @property
    def is_last(self) -> bool:
        return self.stage_index == self.stage_count - 1

    @property
    def kv_tokens(self) -> int:
        return sum(cache.length for cache in self.caches.values())

    def step(self, frame: StepFrame) -> StepFrame:
        """Carry out ``frame`` and return the (not sealed) frame for the successor."""
        incoming = _unpack(frame)
        rows: list[StepRow] = []
        outgoing: list[int] = []
        for row in frame.rows:
            hidden = [incoming.pop(0) for _ in range(row.token_count)] if incoming else None
            done, values = self._row(frame, row, hidden)
            rows.append(done)
            outgoing += values or [0] * row.token_count
        return StepFrame(
            kind=frame.kind,
            fingerprint=frame.fingerprint,
            epoch=frame.epoch,
            step=frame.step,
            hop_from=self.stage_index,
            hop_to=COORDINATOR_HOP if self.is_last else self.stage_index + 1,
            rows=tuple(rows),
            tensor=None if self.is_last or not outgoing else _pack(outgoing),
            traceparent=frame.traceparent,
        )

    def _row(
        self, frame: StepFrame, row: StepRow, hidden: list[int] | None
    ) -> tuple[StepRow, list[int]]:
        if row.status is not RowStatus.OK:
            return row, []
        if frame.kind is FrameKind.CLOSE:
            self.caches.pop(row.request, None)
            return _marked(row, StageMark(0, 0, 0)), []
        if row.opening is not None:
            layers: list[list[int]] = [[] for _ in range(len(self.info.span))]
            opening = row.opening
            self.caches[row.request] = EchoCache(
                layers, opening.sampling, opening.chain, opening.prompt_length
            )
        cache = self.caches.get(row.request)
        if cache is None:
            return row.failed(RowStatus.CACHE_LOST, stage=self.stage_index), []
        if frame.kind is FrameKind.REWIND:
            return self._rewind(row, cache), []
        if cache.length != row.first_position:
            said = f"cache holds {cache.length}, row starts at {row.first_position}"
            failed = row.failed(RowStatus.POSITION_MISMATCH, stage=self.stage_index, detail=said)
            return failed, []
        return self._compute(frame, row, cache, hidden)

    def _rewind(self, row: StepRow, cache: EchoCache) -> StepRow:
        if cache.length < row.first_position:
            return row.failed(RowStatus.POSITION_MISMATCH, stage=self.stage_index)
        cache.trim(row.first_position)
        return _marked(row, StageMark(cache.length, history_digest(cache.token_ids), 0))

    def _compute(
        self, frame: StepFrame, row: StepRow, cache: EchoCache, hidden: list[int] | None
    ) -> tuple[StepRow, list[int]]:
        if hidden is None or self.stage_index == 0:
            first = row.first_position
            hidden = [embed(token, first + i) for i, token in enumerate(row.token_ids)]
        span = self.info.span
        taps: dict[int, list[int]] = {b: [] for b in row.boundaries if span.first < b <= span.last}
        values = self._forward(cache, hidden, taps)
        cache.token_ids += row.token_ids
        output = 0 if self.is_last else crc32c(struct.pack(f"<{len(values)}Q", *values))
        mark = StageMark(cache.length, history_digest(cache.token_ids), output)
        done = _marked(row, mark)
        if taps:
            done = replace(done, digests=(*row.digests, *_digests(row, taps)))
        if self.is_last and frame.kind is FrameKind.SCORE:
            done = self._score(done, cache, values)
        elif self.is_last:
            ends_prompt = row.samples or row.end_position == cache.prompt_length
            keeps = frame.kind is FrameKind.PREFILL and ends_prompt
            cache.pending = values[-1] if keeps else None
        if self.is_last and row.samples:
            done = self._sample(frame, done, cache, values[-1])
        if frame.kind is FrameKind.PROBE:
            del self.caches[row.request]
        return done, values

    def _forward(
        self, cache: EchoCache, hidden: list[int], taps: dict[int, list[int]]
    ) -> list[int]:
        return cache.forward(self.info.span.first, hidden, taps)

    def _score(self, row: StepRow, cache: EchoCache, values: list[int]) -> StepRow:
        """What would have been drawn at each position of the row."""
        cache.link_before(row.first_position)
        scores = []
        for index, token_id in enumerate(row.token_ids):
            before = values[index - 1] if index else cache.pending
            if before is not None:
                position = row.first_position + index
                reference, margin = draw(before, cache.sampling, position)
                gap = 0.0 if reference == token_id else margin
                scores.append(Score(position, token_id, reference, gap, margin))
        cache.pending = values[-1]
        return replace(row, scores=tuple(scores))

    def _sample(self, frame: StepFrame, row: StepRow, cache: EchoCache, hidden: int) -> StepRow:
        position = row.end_position
        token_id, margin = draw(hidden, cache.sampling, position)
        cache.chain_before = cache.link_before(position)
        cache.chain = chain_next(cache.chain_before, position, token_id)
        cache.chain_end = position + 1
        chunk = TokenChunk(
            request=row.request,
            position=position,
            token_id=token_id,
            epoch=frame.epoch,
            step=frame.step,
            logprob=0.0,
            margin=margin,
            sampled_at_unix_ns=0,
            source=self.info.name,
            chain=cache.chain,
        ).sealed()
        return _replace_token(row, chunk)


def oracle(
    prompt: Sequence[int],
    count: int,
    *,
    layer_count: int,
    sampling: SamplingSpec | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[int]:
    """The answer of an undisturbed run in one process, computed without stages, frames or a
    mesh."""
    sampling = sampling or SamplingSpec()
    rolling = [layer + 1 for layer in range(layer_count)]
    known: list[int] = list(prompt)
    answer: list[int] = []
    position, hidden = 0, 0
    while len(answer) < count:
        while position < len(known):
            hidden = embed(known[position], position)
            for layer in range(layer_count):
                rolling[layer] = mix(rolling[layer], hidden, 1)
                hidden = mix(rolling[layer], hidden, layer + 2)
            position += 1
        token_id, _ = draw(hidden, sampling, position)
        known.append(token_id)
        answer.append(token_id)
        if token_id in stop_token_ids:
            break
    return answer


def _marked(row: StepRow, mark: StageMark) -> StepRow:
    return StepRow(
        request=row.request,
        first_position=row.first_position,
        token_ids=row.token_ids,
        samples=row.samples,
        opening=row.opening,
        marks=(*row.marks, mark),
        traceparent=row.traceparent,
        boundaries=row.boundaries,
        digests=row.digests,
    )


def _digests(row: StepRow, taps: dict[int, list[int]]) -> list[BoundaryDigest]:
    """One per boundary and position. A hash has no size; its direction is a number made of it."""
    return [
        BoundaryDigest(
            layer,
            row.first_position + index,
            crc32c(struct.pack("<Q", value)),
            1.0,
            value % 1024 / 1024,
        )
        for layer, values in taps.items()
        for index, value in enumerate(values)
    ]


def _replace_token(row: StepRow, chunk: TokenChunk) -> StepRow:
    return StepRow(
        request=row.request,
        first_position=row.first_position,
        token_ids=row.token_ids,
        samples=row.samples,
        opening=row.opening,
        marks=row.marks,
        token=chunk,
        traceparent=row.traceparent,
        boundaries=row.boundaries,
        digests=row.digests,
    )


def _pack(values: Sequence[int]) -> Tensor:
    return Tensor(DType.I64, (len(values), 1), struct.pack(f"<{len(values)}Q", *values))


def _unpack(frame: StepFrame) -> list[int]:
    if frame.tensor is None:
        return []
    payload = bytes(frame.tensor.payload)
    return list(struct.unpack(f"<{len(payload) // 8}Q", payload))
