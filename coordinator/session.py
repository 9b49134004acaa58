"""One request: what is known, how far it has been sent, how far it has come back.

The tokens of a request are one stream (``TokenStreamSynchronizer``), prompt first and then every
accepted token. A route consumes it from the left; whatever lies behind ``consumed`` is still to be
fed. That single rule covers first prefill, decode (exactly one token is left to feed), replay (back
to 0, with an opening) and rewind (back to what is confirmed).

Invariants, asserted by ``check``:
    0 <= confirmed <= consumed <= next_position
    accepted tokens never change or disappear
    a session is on a route exactly if ``epoch`` is not 0

``attempt`` numbers the tries to compute this request; rows that return for an older attempt say
nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from itertools import takewhile

from coordinator.events import Delivery, GenerationRequested, Verification
from coordinator.instructions import RecoveryRecord, RequestSummary
from coordinator.synchronizer import TokenStreamSynchronizer
from coordinator.token_validator import TokenValidator
from stagemesh.checksum import chain_over, chain_start
from stagemesh.frame import StepRow
from stagemesh.sampling import RowOpening
from stagemesh.token import TokenChunk
from stagemesh.topology import WorkerName


class SessionPhase(enum.Enum):
    """Where a request stands; the last three are its end."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    RECOVERING = "recovering"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({SessionPhase.FINISHED, SessionPhase.FAILED, SessionPhase.CANCELLED})


@dataclass(slots=True)
class PendingRecovery:
    """A recovery under way: since the first sign of trouble, until the next accepted token."""

    cause: str
    action: str
    worker: str
    from_route: tuple[WorkerName, ...]
    began_at: float
    kept: int
    to_route: tuple[WorkerName, ...] = ()
    epoch: int = 0
    replayed: int = 0

    def record(self, seconds: float | None) -> RecoveryRecord:
        return RecoveryRecord(
            cause=self.cause,
            action=self.action,
            worker=self.worker,
            from_route=self.from_route,
            to_route=self.to_route,
            epoch=self.epoch,
            kept=self.kept,
            replayed=self.replayed,
            seconds=seconds,
        )


@dataclass(slots=True, eq=False)
class Session:
    """See the module. ``reserve_tokens`` is what it may occupy in every stage's cache."""

    demand: GenerationRequested
    max_tokens: int
    arrived_at: float
    stream: TokenStreamSynchronizer
    phase: SessionPhase = SessionPhase.QUEUED
    epoch: int = 0
    route: tuple[WorkerName, ...] = ()
    attempt: int = 0
    opened: bool = False
    traced_epoch: int = 0
    """Whose workers were told its trace. A full worker that takes over behind its shadow has opened
    it before, without one."""
    in_flight: int = 0
    waiting_since: float = 0.0
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    outsized: bool = False
    """No route there is could hold it, when it last looked for one."""
    avoid_epoch: int = 0
    rewinds_here: int = 0
    replays_here: int = 0
    recoveries: list[RecoveryRecord] = field(default_factory=list)
    recovering: PendingRecovery | None = None
    undelivered: list[TokenChunk] = field(default_factory=list)
    """Accepted, and not yet to be seen by the client."""
    delivered: int = 0
    """Answer tokens the client was given and not told to withdraw."""
    corrected_through: int = 0
    """Answer tokens accepted before this index replace others that were delivered."""
    corrected: int = 0
    """Answer tokens that did."""
    corrected_from: int | None = None
    """Set while a withdrawal of delivered tokens has not been announced."""
    finishing: str = ""
    """How the answer ends, once its last tokens are verified; "" while it goes on."""
    prefers_shadow: bool = False
    """A token of it was rejected: it goes on with the worker that said so."""
    considered_epoch: int = 0
    given_up_epoch: int = 0
    """The full worker's route on which its shadow was lost too often."""
    matched_stop: str = ""
    kept: int | None = None
    """Answer tokens that remain when a stop string cut the answer; what was computed behind is
    dropped."""
    error_reason: str = ""
    rejections: int = 0
    weights: str = ""
    """What it was placed on; "" before it was."""

    @classmethod
    def begin(
        cls,
        demand: GenerationRequested,
        validator: TokenValidator,
        *,
        context_tokens_max: int,
        now: float,
    ) -> Session:
        """A request as it arrives, with the answer cut to what the context can hold."""
        session = cls(
            demand=demand,
            max_tokens=min(demand.max_tokens, context_tokens_max - len(demand.prompt)),
            arrived_at=now,
            waiting_since=now,
            stream=TokenStreamSynchronizer(
                demand.request, demand.prompt, validator, accepted=demand.accepted
            ),
            delivered=len(demand.accepted),
        )
        holds = demand.delivery is Delivery.VERIFIED  # what was given out was verified
        session.stream.verify_through(len(demand.accepted) if holds else demand.verified)
        return session

    @property
    def request(self) -> bytes:
        return self.demand.request

    @property
    def prompt_length(self) -> int:
        return len(self.demand.prompt)

    @property
    def accepted_count(self) -> int:
        """Answer tokens so far."""
        return self.stream.accepted

    @property
    def was_recovered(self) -> bool:
        """Whether it had a recovery in this life, or has one now."""
        return self.recovering is not None or bool(self.recoveries)

    @property
    def fruitless_recoveries(self) -> int:
        """Recoveries in a row up to now that brought no new token; one under way is one of them."""
        kept = [one.kept for one in self.recoveries]
        if self.recovering is not None:
            kept.append(self.recovering.kept)
        held = self.accepted_count
        return len(list(takewhile(lambda count: count >= held, reversed(kept))))

    @property
    def reserve_tokens(self) -> int:
        return len(self.demand.prompt) + self.max_tokens

    @property
    def pending(self) -> int:
        """Tokens known and not yet sent on this route."""
        return self.stream.next_position - self.stream.consumed

    @property
    def decodes_next(self) -> bool:
        """Whether what is next is one decode row."""
        return self.opened and self.stream.next_position - self.stream.consumed == 1

    @property
    def is_over(self) -> bool:
        """Ended, or complete."""
        return bool(self.finishing) or self.has_ended

    @property
    def has_ended(self) -> bool:
        return self.phase in ENDED

    @property
    def verification(self) -> Verification:
        return self.demand.verification

    @property
    def delivery(self) -> Delivery:
        return self.demand.delivery

    @property
    def verified_through(self) -> int:
        """Answer tokens confirmed by a full worker."""
        return self.stream.verified

    @property
    def is_verifying(self) -> bool:
        """Whether every token is to be confirmed by a full worker."""
        return self.demand.verification is Verification.SHADOW

    @property
    def is_verified(self) -> bool:
        """Whether everything that remains of the answer is confirmed."""
        kept = self.accepted_count if self.kept is None else self.kept
        return self.stream.verified >= kept

    @property
    def may_grow(self) -> bool:
        """Whether further tokens may be accepted soon."""
        return self.epoch != 0 and self.phase in (SessionPhase.PREFILLING, SessionPhase.DECODING)

    def withdraw_from(self, position: int) -> None:
        """The token at absolute ``position`` and all behind it were wrong: they are computed
        again."""
        index = position - self.prompt_length
        self.stream.withdraw_from(position)
        if self.delivered > index:
            self.corrected_through = max(self.corrected_through, self.delivered)
            self.corrected_from, self.delivered = index, index
            self.undelivered.clear()
        else:
            del self.undelivered[index - self.delivered :]
        self.kept, self.matched_stop, self.finishing = None, "", ""

    def resume_at(self, position: int) -> None:
        """This route's caches hold ``position`` positions already (a shadow's did)."""
        self.attempt += 1
        self.in_flight = 0
        self.opened = True
        self.stream.resume_at(position)

    def settle(self) -> None:
        """Complete, off its route, waiting to be verified. The route that made it stays known."""
        self.attempt += 1
        self.epoch, self.in_flight = 0, 0

    def attach(self, epoch: int, route: tuple[WorkerName, ...], now: float) -> None:
        """Begin on a route from nothing: everything known is prefilled there."""
        self.epoch, self.route = epoch, route
        self.rewinds_here = self.replays_here = 0
        if self.admitted_at is None:
            self.admitted_at = now
        # The standby route was opened before the one just lost, so its epoch may be the lower one.
        # A request's tries are told apart by ``attempt``, frames of closed routes by their epoch.
        self.stream.epoch = 0
        self.stream.begin_route(epoch, route)
        self._start_over()

    def restart(self) -> None:
        """Feed everything again on the same route; rows still under way no longer count."""
        self.stream.rewind_to(0)
        self._start_over()

    def rewind(self) -> None:
        """Feed again what no stage has confirmed; rows still under way no longer count."""
        self.attempt += 1
        self.in_flight = 0
        self.stream.rewind_to(self.stream.confirmed)
        self.phase = SessionPhase.RECOVERING

    def _start_over(self) -> None:
        self.attempt += 1
        self.in_flight = 0
        self.opened = False
        self.phase = SessionPhase.RECOVERING if self.recovering else SessionPhase.PREFILLING

    def detach(self, now: float) -> None:
        """Off its route, waiting for another."""
        self.attempt += 1
        self.epoch, self.route, self.in_flight = 0, (), 0
        self.waiting_since = now
        self.phase = SessionPhase.RECOVERING

    def next_row(self, step: int, tokens_max: int) -> StepRow:
        """The row for ``step``, at most ``tokens_max`` tokens; the stream expects it back."""
        stream = self.stream
        is_news = not self.opened or self.traced_epoch != self.epoch
        self.traced_epoch = self.epoch
        first = stream.consumed
        token_ids = stream.tokens(first, first + tokens_max)
        expected = stream.expect(step, self.epoch, first, token_ids)
        opening = None
        if not self.opened:
            self.opened = True
            opening = RowOpening(
                sampling=self.demand.sampling,
                prompt_length=self.prompt_length,
                chain=stream.chain,
                reserve_tokens=self.reserve_tokens,
            )
        return StepRow(
            request=self.demand.request,
            first_position=first,
            token_ids=token_ids,
            samples=expected.samples,
            opening=opening,
            traceparent=self.demand.traceparent if is_news else "",
        )

    def accepted(self, now: float) -> None:
        """A token was accepted into the stream."""
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
        self.phase = SessionPhase.DECODING

    def summary(self, now: float) -> RequestSummary:
        """How it was made, so far."""
        admitted = self.admitted_at if self.admitted_at is not None else now
        first = self.first_token_at
        kept = self.accepted_count if self.kept is None else self.kept
        if self.delivery is Delivery.VERIFIED:
            kept = min(kept, self.delivered)
        unfinished = [self.recovering.record(None)] if self.recovering else []
        return RequestSummary(
            prompt_tokens=self.prompt_length,
            completion_tokens=kept,
            route=self.route,
            recoveries=(*self.demand.recoveries, *self.recoveries, *unfinished),
            queue_s=admitted - self.arrived_at,
            time_to_first_token_s=first - self.arrived_at if first is not None else 0.0,
            total_s=now - self.arrived_at,
            chain=self.chain_behind(kept),
            matched_stop=self.matched_stop,
            checks=self._checks(),
            weights=self.weights or self.demand.fingerprint,
            tokens_before=len(self.demand.accepted),
        )

    def chain_behind(self, kept: int) -> bytes:
        """The link of the last of the first ``kept`` answer tokens, or of those there are."""
        if kept >= self.accepted_count:
            return self.stream.chain
        answer = self.stream.tokens(self.prompt_length, self.prompt_length + kept)
        return chain_over(chain_start(self.request, self.demand.prompt), self.prompt_length, answer)

    def _checks(self) -> dict[str, int]:
        found = {"tokens_accepted": self.accepted_count, "tokens_rejected": self.rejections}
        if self.is_verifying:
            found["tokens_verified"] = self.stream.verified
        if self.corrected:
            found["tokens_corrected"] = self.corrected
        return found

    def check(self) -> list[str]:
        """Broken invariants, in words."""
        rules = (
            ("confirmed <= consumed", 0 <= self.stream.confirmed <= self.stream.consumed),
            ("consumed <= known", self.stream.consumed <= self.stream.next_position),
            ("route exactly with epoch", bool(self.epoch) == bool(self.route) or self.is_over),
            ("delivered within accepted", self.delivered <= self.accepted_count),
            ("answer within max_tokens", self.accepted_count <= max(self.max_tokens, 0)),
            ("in flight needs a route", self.in_flight == 0 or self.epoch != 0 or self.has_ended),
        )
        name = self.request.hex()[:4]
        return [f"session {name}: {rule}" for rule, holds in rules if not holds]
