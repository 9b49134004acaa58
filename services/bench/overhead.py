"""Suite ``overhead``: what the checks cost alone, as a percentage of a decode step.

Each check of one decode step over a route of two stages is run here by itself, again and again, on
frames of the real size, and its *whole* call is counted, also what it would do without checking.
CPU time of this thread is what is taken, so other processes do not count. The step it is compared
with is the shortest that bare mlx-lm makes on the same model. Repeated, a check finds all it
touches in the cache: this is the work it is. What it costs behind a forward, where it finds none of
it there, is more, and measured by `on_off`.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from coordinator.synchronizer import TokenStreamSynchronizer
from coordinator.token_validator import TokenValidator
from services import codec
from services.bench.results import Result, measured, percent_of
from services.bench.sides import Sides, Sizes
from services.finite import rows_are_finite
from services.telemetry import Role, StepTiming, TraceStore, start_telemetry
from stagemesh.checksum import chain_next, crc32c, history_digest
from stagemesh.errors import FrameMalformed
from stagemesh.frame import FrameKind, StepFrame, StepRow, verify
from stagemesh.hop_receiver import Ack
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk
from stagemesh.topology import COORDINATOR_HOP, WorkerName
from stagemesh.transport import TokenTransferValidator

SAMPLES = 5
STEP_RUNS = 3
HIDDEN = 576
VOCABULARY = 49_152
"""Both as SmolLM2 has them."""
PREFILL_TOKENS = 128
PROMPT = tuple(range(300, 332))
STAGES = (WorkerName("stage-0"), WorkerName("stage-1"))
FINGERPRINT = bytes(range(8))
EPOCH = 7
TRACED_STEPS = 2000
ANSWERED_STEPS = 1024


@dataclass(frozen=True, slots=True)
class StepOnWire:
    """One decode step as it passes the three hops of a two-stage route, sealed."""

    request: bytes
    to_first: StepFrame
    to_second: StepFrame
    to_coordinator: StepFrame

    @property
    def hops(self) -> tuple[StepFrame, ...]:
        return (self.to_first, self.to_second, self.to_coordinator)


def payload_of(tokens: int) -> bytes:
    """An activation of ``tokens`` lines of ordinary float32 values."""
    import numpy as np

    draw = np.random.default_rng(tokens)
    return draw.standard_normal((tokens, HIDDEN)).astype(np.float32).tobytes()


def a_step() -> StepOnWire:
    """The first decode step behind `PROMPT`."""
    request, position = uuid.UUID(int=42).bytes, len(PROMPT)
    digest = history_digest((*PROMPT, 400))
    row = StepRow(request, position, (400,), samples=True)
    payload = payload_of(1)
    tensor = Tensor(DType.F32, (1, HIDDEN), payload)
    marks = (
        StageMark(position + 1, digest, crc32c(payload)),
        StageMark(position + 1, digest, 0),
    )
    token = TokenChunk(
        request, position + 1, 401, EPOCH, 2, 0.0, 1.0, time.time_ns(), STAGES[1], bytes(16), marks
    ).sealed()
    first = StepFrame(FrameKind.DECODE, FINGERPRINT, EPOCH, 2, COORDINATOR_HOP, 0, (row,))
    second = replace(
        first, hop_from=0, hop_to=1, rows=(replace(row, marks=marks[:1]),), tensor=tensor
    )
    last = replace(
        first, hop_from=1, hop_to=COORDINATOR_HOP, rows=(replace(row, marks=marks, token=token),)
    )
    return StepOnWire(request, first.sealed(), second.sealed(), last.sealed())


def cpu_us(action: Callable[[], object], seconds: float) -> list[float]:
    """CPU time of one call, microseconds: several samples over ``seconds`` altogether."""
    action()
    begun = time.thread_time()
    count = 0
    while (spent := time.thread_time() - begun) < seconds / (SAMPLES + 1) or count < 3:
        action()
        count += 1
    count = max(1, int(count * (seconds / (SAMPLES + 1)) / max(spent, 1e-9)))
    samples = []
    for _ in range(SAMPLES):
        begun = time.thread_time()
        for _ in range(count):
            action()
        samples.append((time.thread_time() - begun) / count * 1e6)
    return samples


def integrity_checks() -> dict[str, Callable[[], object]]:
    """Every integrity check of one decode step, by name."""
    step = a_step()
    token = step.to_coordinator.rows[0].token
    payload = payload_of(1)
    transfers = TokenTransferValidator()
    if token is None:
        raise FrameMalformed("the last hop of a decode step carries a token")

    def seal() -> None:
        for frame in step.hops:
            frame.sealed()

    def check() -> None:
        for frame in step.hops:
            verify(frame, fingerprint=FINGERPRINT)

    def marks() -> None:
        StageMark(33, history_digest((400,), 7), crc32c(payload))
        StageMark(33, history_digest((400,), 7), 0)

    def acknowledged() -> None:
        for frame in step.hops:
            acknowledgement = Ack(frame.epoch, frame.step)
            acknowledgement.checksum()  # where it is written
            acknowledgement.checksum()  # and where it is read

    def token_made() -> None:
        chain_next(token.chain, token.position, token.token_id)
        token.sealed()

    return {
        "seal, three hops": seal,
        "verify, three hops": check,
        "acknowledgements, three hops": acknowledged,
        "marks, two stages": marks,
        "mark of what arrived": lambda: crc32c(payload),
        "seal and chain a token": token_made,
        "token on its row": lambda: transfers.check(step.to_coordinator),
        "expected and accepted": _Acceptance().step,
    }


class _Acceptance:
    """The coordinator's account of one stream: what a row must look like, and whether it does.

    What the stages answer was made beforehand: making it is not the coordinator's work.
    """

    def __init__(self) -> None:
        self._validator = TokenValidator(VOCABULARY)
        self._rows: list[StepRow] = []
        stream = self._begin()
        for step in range(1, ANSWERED_STEPS + 1):
            expected = self._expect(stream, step)
            self._rows.append(_answer(stream, expected, step))
            stream.accept(self._rows[-1], epoch=EPOCH, step=step)
        self._restart()

    def _begin(self) -> TokenStreamSynchronizer:
        stream = TokenStreamSynchronizer(uuid.UUID(int=42).bytes, PROMPT, self._validator)
        stream.begin_route(EPOCH, STAGES)
        return stream

    def _restart(self) -> None:
        self._stream, self._step = self._begin(), 0

    def _expect(self, stream: TokenStreamSynchronizer, step: int) -> Any:
        first = stream.consumed
        token_ids = stream.tokens(first, first + 1) if step > 1 else PROMPT
        return stream.expect(step, EPOCH, first, token_ids)

    def step(self) -> None:
        """One step; now and then from the beginning."""
        if self._step == ANSWERED_STEPS:
            self._restart()
        self._step += 1
        self._expect(self._stream, self._step)
        self._stream.accept(self._rows[self._step - 1], epoch=EPOCH, step=self._step)


def _answer(stream: TokenStreamSynchronizer, expected: Any, step: int) -> StepRow:
    """What two honest stages make of a step."""
    position = expected.end_position
    mark = StageMark(position, expected.end_digest, 0)
    chain = chain_next(expected.previous_chain, position, 401)
    chunk = TokenChunk(
        expected.request,
        position,
        401,
        EPOCH,
        step,
        0.0,
        1.0,
        0,
        STAGES[1],
        chain,
        (mark, mark),
    ).sealed()
    first = expected.first_position
    ids = stream.tokens(first, position)
    return StepRow(expected.request, first, ids, samples=True, marks=(mark, mark), token=chunk)


def numeric_checks(vocab_size: int = VOCABULARY) -> dict[str, Callable[[], object]]:
    """Every check of numbers of one decode step, by name."""
    import numpy as np

    from stage_worker.envelope import Envelope
    from stage_worker.one_line import OneLine
    from stage_worker.sampling import greedy

    step = a_step()
    tensor = step.to_second.tensor
    if tensor is None:
        raise FrameMalformed("the middle hop carries an activation")
    envelope, line = Envelope(), OneLine(tensor.shape[-1])
    envelope.learn(line.of(tensor.payload))
    logits = np.random.default_rng(vocab_size).standard_normal((1, vocab_size), np.float32)
    return {
        "size on leaving": lambda: envelope.check(line.of(tensor.payload)),
        "finite on arrival": lambda: rows_are_finite(step.to_second),
        "finite logits and margin, argmax included": lambda: greedy(logits),
    }


def overhead_of(
    name: str, checks: dict[str, Callable[[], object]], step_s: float, sizes: Sizes
) -> Result:
    """All of ``checks`` together as a percentage of ``step_s``."""
    taken = {what: cpu_us(check, sizes.micro_seconds) for what, check in checks.items()}
    sums = [sum(samples[index] for samples in taken.values()) for index in range(SAMPLES)]
    parts = ", ".join(f"{what} {statistics.median(us):.1f}" for what, us in taken.items())
    return _share(name, [percent_of(us / 1e6, step_s) for us in sums], f"µs: {parts}")


def _share(name: str, percents: Sequence[float], note: str) -> Result:
    unit = "% of a decode step"
    return measured(name, percents, unit=unit, higher_is_better=False, note=note)


async def tracing(step_s: float, sizes: Sizes) -> Result:
    """Spans and metrics of one decode step on the coordinator and both stages, exporters too."""
    turns = SAMPLES if sizes.micro_seconds > 0.1 else 2
    samples = [percent_of(await _traced_step_s(step_s), step_s) for _ in range(turns)]
    note = "default sampling; coordinator and two stages, their exporting threads included"
    return _share("overhead_tracing", samples, note)


async def _traced_step_s(step_s: float) -> float:
    """CPU seconds of the telemetry of one step of ``step_s`` seconds."""
    step = a_step()
    home = start_telemetry(Role("coordinator"), store=TraceStore(), environment={})
    worker = start_telemetry(Role("stage-worker", worker="stage-0"), environment={})
    parent = home.requests.request_received(step.request, {}, "benchmark")
    opened = replace(step.to_second.rows[0], opening=_opening(), traceparent=parent)
    first = replace(step.to_second, kind=FrameKind.PREFILL, rows=(opened,))
    timing = StepTiming(finished=time.monotonic(), compute_s=step_s / 2)
    worker.stage.observe(first, timing)
    begun = time.process_time()
    for _ in range(TRACED_STEPS):
        now = time.monotonic()
        home.requests.step_sent(step.to_first, now)
        home.requests.step_returned(step.to_coordinator, now, step_s)
        for _ in STAGES:
            worker.stage.observe(step.to_second, StepTiming(finished=now, compute_s=step_s / 2))
    home.flush()
    worker.flush()
    spent = time.process_time() - begun
    await home.drain()
    await worker.drain()
    return spent / TRACED_STEPS


def _opening() -> Any:
    from stagemesh.sampling import RowOpening, SamplingSpec

    return RowOpening(SamplingSpec(), len(PROMPT), bytes(16), 64)


async def step_seconds(sides: Sides, sizes: Sizes) -> float:
    """One decode step, seconds: the shortest single step of bare mlx-lm in a few runs. A mean would
    grow on a busy machine, which the checks' CPU time does not, and so make them look cheap."""
    steps = []
    for turn in range(STEP_RUNS):
        prompt = sides.prompt(sizes.decode_prompt_tokens, turn)
        seen = await sides.baseline.ask("single", prompt=prompt, max_tokens=sizes.decode_tokens)
        steps.append(float(seen["fastest_s"]))
    return min(steps)


async def checks(sides: Sides, sizes: Sizes) -> list[Result]:
    """Integrity and numbers, each and together, and tracing."""
    step_s = await step_seconds(sides, sizes)
    integrity = overhead_of("overhead_integrity", integrity_checks(), step_s, sizes)
    numeric = overhead_of("overhead_numeric", numeric_checks(sides.vocab_size), step_s, sizes)
    parts = (integrity.samples["ours"], numeric.samples["ours"])
    together = [sum(pair) for pair in zip(*parts, strict=True)]
    note = f"integrity and numeric checks, of a step of {step_s * 1e3:.1f} ms"
    return [
        _share("overhead_checks", together, note),
        integrity,
        numeric,
        await tracing(step_s, sizes),
    ]


def _encoded(frame: StepFrame) -> list[bytes]:
    return list(codec.encode_frame(frame))


async def micro(sizes: Sizes) -> list[Result]:
    """Codec and checksum alone."""
    step = a_step()
    tensor = Tensor(DType.F32, (PREFILL_TOKENS, HIDDEN), payload_of(PREFILL_TOKENS))
    row = StepRow(step.request, 0, tuple(range(PREFILL_TOKENS)))
    prefill = StepFrame(FrameKind.PREFILL, FINGERPRINT, EPOCH, 1, 0, 1, (row,), tensor).sealed()
    small, large = payload_of(1), bytes(1 << 20)
    actions: dict[str, Callable[[], object]] = {}
    for name, frame in (("decode", step.to_second), ("prefill", prefill)):
        encoded = next(iter(codec.encode_frame(frame)))
        actions[f"codec_encode_{name}_frame"] = partial(_encoded, frame)
        actions[f"codec_decode_{name}_frame"] = partial(codec.decode_request, encoded)
    actions["checksum_2304_bytes"] = lambda: crc32c(small)
    actions["checksum_1_mib"] = lambda: crc32c(large)
    return [
        measured(name, cpu_us(action, sizes.micro_seconds), unit="µs", higher_is_better=False)
        for name, action in actions.items()
    ]
