"""Streams through the rig, with or without a fault, and what every detector said of them.

``StreamRun`` is one stream by itself, into which a fault may be put. ``Company`` is several clean
ones whose decode steps are computed side by side, as a mesh computes them: matrix libraries choose
their kernels by the number of rows, so that is where clean work differs most from the reference.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.corruption_detector import Tier
from coordinator.token_validator import ExpectedRow, TokenValidator
from stage_worker.detect.faults import Fault, Recorded
from stage_worker.detect.rig import EPOCH, FINGERPRINT, OpenStage, Rig, frame_of, with_payload
from stage_worker.envelope import Envelope
from stage_worker.tensors import float_view
from stagemesh.checksum import chain_next, chain_start, crc32c, history_digest
from stagemesh.errors import FrameCorrupted, MeshError
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow, verify
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.token import TokenChunk
from stagemesh.topology import WorkerName

_NUMERIC = frozenset({RowStatus.NON_FINITE, RowStatus.OUT_OF_ENVELOPE})


@dataclass(frozen=True, slots=True)
class Demand:
    """A stream: its prompt, and how it is drawn."""

    number: int
    prompt: tuple[int, ...]
    spec: SamplingSpec
    count: int

    @property
    def request(self) -> bytes:
        return self.number.to_bytes(16, "big")


@dataclass(slots=True)
class Outcome:
    """What was emitted, and which tiers fired. ``hops`` are the activations sent, by step and
    hop."""

    tokens: list[int] = field(default_factory=list)
    fired: set[Tier] = field(default_factory=set)
    hops: dict[tuple[int, int], bytes] = field(default_factory=dict)
    chunks: list[TokenChunk] = field(default_factory=list)


@dataclass(slots=True)
class Trouble:
    """A fault at its place in one stream: at decode step ``at``, on ``stage`` (or the hop behind
    it)."""

    fault: Fault
    at: int
    stage: int
    draw: random.Random
    other: Outcome

    def is_on(self, step: int) -> bool:
        return step >= self.at if self.fault.lasting else step == self.at


class Account:
    """What the coordinator knows of one stream: its tokens, its chain, and what fired."""

    def __init__(self, rig: Rig, demand: Demand) -> None:
        self.demand = demand
        self.outcome = Outcome()
        self.known = list(demand.prompt)
        self._stages = tuple(WorkerName(name) for name in rig.names)
        self._validator = TokenValidator(rig.vocab_size)
        self._chain = chain_start(demand.request, demand.prompt)

    @property
    def is_full(self) -> bool:
        return len(self.outcome.tokens) >= self.demand.count

    def first_row(self) -> StepRow:
        """The whole prompt."""
        demand = self.demand
        end = len(demand.prompt) + demand.count
        opening = RowOpening(demand.spec, len(demand.prompt), self._chain, end)
        return StepRow(demand.request, 0, demand.prompt, samples=True, opening=opening)

    def next_row(self) -> StepRow:
        """The newest token."""
        position = len(self.known) - 1
        return StepRow(self.demand.request, position, (self.known[-1],), samples=True)

    def take(self, row: StepRow, step: int) -> bool:
        """Judge a row that came back; False if the stream cannot go on."""
        outcome = self.outcome
        if row.status is not RowStatus.OK:
            is_numeric = row.status in _NUMERIC
            outcome.fired.add(Tier.ENVELOPE if is_numeric else Tier.PROTOCOL)
            return False
        if self._validator.check_row(row, self._expected(row, step)):
            outcome.fired.add(Tier.PROTOCOL)
        if row.token is None:
            return False
        outcome.chunks.append(row.token)
        outcome.tokens.append(row.token.token_id)
        self.known.append(row.token.token_id)
        self._chain = row.token.chain
        return True

    def _expected(self, row: StepRow, step: int) -> ExpectedRow:
        return ExpectedRow(
            request=self.demand.request,
            epoch=EPOCH,
            step=step,
            first_position=row.first_position,
            end_position=len(self.known),
            end_digest=history_digest(self.known),
            samples=True,
            previous_chain=self._chain,
            stages=self._stages,
        )


class Company:
    """Clean streams side by side; see the module. One use."""

    def __init__(self, rig: Rig, demands: Sequence[Demand]) -> None:
        self._rig = rig
        self._accounts = [Account(rig, demand) for demand in demands]

    def run(self) -> list[Outcome]:
        """All of them to their ends; their caches are freed again."""
        going = self._pass(FrameKind.PREFILL, self._accounts)
        while going:
            going = self._pass(FrameKind.DECODE, going)
        for account in self._accounts:
            self._rig.close(account.demand.request)
        return [account.outcome for account in self._accounts]

    def _pass(self, kind: FrameKind, accounts: Sequence[Account]) -> list[Account]:
        """One step of all; returns those that want another."""
        first = kind is FrameKind.PREFILL
        rows = tuple(one.first_row() if first else one.next_row() for one in accounts)
        frame = frame_of(kind, self._rig.next_step(), *rows)
        for index, stage in enumerate(self._rig.stages):
            frame = stage.step(frame).sealed()
            if frame.tensor is not None:
                self._look(frame, accounts, self._rig.envelopes[index])
        pairs = zip(accounts, frame.rows, strict=True)
        return [one for one, row in pairs if one.take(row, frame.step) and not one.is_full]

    @staticmethod
    def _look(frame: StepFrame, accounts: Sequence[Account], envelope: Envelope) -> None:
        """What a receiver looks at: the frame for all of them, marks and sizes row by row."""
        fired = _verified(frame)
        tensor = frame.tensor
        if tensor is None:
            return
        lines, values = memoryview(tensor.payload), float_view(tensor)
        size, start = len(lines) // frame.token_count, 0
        for account, row in zip(accounts, frame.rows, strict=True):
            stop = start + row.token_count
            account.outcome.fired |= fired
            if row.status is RowStatus.OK:
                if row.marks[-1].output_crc32c != crc32c(lines[start * size : stop * size]):
                    account.outcome.fired.add(Tier.TRANSPORT)
                if envelope.check(values[start:stop])[0] is not RowStatus.OK:
                    account.outcome.fired.add(Tier.ENVELOPE)
            start = stop


class StreamRun:
    """See the module. One use."""

    def __init__(self, rig: Rig, demand: Demand, trouble: Trouble | None = None) -> None:
        self._rig, self._demand, self._trouble = rig, demand, trouble
        self._account = Account(rig, demand)
        self.outcome = self._account.outcome
        self._step = 0

    def run(self) -> Outcome:
        """The whole stream; its caches are freed again."""
        trouble, demand = self._trouble, self._demand
        with contextlib.ExitStack() as stack:
            if trouble is not None and trouble.fault.weights is not None:
                self._meddle_weights(stack, trouble)
            if trouble is not None and trouble.fault.needs_companion:
                self._companion(stack, trouble)
            going = self._pass(FrameKind.PREFILL, self._account.first_row())
            while going and not self._account.is_full:
                self._step += 1
                row = self._account.next_row()
                self._before_step()
                going = self._pass(FrameKind.DECODE, row)
        self._rig.close(demand.request)
        if trouble is not None and trouble.fault.answer is not None:
            self._meddle_answer(trouble)
        return self.outcome

    # -- places -----------------------------------------------------------------------------------

    def _meddle_weights(self, stack: contextlib.ExitStack, trouble: Trouble) -> None:
        change = trouble.fault.weights
        model = self._rig.models[trouble.stage]
        if change is not None:
            stack.enter_context(model.other_weights(lambda layers: change(layers, trouble.draw)))

    def _companion(self, stack: contextlib.ExitStack, trouble: Trouble) -> None:
        """Another request on the same stages, whose cache may be mistaken for this one's."""
        request = _companion_of(self._demand)
        prompt = tuple((token * 7 + 3) % self._rig.vocab_size for token in self._demand.prompt)
        opening = RowOpening(SamplingSpec(), len(prompt), bytes(16), len(prompt))
        frame = frame_of(
            FrameKind.PREFILL, self._rig.next_step(), StepRow(request, 0, prompt, opening=opening)
        )
        for stage in self._rig.stages:
            frame = stage.step(frame)
        stack.callback(self._rig.close, request)

    def _before_step(self) -> None:
        trouble = self._trouble
        if trouble is None:
            return
        fault = trouble.fault
        stage: OpenStage = self._rig.stages[trouble.stage]
        request = self._demand.request
        if fault.cache is not None and trouble.is_on(self._step):
            fault.cache(stage, request, _companion_of(self._demand), trouble.draw)
        if fault.sampler is not None and trouble.is_on(self._step):
            session = self._rig.stages[-1].session_of(request)
            spec = fault.sampler(self._demand.spec, self._step)
            session.opening = replace(session.opening, sampling=spec)

    def _meddle_answer(self, trouble: Trouble) -> None:
        """Tokens changed behind the sampler. A liar seals what it changes; a moved token keeps its
        own label, which is what the validator then compares."""
        change, outcome = trouble.fault.answer, self.outcome
        if change is None:
            return
        before = list(outcome.tokens)
        outcome.tokens = change(before, trouble.at, self._rig.vocab_size, trouble.draw)
        if trouble.fault.relabels:
            self._judge_labels(before)

    def _judge_labels(self, before: Sequence[int]) -> None:
        """Each emitted token comes with the chunk it was made with."""
        base = len(self._demand.prompt)
        chain = chain_start(self._demand.request, self._demand.prompt)
        made = dict(enumerate(self.outcome.chunks))
        for index, token_id in enumerate(self.outcome.tokens):
            offset = next((o for o in (0, 1, -1) if _at(before, index + o) == token_id), 0)
            chunk = made.get(index + offset)
            if chunk is None:
                return
            if chunk.position != base + index or chunk.chain != chain_next(
                chain, base + index, token_id
            ):
                self.outcome.fired.add(Tier.PROTOCOL)
                return
            chain = chunk.chain

    # -- a step -----------------------------------------------------------------------------------

    def _pass(self, kind: FrameKind, row: StepRow) -> bool:
        """One step through every stage and back; False if the stream cannot go on."""
        rig, trouble = self._rig, self._trouble
        frame = frame_of(kind, rig.next_step(), row)
        for index, stage in enumerate(rig.stages):
            model = rig.models[index]
            model.after = None
            fault = trouble.fault if trouble is not None else None
            if (
                trouble is not None
                and fault is not None
                and fault.output is not None
                and index == trouble.stage
                and trouble.is_on(self._step)
            ):
                meddling, draw = fault.output, trouble.draw
                model.after = lambda entered, left, m=meddling, d=draw: m(entered, left, d)
            frame = stage.step(frame).sealed()
            model.after = None
            if frame.tensor is not None:
                frame = self._hop(frame, index, rig.envelopes[index])
        return self._account.take(frame.rows[0], frame.step)

    def _hop(self, frame: StepFrame, hop: int, envelope: Envelope) -> StepFrame:
        """From one stage to the next: damaged, verified, looked at; and on it goes, sealed."""
        trouble, outcome = self._trouble, self.outcome
        sealed = frame
        if trouble is not None and hop == trouble.stage and trouble.is_on(self._step):
            change = trouble.fault.wire or trouble.fault.sealed
            if change is not None and frame.tensor is not None:
                payload = bytes(frame.tensor.payload)
                recorded = Recorded(
                    previous=outcome.hops.get((self._step - 1, hop), payload),
                    other=trouble.other.hops.get((self._step, hop), payload),
                )
                if min(len(recorded.previous), len(recorded.other)) == len(payload):
                    frame = with_payload(frame, change(payload, trouble.draw, recorded))
                if trouble.fault.sealed is not None:
                    frame = frame.sealed()
        outcome.fired |= _verified(frame)
        if frame.tensor is None:
            return frame
        if frame.rows[0].marks and frame.rows[0].status is RowStatus.OK:
            frame = self._check_mark(frame)
        if self._step:
            outcome.hops[self._step, hop] = bytes(sealed.tensor.payload if sealed.tensor else b"")
        if frame.tensor is not None and frame.rows[0].status is RowStatus.OK:
            status, _ = envelope.check(float_view(frame.tensor))
            if status is not RowStatus.OK:
                outcome.fired.add(Tier.ENVELOPE)
        return frame.sealed()

    def _check_mark(self, frame: StepFrame) -> StepFrame:
        """The receiver's comparison of a row with its sender's mark; the mark is then made to
        fit."""
        row, tensor = frame.rows[0], frame.tensor
        if tensor is None:
            return frame
        found, mark = crc32c(tensor.payload), row.marks[-1]
        if mark.output_crc32c == found:
            return frame
        self.outcome.fired.add(Tier.TRANSPORT)
        marks = (*row.marks[:-1], replace(mark, output_crc32c=found))
        return replace(frame, rows=(replace(row, marks=marks),))


def _verified(frame: StepFrame) -> set[Tier]:
    """Tiers that a receiver's verification of this frame fires."""
    try:
        verify(frame, fingerprint=FINGERPRINT)
    except FrameCorrupted:
        return {Tier.TRANSPORT}
    except MeshError:
        return {Tier.PROTOCOL}
    return set()


def _companion_of(demand: Demand) -> bytes:
    return b"companion" + demand.number.to_bytes(7, "big")


def _at(values: Sequence[int], index: int) -> Any:
    return values[index] if 0 <= index < len(values) else None
