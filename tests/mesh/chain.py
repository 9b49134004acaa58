"""A route of real stages in one process: frames sealed, encoded, decoded and verified on each hop.

Nothing is left out between the stages but the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.codec import decode_request, encode_frame
from stage_worker.hosting import SpanModel
from stage_worker.stage import Stage
from stagemesh.checksum import chain_start
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow, verify
from stagemesh.parts import PartedFrame
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.tensor import Tensor
from stagemesh.token import TokenChunk

FINGERPRINT = b"chain-01"
GREEDY = SamplingSpec()
WALL_CLOCK_NS = 1_700_000_000_000_000_000


def over_the_wire(frame: StepFrame) -> StepFrame:
    """``frame`` as the next hop gets it: sealed, encoded (in parts if it is large), decoded,
    verified."""
    messages = [decode_request(data) for data in encode_frame(frame.sealed(), check=True)]
    head = messages[0]
    if isinstance(head, PartedFrame):
        data = b"".join(bytes(part.data) for part in messages[1:])
        tensor = head.frame.tensor
        assert tensor is not None
        whole = Tensor(tensor.dtype, tensor.shape, data)
        object.__setattr__(head.frame, "tensor", whole)
        head = head.frame
    verify(head, fingerprint=FINGERPRINT)
    return head


@dataclass(frozen=True)
class Question:
    """One request: a prompt, how many tokens, how they are drawn."""

    prompt: tuple[int, ...]
    count: int
    spec: SamplingSpec = GREEDY


@dataclass
class Chain:
    """Stages of one route; requests side by side in shared decode steps."""

    stages: list[Stage]
    chunk: int = 256
    next_step: int = 1

    @property
    def rows_batched(self) -> list[int]:
        """Rows that each stage has computed side by side with others."""
        return [stage.stage_counters["rows_batched"] for stage in self.stages]

    @classmethod
    def of(cls, models: Sequence[SpanModel], *, chunk: int = 256) -> Chain:
        stages = [
            Stage(
                model,
                name=f"stage-{index}",
                kv_budget_tokens=1 << 20,
                clock_ns=lambda: WALL_CLOCK_NS,
            )
            for index, model in enumerate(models)
        ]
        for index, stage in enumerate(stages):
            stage.open(1, index, len(stages))
        return cls(stages, chunk)

    def send(self, kind: FrameKind, rows: Sequence[StepRow]) -> StepFrame:
        frame = StepFrame(kind, FINGERPRINT, 1, self.next_step, -1, 0, tuple(rows))
        self.next_step += 1
        for stage in self.stages:
            frame = stage.step(over_the_wire(frame))
        return over_the_wire(frame)

    def answer(self, questions: Sequence[Question]) -> list[list[TokenChunk]]:
        """Every question's tokens; all that still want some share each decode step."""
        keys = [index.to_bytes(16, "big") for index in range(len(questions))]
        found = [
            [self._prefill(key, question)] for key, question in zip(keys, questions, strict=True)
        ]
        while True:
            rows, owners = [], []
            for index, question in enumerate(questions):
                if len(found[index]) < question.count:
                    last = found[index][-1]
                    rows.append(StepRow(keys[index], last.position, (last.token_id,), samples=True))
                    owners.append(index)
            if not rows:
                break
            for index, row in zip(owners, self.send(FrameKind.DECODE, rows).rows, strict=True):
                found[index].append(_token(row))
        self.send(FrameKind.CLOSE, [StepRow(key, 0, ()) for key in keys])
        return found

    def _prefill(self, key: bytes, question: Question) -> TokenChunk:
        prompt = question.prompt
        opening = RowOpening(
            question.spec,
            len(prompt),
            chain_start(key, prompt),
            len(prompt) + question.count,
        )
        row = StepRow(key, 0, ())
        for first in range(0, len(prompt), self.chunk):
            ids = prompt[first : first + self.chunk]
            ends = first + len(ids) == len(prompt)
            row = StepRow(key, first, ids, ends, opening if first == 0 else None)
            row = self.send(FrameKind.PREFILL, [row]).rows[0]
            assert row.status is RowStatus.OK, row
        return _token(row)


def _token(row: StepRow) -> TokenChunk:
    assert row.status is RowStatus.OK, row
    assert row.token is not None
    return row.token
