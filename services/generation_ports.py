"""What ``GenerationService`` needs of others: the mesh, earlier generations as they were kept, and
whoever watches requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from coordinator.events import Event, GenerationRequested
from coordinator.ports import TokenSink
from services.journal_rows import StoredGeneration


class GenerationDriver(Protocol):
    """What the edge needs of the mesh; `coordinator.driver.MeshDriver` is one."""

    def submit(self, event: GenerationRequested, sink: TokenSink) -> None:
        """Ask for a generation whose results go to ``sink``."""

    def feed(self, event: Event) -> None:
        """Tell the mesh that something happened."""


class StoredAnswers(Protocol):
    """Generations that are no longer in memory; `services.journal.Journal` is one."""

    async def read(self, request: bytes) -> StoredGeneration | None:
        """One of them, verified; None: not, or no longer, known. Raises JournalError."""

    def holds(self, request: bytes) -> bool:
        """Whether it is known."""


class AnswerSink(TokenSink, Protocol):
    """Where an answer is made; `services.answer.Answer` is one."""

    @property
    def advice(self) -> tuple[str, ...]:
        """Signals about the text of an answer that went well, from its end on."""


class GenerationObserver(Protocol):
    """Telemetry of requests. Must not block or raise. What the methods do here is what happens
    where there is none (``SilentObserver``)."""

    def request_received(
        self,
        request: bytes,
        metadata: Mapping[str, str],
        model: str,
        operation: str = "chat",
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """A call came in with this gRPC metadata; the traceparent that its frames should carry:
        the client's own, unless there is a span to be below."""
        return metadata.get("traceparent", "")

    def request_tokenized(self, request: bytes, prompt_tokens: int, seconds: float) -> None:
        """Its prompt is token ids now."""
        return

    def watch(self, request: bytes, sink: AnswerSink, *, recoveries_before: int = 0) -> TokenSink:
        """The sink to submit in the place of ``sink``. Of the recoveries that it will be told of at
        the end, the first ``recoveries_before`` were told of before."""
        return sink


class SilentObserver(GenerationObserver):
    """No telemetry."""
