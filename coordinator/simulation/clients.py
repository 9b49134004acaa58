"""Clients and what they check: each knows the answer beforehand.

A client submits at its time, may cancel, may stop at a token it was looking for (as the edge does
at a stop string), may come back for an answer that failed, and holds every response against the
oracle's answer at once. It is the mesh's ``TokenSink``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator import instructions as do
from coordinator.echo import oracle
from coordinator.events import Delivery, GenerationRequested
from coordinator.simulation.watch import Watch
from stagemesh.checksum import chain_next, chain_over, chain_start
from stagemesh.errors import MeshError, RouteUnavailable
from stagemesh.token import TokenChunk, ValidationStatus


@dataclass(slots=True)
class Client:
    """One request. ``stop_at``: cancel with a stop match behind this many tokens; ``cancel_after``
    likewise, as a client that goes away."""

    demand: GenerationRequested
    arrives_at: float
    layer_count: int
    watch: Watch
    cancel_after: int | None = None
    stop_at: int | None = None
    must_succeed: bool = False
    resumes: int = 0
    """How often it comes back for an answer that failed."""
    returning: bool = False
    """It will."""
    must_find_route: bool = False
    """It came back to a mesh that is whole."""
    misled: bool = False
    """A stage computed something wrong: only what is verified can still be held to be right."""
    on_token: Callable[[Client], None] = lambda client: None
    wanted: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    end: do.FinishRequest | do.FailRequest | None = None
    on_failure: Callable[[Client], None] = lambda client: None
    submitted: bool = False
    cancelled: bool = False
    stopped: bool = False
    stop_kept: int = 0
    ended_at: float = 0.0
    verified_through: int = 0
    _chain: bytes = b""

    def __post_init__(self) -> None:
        demand = self.demand
        self.wanted = oracle(
            demand.prompt,
            demand.max_tokens,
            layer_count=self.layer_count,
            sampling=demand.sampling,
            stop_token_ids=demand.stop_token_ids,
        )
        self.tokens = list(demand.accepted)
        self._restart_chain()

    def _restart_chain(self) -> None:
        prompt = self.demand.prompt
        start = chain_start(self.demand.request, prompt)
        self._chain = chain_over(start, len(prompt), self.tokens)

    @property
    def holds(self) -> bool:
        """Whether it sees only what is verified."""
        return self.demand.delivery is Delivery.VERIFIED

    @property
    def name(self) -> str:
        return f"r{self.demand.request[-1]}"

    @property
    def reserve(self) -> int:
        """Cache positions it may need on every stage."""
        return len(self.demand.prompt) + self.demand.max_tokens

    @property
    def key(self) -> bytes:
        return self.demand.request

    # coordinator.ports.TokenSink

    def accept(self, instruction: do.AcceptTokens) -> None:
        if self.end is not None:
            self.watch.violate("I2", f"{self.name} received a token behind its end")
        if instruction.first_index != len(self.tokens):
            said = f"index {instruction.first_index} behind {len(self.tokens)} tokens"
            self.watch.violate("I2", f"{self.name} received {said}")
        for chunk in instruction.chunks:
            self._take(chunk)
        self._verified(instruction.verified_through)
        self.on_token(self)

    def advance(self, instruction: do.AdvanceVerified) -> None:
        self._verified(instruction.verified_through)

    def _verified(self, count: int) -> None:
        """The first ``count`` tokens are confirmed: they must be right whatever happened."""
        if count < self.verified_through:
            self.watch.violate("I2", f"{self.name}: the verified watermark went back to {count}")
        self.verified_through = count
        known = self.tokens[:count]
        if known != self.wanted[: len(known)] or (count > len(self.tokens) and not self.holds):
            self.watch.violate("I1", f"{self.name}: {count} tokens were verified, not all right")

    def correct(self, instruction: do.CorrectTokens) -> None:
        index = instruction.from_index
        if index < self.verified_through or self.holds or index >= len(self.tokens):
            self.watch.violate("I2", f"{self.name}: what was verified or never seen is withdrawn")
        if not self.misled:
            self.watch.violate("I1", f"{self.name}: a right token was withdrawn at {index}")
        del self.tokens[index:]
        self._restart_chain()

    def finish(self, instruction: do.FinishRequest) -> None:
        self._ended(instruction)
        billed, kept = instruction.summary.completion_tokens, len(self.tokens)
        reason = instruction.reason
        whole = kept == len(self.wanted)
        if reason in ("stop", "length") and not (self.stopped or whole or self.misled):
            said = f"{reason} with {kept} of {len(self.wanted)} tokens"
            self.watch.violate("I1", f"{self.name} finished by {said}")
        if reason == "cancelled" and not self.cancelled:
            self.watch.violate("I1", f"{self.name} was cancelled by nobody")
        if billed != kept and not self.stopped:
            self.watch.violate("I8", f"{self.name} billed {billed}, received {kept}")

    def fail(self, instruction: do.FailRequest) -> None:
        self._ended(instruction)
        error = instruction.error
        if type(error) is MeshError or not error.message:
            self.watch.violate("I6", f"{self.name} failed without a name: {error!r}")
        if instruction.summary.completion_tokens != len(self.tokens) and not self.stopped:
            self.watch.violate("I8", f"{self.name}: its error names another position")
        if self.must_succeed and not self.cancelled and self.demand.deadline is None:
            said = f"{error.reason}: {error.message}"
            self.watch.violate("I6", f"{self.name} failed although a route was there: {said}")
        if self.must_find_route and error.reason == RouteUnavailable.reason:
            self.watch.violate("I6", f"{self.name} came back to a whole mesh and found no route")
        if self.resumes and error.is_resumable and not (self.stopped or self.cancelled):
            self.resumes -= 1
            self.on_failure(self)

    def come_back(self) -> None:
        """For what follows behind what it has."""
        self.end, self.returning = None, False

    def _ended(self, instruction: do.FinishRequest | do.FailRequest) -> None:
        if self.end is not None:
            self.watch.violate("I2", f"{self.name} received two terminals")
        self.end = instruction
        self.ended_at = self.watch.now()

    def _take(self, chunk: TokenChunk) -> None:
        index = len(self.tokens)
        position = len(self.demand.prompt) + index
        self.tokens.append(chunk.token_id)
        if index >= (self.demand.max_tokens if self.misled else len(self.wanted)):
            self.watch.violate("I8", f"{self.name} received more than {len(self.wanted)} tokens")
        elif (self.holds or not self.misled) and chunk.token_id != self.wanted[index]:
            said = f"token {chunk.token_id} at {index}, expected {self.wanted[index]}"
            self.watch.violate("I1", f"{self.name} received {said} (epoch {chunk.epoch})")
        self._chain = chain_next(self._chain, position, chunk.token_id)
        honest = (
            chunk.checksum_holds()
            and chunk.status in (ValidationStatus.VALID, ValidationStatus.CORRECTED)
            and all(mark.cache_length == position for mark in chunk.marks)
        )
        if not honest or chunk.chain != self._chain or chunk.position != position:
            self.watch.violate("I3", f"{self.name} received a chunk that does not verify: {chunk}")
