"""One request's token stream, ordered and verified across all stages, whatever route it is on.

The synchronizer knows the prompt and every accepted token, so it knows beforehand what each row of
the request must look like when it returns (``expect``), and lets a token through only if everything
agrees: label, order, every stage's cache length and history digest, checksum, chain (``accept``). A
row without a token (an earlier chunk of a prefill) is held to the same account (``confirm``). What
does not agree is refused before the token is accepted, with findings that name the first stage that
differs.

At every ``checkpoint_every`` positions the marks of a row also settle a checkpoint barrier whose
participants are the stages: complete, or broken and naming who differs. It costs no messages,
because every row carries every stage's account anyway.

Watermarks, as counts of answer tokens: ``verified <= accepted``. A client never sees a token at or
beyond ``accepted`` (or, on request, beyond ``verified``). Positions are absolute (0 = first prompt
token).

Invariant: ``chain`` and the digest behind ``consumed`` always follow from the tokens alone, never
from what a stage said. Work per token is constant; only ``rewind_to``, ``withdraw_from`` and
``begin_route`` look back over the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.barrier import Barrier
from coordinator.token_validator import (
    Corruption,
    ExpectedRow,
    Finding,
    TokenValidator,
    rejection,
)
from stagemesh.checksum import chain_over, chain_start, history_digest
from stagemesh.errors import EpochFenced, EpochNotOpen, InvalidConfiguration
from stagemesh.frame import StepRow
from stagemesh.token import StageMark, TokenChunk, ValidationStatus
from stagemesh.topology import COORDINATOR_HOP, WorkerName

CHECKPOINT_EVERY_POSITIONS = 64
"""Distance of checkpoints; a rewind goes back at most this far."""
CHECKPOINT_BARRIER_S = 1.0
"""Nominal time allowed at a checkpoint barrier; its arrivals are all in one row, so none is waited
for."""
OUTSTANDING_ROWS_MAX = 1024
"""Rows of one request under way at once; far more than any window lets through."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What another route must be given to continue: prefill ``token_ids`` from position 0, the last
    of which yields the next token. ``chain``: digest behind the last of them."""

    token_ids: tuple[int, ...]
    prompt_length: int
    chain: bytes
    end_digest: int

    @property
    def next_position(self) -> int:
        return len(self.token_ids)


class TokenStreamSynchronizer:
    """See the module. One per request; survives changes of route."""

    def __init__(
        self,
        request: bytes,
        prompt: Sequence[int],
        validator: TokenValidator,
        *,
        accepted: Sequence[int] = (),
        checkpoint_every: int = CHECKPOINT_EVERY_POSITIONS,
    ) -> None:
        if checkpoint_every < 1:
            raise InvalidConfiguration("checkpoints need a distance", setting="checkpoint_every")
        self.request = request
        self.validator = validator
        self.checkpoint_every = checkpoint_every
        self.epoch = 0
        self.consumed = 0
        self.confirmed = 0
        self.verified = 0
        self.checkpointed = 0
        self._prompt_length = len(prompt)
        self._start = chain_start(request, prompt)
        self._tokens = [*prompt, *accepted]
        self.chain = chain_over(self._start, len(prompt), accepted)
        self._stages: tuple[WorkerName, ...] = ()
        self._digest = 0
        self._expected: dict[int, ExpectedRow] = {}
        self._last_step = 0
        self._checkpoint: Barrier | None = None

    # Watermarks

    @property
    def accepted(self) -> int:
        """Answer tokens accepted so far."""
        return len(self._tokens) - self._prompt_length

    @property
    def next_position(self) -> int:
        """Absolute position of the next token to be accepted."""
        return len(self._tokens)

    @property
    def outstanding(self) -> int:
        """Rows under way."""
        return len(self._expected)

    def expected_digest(self, step: int) -> int | None:
        """The history digest every stage must report for a row under way; None if there is none."""
        expected = self._expected.get(step)
        return None if expected is None else expected.end_digest

    def verify_through(self, count: int) -> int:
        """Shadow verification confirmed the first ``count`` answer tokens; returns the
        watermark."""
        self.verified = max(self.verified, min(count, self.accepted))
        return self.verified

    def tokens(self, first: int = 0, last: int | None = None) -> tuple[int, ...]:
        """Prompt and accepted token ids at positions ``[first, last)``."""
        return tuple(self._tokens[first:last])

    # Routes

    def begin_route(self, epoch: int, stages: Sequence[WorkerName]) -> ReplayPlan:
        """Go on at a newer epoch from empty caches. Raises EpochFenced if it is not newer."""
        if epoch <= self.epoch:
            raise EpochFenced("an epoch only grows", epoch=epoch, current=self.epoch)
        self.epoch = epoch
        self._stages = tuple(stages)
        self._last_step = 0
        self.rewind_to(0)
        return self.replay_plan()

    def replay_plan(self) -> ReplayPlan:
        """What has to be prefilled on a route that knows nothing of this request."""
        ids = tuple(self._tokens)
        return ReplayPlan(ids, self._prompt_length, self.chain, history_digest(ids))

    def rewind_to(self, position: int) -> None:
        """The stages' caches hold ``position`` positions again: rows under way no longer count.

        Accepted tokens stay accepted; those at or behind ``position`` are sent again.
        """
        if not 0 <= position <= len(self._tokens):
            raise InvalidConfiguration("rewind outside the stream", position=position)
        self._expected.clear()
        self.consumed = position
        self.confirmed = min(self.confirmed, position)
        self._digest = history_digest(self._tokens[:position])

    def resume_at(self, position: int) -> None:
        """The present route's caches hold the first ``position`` positions already."""
        self.rewind_to(position)
        self.confirmed = position

    def withdraw_from(self, position: int) -> tuple[int, ...]:
        """Accepted tokens from ``position`` on were wrong: forget and return them. Never the
        prompt, and never a token behind the verified watermark."""
        if position < self._prompt_length + self.verified:
            raise InvalidConfiguration("verified tokens are never withdrawn", position=position)
        gone = tuple(self._tokens[position:])
        del self._tokens[position:]
        self.chain = chain_over(
            self._start, self._prompt_length, self._tokens[self._prompt_length :]
        )
        self.rewind_to(min(self.consumed, position))
        return gone

    # Steps

    def expect(
        self, step: int, epoch: int, first_position: int, token_ids: Sequence[int]
    ) -> ExpectedRow:
        """A row goes out. Raises InvalidConfiguration if it is not the next piece of this very
        stream.

        The row samples exactly if it ends with the last token known.
        """
        end = first_position + len(token_ids)
        self._check_outgoing(step, epoch, first_position, token_ids)
        self._digest = history_digest(token_ids, self._digest)
        self.consumed = end
        self._last_step = step
        expected = ExpectedRow(
            self.request,
            epoch,
            step,
            first_position,
            end,
            self._digest,
            end == len(self._tokens),
            self.chain,
            self._stages,
        )
        self._expected[step] = expected
        return expected

    def confirm(self, row: StepRow, *, epoch: int, step: int, now: float = 0.0) -> int:
        """A row that yields no token has returned. Returns the confirmed cache length.

        Raises EpochFenced or EpochNotOpen (row of another route), TokenRejected with findings.
        """
        expected = self._take(row, epoch, step)
        if expected.samples:
            raise rejection(self._counted(Corruption.LOSS, expected, "row yields a token"))
        self._check(row, expected, now)
        return self.confirmed

    def accept(self, row: StepRow, *, epoch: int, step: int, now: float = 0.0) -> TokenChunk:
        """A row with a token has returned: the accepted chunk, VALID and sealed, with every mark.

        Raises as ``confirm``. On an error nothing is accepted and no watermark moves.
        """
        expected = self._take(row, epoch, step)
        token = row.token
        if not expected.samples:
            raise rejection(self._counted(Corruption.DUPLICATION, expected, "row yields no token"))
        self._check(row, expected, now)
        if token is None:
            raise rejection(self._counted(Corruption.LOSS, expected, "no token"))
        self._tokens.append(token.token_id)
        self.chain = token.chain
        return token.judged(ValidationStatus.VALID, row.marks)

    def take_checkpoint(self) -> Barrier | None:
        """The checkpoint barrier that the last row settled, if it crossed one. Handed out once."""
        barrier, self._checkpoint = self._checkpoint, None
        return barrier

    def checkpoint(
        self, position: int, digest: int, marks: Sequence[StageMark], now: float
    ) -> Barrier:
        """Settle a checkpoint barrier at ``position`` from the stages' marks, in stage order."""
        barrier = Barrier(
            f"checkpoint/{self.request.hex()[:8]}/{position}",
            self.epoch,
            1,
            self._stages,
            now,
            now + CHECKPOINT_BARRIER_S,
            expect={"cache_length": str(position), "history_digest": f"{digest:08x}"},
        )
        for worker, mark in zip(self._stages, marks, strict=False):
            facts = {
                "cache_length": str(mark.cache_length),
                "history_digest": f"{mark.history_digest:08x}",
            }
            barrier.arrive(worker, facts, now)
        for worker in barrier.absent:
            barrier.refuse(worker, "no mark in the row", now)
        return barrier

    # How

    def _check_outgoing(
        self, step: int, epoch: int, first_position: int, token_ids: Sequence[int]
    ) -> None:
        known = self._tokens
        count = len(token_ids)
        if count == 1:
            same = first_position < len(known) and known[first_position] == token_ids[0]
        else:
            same = known[first_position : first_position + count] == list(token_ids) and count > 0
        on_route = epoch == self.epoch and bool(self._stages)
        follows = first_position == self.consumed
        grows = step > self._last_step
        room = len(self._expected) < OUTSTANDING_ROWS_MAX
        if same and on_route and follows and grows and room:
            return
        rules = {
            "epoch of the route": on_route,
            "step numbers grow": grows,
            "position follows the last row": follows,
            "token ids are the stream's own": same,
            "outstanding_rows_max": room,
        }
        broken = ", ".join(rule for rule, holds in rules.items() if not holds)
        raise InvalidConfiguration(
            f"outgoing row breaks: {broken}", step=step, position=first_position
        )

    def _take(self, row: StepRow, epoch: int, step: int) -> ExpectedRow:
        """The expectation for a returned row; rows return in the order they went out."""
        if epoch < self.epoch:
            self.validator.counters.count("tokens_fenced")
            raise EpochFenced("row of an older route", epoch=epoch, current=self.epoch)
        if epoch > self.epoch:
            raise EpochNotOpen("row of a route this request is not on", epoch=epoch)
        oldest = next(iter(self._expected.values()), None)
        if oldest is not None and oldest.step == step:
            del self._expected[step]
            return oldest
        last = len(self._stages) - 1
        if step in self._expected and oldest is not None:
            kind, said = Corruption.LOSS, f"step {oldest.step} has not returned before step {step}"
        else:
            kind, said = Corruption.DUPLICATION, f"step {step} was not awaited (again)"
        worker = self._stages[last] if self._stages else ""
        found = Finding(kind, last, COORDINATOR_HOP, worker, self.request, row.first_position, said)
        raise rejection(self.validator.counted((found,)))

    def _check(self, row: StepRow, expected: ExpectedRow, now: float) -> None:
        findings = self.validator.check_row(row, expected)
        end = expected.end_position
        every = self.checkpoint_every
        if end // every > expected.first_position // every:
            self._checkpoint = self.checkpoint(end, expected.end_digest, row.marks, now)
            if not findings:
                self.checkpointed = end
                self.validator.counters.count("checkpoints_completed")
        if findings:
            raise rejection(findings)
        self.confirmed = end

    def _counted(self, kind: Corruption, expected: ExpectedRow, detail: str) -> tuple[Finding, ...]:
        last = len(self._stages) - 1
        worker = self._stages[last] if self._stages else ""
        found = Finding(
            kind, last, COORDINATOR_HOP, worker, self.request, expected.end_position, detail
        )
        return self.validator.counted((found,))
