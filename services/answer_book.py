"""Answers by request, running and ended, within limits, so that a client can attach again."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.events import GenerationRequested
from services.answer import Answer
from services.request_ids import show_id
from stagemesh.errors import MeshError, Overloaded, RequestUnknown

TOKENS_KEPT_MAX = 1_000_000
"""Tokens of ended answers kept in memory, about a kilobyte each with their proofs."""
UNSEEN_SHARE = 1 / 64
"""All answers are looked through once so many of them are new: a request costs the same however
many there are, and a limit is exceeded by no more."""


@dataclass(slots=True)
class Record:
    """An answer and what the edge knows of its request. ``parameters`` identify a repeat;
    ``demand`` is what was asked of the mesh, kept as long as it may be asked again."""

    answer: Answer
    parameters: bytes
    prompt_tokens: int
    created_at_unix_ns: int
    detach: bool = False
    tokenize_s: float = 0.0
    trace_id: str = ""
    readers: int = 0
    visits: int = 0
    """Readers that ever came."""
    demand: GenerationRequested | None = None

    @property
    def failure(self) -> MeshError | None:
        """What it ended with, if it may be gone on with."""
        error = self.answer.end.error if self.answer.end is not None else None
        return error if error is not None and error.is_resumable else None


class AnswerBook:
    """Answers by request key, oldest first; ended ones are forgotten when a limit is reached."""

    def __init__(self, *, ended_max: int, tokens_max: int = TOKENS_KEPT_MAX) -> None:
        self._ended_max = ended_max
        self._tokens_max = tokens_max
        self._records: dict[bytes, Record] = {}
        self._unseen = 0

    def __len__(self) -> int:
        return len(self._records)

    def find(self, request: bytes) -> Record | None:
        """The record of a request, if it is (still) known."""
        return self._records.get(request)

    def get(self, request: bytes) -> Record:
        """The same, or RequestUnknown."""
        record = self._records.get(request)
        if record is None:
            raise RequestUnknown(
                "no such generation, or it was retired", request_id=show_id(request)
            )
        return record

    def add(self, record: Record) -> None:
        """Remember a new request; may forget ended ones. Raises Overloaded if the id is taken."""
        if record.answer.request in self._records:
            raise Overloaded("this request id is being started", retry_after_s=0.1)
        self._records[record.answer.request] = record
        self._unseen += 1
        if self._unseen >= UNSEEN_SHARE * len(self._records):
            self._unseen = 0
            self._forget()

    def remove(self, request: bytes) -> None:
        """Forget a request that was never started."""
        self._records.pop(request, None)

    def newest_first(self) -> list[Record]:
        """Every record."""
        return list(reversed(self._records.values()))

    def _forget(self) -> None:
        ended = [record for record in self._records.values() if record.answer.end is not None]
        for record in ended:
            if record.demand is not None and record.failure is None:
                record.demand = None  # prompts of what is done are not kept
        tokens = sum(len(record.answer.tokens) for record in ended)
        excess = len(ended) - self._ended_max
        for record in ended:
            if excess <= 0 and tokens <= self._tokens_max:
                return
            if record.readers == 0:
                excess -= 1
                tokens -= len(record.answer.tokens)
                del self._records[record.answer.request]
