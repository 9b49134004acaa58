"""Fault × phase × stage, on real processes: one cell makes one fault happen at one point of a
generation, proves that it did, and reads every client's answer to the end.

A point of a generation is a frame: the first prefill chunk, the decode step of the fifth token.
``PHASES`` says which. The proxy on the hop *holds* that frame; while it is held the fault is
injected, and only then does it go on (or vanish, where the fault took its sender or its way). A
cell whose point was not reached is tried again a few times and then fails, and never passes.
"""

from __future__ import annotations

import asyncio
import enum
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from wires import PIPELINE, WiredMesh, Worker, within

from services.client import StreamChecker
from services.codec import LinkOpening
from services.fault_connection import Direction
from services.fault_proxy import FrameProxy, Hold, Passing
from services.rpc_errors import to_mesh_error
from services.stress.other_weights import write_other_weights
from stage_worker import model_source
from stagemesh.errors import MeshError
from stagemesh.frame import FrameKind, StepFrame
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import generation_service_pb2 as pb

TRIES_MAX = 3
REACHED_S_MAX = 60.0
ANSWER_S_MAX = 90.0
NOTICED_S_MAX = 10.0
SLOW_BYTES_PER_S = 400.0
"""A decode step of one request takes more than a second to cross, and is due again by then."""
SLOWEST_BYTES_PER_S = 100.0
SLOW_S_MIN = 4.5
"""Far beyond the deadline of a token, where a cell is to be slow for long."""
DRAIN_S = 20
PENALTIES = {"repetition": 1.125, "presence": -2.0, "frequency": 0.5}


class Fault(enum.Enum):
    KILL = "kill"
    OUT_OF_MEMORY = "out-of-memory"
    STOP = "stop"
    RESTART_EMPTY = "restart-empty"
    RESTART_OTHER = "restart-other-weights"
    BLACK_HOLE = "black-hole"
    HALF_OPEN = "half-open"
    RESET = "reset"
    SLOW = "slow-reader"


class Phase(enum.Enum):
    HANDSHAKE = "handshake"
    FIRST_CHUNK = "first-chunk"
    LATER_CHUNK = "later-chunk"
    BEFORE_FIRST_TOKEN = "before-first-token"
    MID_DECODE = "mid-decode"
    LAST_TOKEN = "last-token"
    DRAIN = "drain"


PROCESS_FAULTS = frozenset(
    {Fault.KILL, Fault.OUT_OF_MEMORY, Fault.STOP, Fault.RESTART_EMPTY, Fault.RESTART_OTHER}
)
"""The worker named is the one to blame."""
GENTLE = frozenset({Fault.RESET, Fault.SLOW})
"""May be repaired without a recovery, though not without a sign of it (``PATHS``)."""
PATHS = {
    Fault.RESET: ("links_reopened", "hop_faults."),
    Fault.SLOW: ("window_waits", "frames_retransmitted", "hop_faults."),
}
"""Counters of who dials the wire concerned that say that a gentle fault was met, or faults that the
coordinator was told of; a recovery says so as well."""
LONG_SLOW_PATHS = ("window_waits",)
MODES = ((False, 1), (True, 1), (False, 8), (True, 8))
"""(sampled, concurrent streams)."""


@dataclass(frozen=True, slots=True)
class Cell:
    fault: Fault
    phase: Phase
    stage: int

    def __str__(self) -> str:
        return f"{self.fault.value}-{self.phase.value}-{('first', 'middle', 'last')[self.stage]}"

    @property
    def number(self) -> int:
        return list(Fault).index(self.fault) * 5 + list(Phase).index(self.phase) + self.stage

    @property
    def mode(self) -> tuple[bool, int]:
        return MODES[self.number % len(MODES)]

    @property
    def behind(self) -> bool:
        """The frame is held on the hop out of the stage, not on the one into it."""
        if self.phase is Phase.BEFORE_FIRST_TOKEN:
            return self.fault is not Fault.SLOW
        either = self.phase in (Phase.MID_DECODE, Phase.LAST_TOKEN)
        return either and self.number % 2 == 1 and self.fault not in GENTLE | {Fault.HALF_OPEN}

    @property
    def is_slow_from_the_start(self) -> bool:
        """A slow reader is slow before the frame comes. Ahead of the first stage's wire a frame can
        only be held through the token before it, and a prompt has none."""
        slow = self.fault is Fault.SLOW
        return slow and (self.phase is Phase.HANDSHAKE or (self.stage == 0 and not self.decodes))

    @property
    def is_slow_for_long(self) -> bool:
        return self.fault is Fault.SLOW and self.phase is Phase.MID_DECODE

    @property
    def decodes(self) -> bool:
        return self.phase in (Phase.MID_DECODE, Phase.LAST_TOKEN, Phase.DRAIN)

    @property
    def ahead(self) -> int:
        """So many tokens before that of the phase, a frame is held."""
        return int(self.fault is Fault.SLOW and self.stage == 0 and self.decodes)

    @property
    def inbound(self) -> bool:
        """Which direction of the worker's wires a black hole takes: what comes to it, or what it
        says."""
        return not self.behind

    @property
    def dialler(self) -> str:
        """Who sends to the stage."""
        return PIPELINE[self.stage - 1] if self.stage else "coordinator"

    @property
    def wire(self) -> str:
        """Which of the worker's connections is reset."""
        return "control" if self.number % 3 == 0 else "data"

    @property
    def goes_on(self) -> bool:
        """What is already behind the stage may still arrive."""
        return self.fault is Fault.HALF_OPEN and self.behind

    @property
    def must_recover(self) -> bool:
        return self.phase is not Phase.HANDSHAKE and self.fault not in GENTLE


ALL_CELLS = tuple(
    Cell(fault, phase, stage) for phase in Phase for fault in Fault for stage in range(3)
)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what one machine answers to it."""

    prompt: tuple[int, ...]
    count: int
    temperature: float
    seed: int
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    answer: tuple[int, ...] = ()

    @property
    def is_penalised(self) -> bool:
        return (self.repetition, self.presence, self.frequency) != (1.0, 0.0, 0.0)

    def specification(self) -> dict[str, Any]:
        named = asdict(self)
        del named["answer"]
        return named

    def message(self, request_id: str) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            request_id=request_id,
            tokens=pb.TokenPrompt(token_ids=self.prompt),
            max_tokens=self.count,
            temperature=self.temperature,
            seed=self.seed,
            repetition_penalty=self.repetition,
            presence_penalty=self.presence,
            frequency_penalty=self.frequency,
            ignore_eos=True,
        )


@dataclass(slots=True)
class Stream:
    """One client: reads to the end, believes nothing, notes every arrival."""

    asked: Asked
    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    arrivals: list[float] = field(default_factory=list)
    finishes: list[pb.Finish] = field(default_factory=list)
    error: MeshError | None = None
    checker: StreamChecker | None = None

    @property
    def request(self) -> bytes:
        return uuid.UUID(self.request_id).bytes

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.checker.token_ids) if self.checker else ()

    @property
    def recoveries(self) -> list[pb.Recovery]:
        return [one for finish in self.finishes for one in finish.recoveries]

    async def read(self, mesh: WiredMesh) -> None:
        self.checker = StreamChecker(self.request, self.asked.prompt)
        request = self.asked.message(self.request_id)
        try:
            async for response in mesh.generation.Generate(request, timeout=ANSWER_S_MAX):
                if self.finishes:
                    raise AssertionError("something came behind the terminal response")
                before = len(self.checker.token_ids)
                if response.position != before and response.tokens:
                    raise AssertionError(f"position {response.position} behind {before} tokens")
                self.checker.check(response)
                self.arrivals += [time.monotonic()] * (len(self.checker.token_ids) - before)
                if response.HasField("finish"):
                    self.finishes.append(response.finish)
        except grpc.RpcError as error:
            self.error = to_mesh_error(error)

    def check(self) -> None:
        """Exactly what one machine answers, proved, and ended once."""
        assert self.error is None, f"{self.request_id}: {self.error!r} {self.error.metadata}"
        assert self.tokens == self.asked.answer, f"{self.tokens} is not {self.asked.answer}"
        assert len(self.finishes) == 1, f"{self.request_id}: {self.finishes}"
        assert self.finishes[0].reason == pb.FINISH_REASON_LENGTH, self.finishes
        assert self.checker is not None
        assert self.checker.links_checked == len(self.asked.answer), self.checker.links_checked

    @property
    def longest_gap_s(self) -> float:
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return max((later - earlier for earlier, later in pairs), default=0.0)


@dataclass(slots=True)
class Outcome:
    """What a cell saw."""

    cell: Cell
    tries: int = 1
    evidence: str = ""
    held: str = ""
    seconds: float = 0.0
    gap_s: float = 0.0
    causes: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()
    noticed: tuple[str, ...] = ()
    """What somebody said of a fault that may be repaired without a recovery."""
    slow_s: float = 0.0
    before: Counter[str] = field(default_factory=Counter, repr=False)
    """What the victim's wires had met when the fault began."""
    counted: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)
    """The guards' counters of every process, just before it began."""


class PhaseMissed(Exception):
    """The generation did not come by where it was awaited."""


def passes(
    request: bytes, phase: Phase, asked: Asked, *, ahead: int = 0
) -> Callable[[Passing], bool]:
    """Which frame stands for a phase of ``request``; or the one ``ahead`` tokens before it."""
    at_token = {
        Phase.MID_DECODE: asked.count // 3,
        Phase.DRAIN: asked.count // 3,
        Phase.LAST_TOKEN: asked.count - 1,
    }

    def matches(passing: Passing) -> bool:
        if isinstance(passing, LinkOpening):
            return phase is Phase.HANDSHAKE
        row = next((one for one in passing.rows if one.request == request), None)
        if row is None or (passing.hop_to < 0 and passing.hop_from == 0):
            return False  # another request's, or the full worker's
        if passing.kind is FrameKind.PREFILL:
            return {
                Phase.FIRST_CHUNK: row.first_position == 0,
                Phase.LATER_CHUNK: row.first_position > 0 and not row.samples,
                Phase.BEFORE_FIRST_TOKEN: row.samples,
            }.get(phase, False)
        is_decode = passing.kind is FrameKind.DECODE and phase in at_token
        position = len(asked.prompt) + at_token.get(phase, 0) - 1 - ahead
        return is_decode and row.first_position == position

    return matches


def tokens_before(phase: Phase, asked: Asked) -> int:
    """Answer tokens accepted when the frame of a phase is under way."""
    if phase in (Phase.MID_DECODE, Phase.DRAIN):
        return asked.count // 3
    return asked.count - 1 if phase is Phase.LAST_TOKEN else 0


class Matrix:
    """Runs cells, one after the other, on one mesh."""

    def __init__(self, mesh: WiredMesh, asked: dict[bool, list[Asked]]) -> None:
        self.mesh = mesh
        self.asked = asked

    # -- a cell -----------------------------------------------------------------------------

    async def run(self, cell: Cell, following: Sequence[Cell] = ()) -> Outcome:
        """Raises AssertionError for what must not be, PhaseMissed if it could not be tried."""
        await self.mesh.ready()
        for one in (cell, *following):
            self._foresee(one)
        began = time.monotonic()
        for tries in range(1, TRIES_MAX + 1):
            try:
                outcome = await self._once(cell)
            except PhaseMissed:
                await self._heal(cell)
                await self.mesh.ready()
                if tries == TRIES_MAX:
                    raise
                continue
            outcome.tries, outcome.seconds = tries, time.monotonic() - began
            return outcome
        raise PhaseMissed(str(cell))

    def _foresee(self, cell: Cell) -> None:
        """Have ready what this cell will need, while others wait for their deadlines."""
        name = PIPELINE[cell.stage]
        if cell.fault in PROCESS_FAULTS - {Fault.STOP} or cell.phase is Phase.DRAIN:
            self.mesh.expect(name)
        if cell.fault is Fault.RESTART_OTHER:
            self.mesh.expect(name, model=other_weights(self.mesh))

    async def _once(self, cell: Cell) -> Outcome:
        victim = self.mesh.workers[PIPELINE[cell.stage]]
        if cell.fault in PROCESS_FAULTS - {Fault.STOP}:
            await self.mesh.spare_is_loaded(victim.name)
        if cell.fault is Fault.RESTART_OTHER:
            await self.mesh.spare_is_loaded(victim.name, model=other_weights(self.mesh))
        streams = self._streams(cell)
        main, outcome = streams[0], Outcome(cell)
        proxy = self._proxy(cell, victim)
        hold = proxy.hold(passes(main.request, cell.phase, main.asked, ahead=cell.ahead))
        reading = []
        outcome.before = victim.counts()
        if cell.is_slow_from_the_start:
            victim.data.slow_down(Direction.FORWARD, SLOW_BYTES_PER_S)
        try:
            if cell.phase is Phase.HANDSHAKE:
                await self._reopen(victim)
            else:
                reading = [asyncio.create_task(one.read(self.mesh)) for one in streams]
            await self._reached(cell, hold, reading)
            if cell.phase is Phase.HANDSHAKE:
                reading = [asyncio.create_task(one.read(self.mesh)) for one in streams]
            await self._inject(cell, victim, main, hold, outcome)
            hold.release(drop=self._vanishes(cell))
            if cell.fault is Fault.SLOW:
                await self._slow_enough(cell, victim, streams, outcome, reading)
                victim.data.heal()
            await asyncio.gather(*reading)
        finally:
            proxy.forget(hold)
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
        await self._judge(cell, victim, streams, outcome)
        await self._heal(cell)
        return outcome

    @staticmethod
    async def _reached(cell: Cell, hold: Hold, reading: list[asyncio.Task[None]]) -> None:
        """Until the frame is held. An answer that ends without it went another way."""
        awaited = asyncio.create_task(hold.reached.wait())
        both = {awaited, *reading[:1]}
        await asyncio.wait(both, timeout=REACHED_S_MAX, return_when=asyncio.FIRST_COMPLETED)
        if not awaited.done():
            awaited.cancel()
            went_by = bool(reading) and reading[0].done()
            said = "the answer ended without it" if went_by else "nor did anything else"
            raise PhaseMissed(f"{cell}: the frame never came, {said}")

    def _streams(self, cell: Cell) -> list[Stream]:
        is_sampled, count = cell.mode
        return [Stream(one) for one in self.asked[is_sampled][:count]]

    def _proxy(self, cell: Cell, victim: Worker) -> FrameProxy:
        if cell.fault is Fault.SLOW and not cell.is_slow_from_the_start:
            ahead = cell.stage - 1
            return self.mesh.workers[PIPELINE[ahead]].frames if ahead >= 0 else self.mesh.returned
        if not cell.behind:
            return victim.frames
        if cell.stage + 1 < len(PIPELINE):
            return self.mesh.workers[PIPELINE[cell.stage + 1]].frames
        return self.mesh.returned

    @staticmethod
    def _vanishes(cell: Cell) -> bool:
        """Whether the held frame is lost with the fault: its sender, receiver or way is gone."""
        return cell.fault not in GENTLE and cell.phase is not Phase.HANDSHAKE

    async def _reopen(self, victim: Worker) -> None:
        """Make the route open anew: another stage's control stream breaks, and it dials again."""
        other = next(name for name in PIPELINE if name != victim.name)
        self.mesh.workers[other].control.reset()

    # -- the fault --------------------------------------------------------------------------

    async def _inject(
        self, cell: Cell, victim: Worker, main: Stream, hold: Hold, outcome: Outcome
    ) -> None:
        if cell.phase is not Phase.HANDSHAKE:
            seen = await self.mesh.generation_of(main.request_id)
            wanted = tokens_before(cell.phase, main.asked) - cell.ahead
            if seen.completion_tokens != wanted or list(seen.route) != list(PIPELINE):
                raise PhaseMissed(f"{cell}: {seen.completion_tokens} tokens, not {wanted}")
        if cell.phase is Phase.DRAIN:
            request = admin.DrainWorkerRequest(worker=victim.name, timeout_s=DRAIN_S)
            await self.mesh.admin.DrainWorker(request, timeout=5.0)
        if not hold.waiting:
            raise PhaseMissed(f"{cell}: the frame had gone on")
        outcome.held = described(hold.seen)
        outcome.counted = await self._counted()
        if not cell.is_slow_from_the_start:
            outcome.before = victim.counts()
        outcome.evidence = await getattr(self, f"_{cell.fault.name.lower()}")(cell, victim)

    async def _kill(self, cell: Cell, victim: Worker) -> str:
        victim.signal(signal.SIGKILL)
        status = await victim.ended()
        assert status == -signal.SIGKILL, f"exit status {status}"
        return f"exit status {status}"

    async def _out_of_memory(self, cell: Cell, victim: Worker) -> str:
        """As an allocator ends a process that it has nothing left for: std::terminate aborts."""
        victim.signal(signal.SIGABRT)
        status = await victim.ended()
        assert status == -signal.SIGABRT, f"exit status {status}"
        return f"exit status {status}"

    async def _stop(self, cell: Cell, victim: Worker) -> str:
        victim.signal(signal.SIGSTOP)
        assert await within(5.0, is_stopped(victim)), victim.status()
        return f"pid {victim.pid} is {victim.status()}"

    async def _restart_empty(self, cell: Cell, victim: Worker) -> str:
        said = await self._kill(cell, victim)
        fresh = await self.mesh.replace(victim.name)
        return f"{said}; pid {victim.pid} became {fresh.pid}"

    async def _restart_other(self, cell: Cell, victim: Worker) -> str:
        said = await self._kill(cell, victim)
        stranger = await self.mesh.spare(victim.name, model=other_weights(self.mesh))
        self.mesh.admit(stranger)
        return f"{said}; pid {victim.pid} became {stranger.pid}"

    async def _black_hole(self, cell: Cell, victim: Worker) -> str:
        if cell.inbound:
            victim.data.black_hole(Direction.FORWARD)
            victim.control.black_hole(Direction.BACK)
            return "nothing reaches it"
        victim.data.black_hole(Direction.BACK)
        victim.control.black_hole(Direction.FORWARD)
        if cell.stage + 1 < len(PIPELINE):
            following = self.mesh.workers[PIPELINE[cell.stage + 1]]
            following.data.black_hole(Direction.FORWARD)
        else:
            last = cell.stage
            self.mesh.returned.swallow_matching = lambda frame: frame.hop_from == last
        return "nothing of it arrives"

    async def _half_open(self, cell: Cell, victim: Worker) -> str:
        before = victim.counts()
        victim.data.half_open()
        if cell.number % 2:
            victim.control.half_open()
        now = victim.counts() - before
        assert now["data half-opened"]
        assert now["control half-opened"] or not cell.number % 2
        return f"{now}"

    async def _reset(self, cell: Cell, victim: Worker) -> str:
        before = victim.counts()
        getattr(victim, cell.wire).reset()
        now = victim.counts() - before
        assert now[f"{cell.wire} reset"]
        return f"{now}"

    async def _slow(self, cell: Cell, victim: Worker) -> str:
        rate = SLOWEST_BYTES_PER_S if cell.is_slow_for_long else SLOW_BYTES_PER_S
        victim.data.slow_down(Direction.FORWARD, rate)
        return f"{rate:.0f} bytes a second"

    async def _slow_enough(
        self,
        cell: Cell,
        victim: Worker,
        streams: list[Stream],
        outcome: Outcome,
        reading: list[asyncio.Task[None]],
    ) -> None:
        """Until somebody noticed, or there is nobody left to."""
        began = time.monotonic()
        least_s = SLOW_S_MIN if cell.is_slow_for_long else 0.0
        while time.monotonic() - began <= least_s or not (
            all(one.done() for one in reading)
            or await self._noticed(cell, victim, streams, outcome)
        ):
            await asyncio.sleep(0.05)
        outcome.slow_s = time.monotonic() - began

    # -- behind it --------------------------------------------------------------------------

    async def _judge(
        self, cell: Cell, victim: Worker, streams: list[Stream], outcome: Outcome
    ) -> None:
        for stream in streams:
            stream.check()
        main = streams[0]
        outcome.gap_s = max(stream.longest_gap_s for stream in streams)
        outcome.causes = tuple(one.cause for one in main.recoveries)
        outcome.blamed = tuple(one.worker for one in main.recoveries)
        if cell.must_recover:
            assert main.recoveries, f"{cell}: nothing was recovered, yet {outcome.evidence}"
            first = main.recoveries[0]
            assert first.cause, main.recoveries
            assert first.action == "reroute", main.recoveries
            assert list(first.from_route) == list(PIPELINE), main.recoveries
            kept = tokens_before(cell.phase, main.asked)
            assert first.kept == kept or (first.kept > kept and cell.goes_on), main.recoveries
            if cell.fault in PROCESS_FAULTS:
                assert first.worker == victim.name, f"{first.worker} was blamed"
        shown = await self.mesh.generation_of(main.request_id)
        assert list(shown.recoveries) == main.recoveries, shown
        assert shown.state == admin.GENERATION_STATE_FINISHED, shown
        self._check_wires(cell, victim, outcome)
        if cell.fault in GENTLE:
            noticed = await within(NOTICED_S_MAX, self._is_noticed(cell, victim, streams, outcome))
            assert noticed, f"{cell}: nobody noticed. {outcome.evidence}"

    async def _is_noticed(
        self, cell: Cell, victim: Worker, streams: list[Stream], outcome: Outcome
    ) -> None:
        """The fault had an effect, and not only on the wire: somebody has said so. A wire that was
        reset has been dialled again."""
        while cell.fault is Fault.RESET and cell.phase is not Phase.DRAIN:
            if (victim.counts() - outcome.before)[f"{cell.wire} accepted"]:
                break
            await asyncio.sleep(0.05)
        while not await self._noticed(cell, victim, streams, outcome):
            await asyncio.sleep(0.05)

    async def _noticed(
        self, cell: Cell, victim: Worker, streams: list[Stream], outcome: Outcome
    ) -> bool:
        """The request has been recovered, or a counter that is there for such a fault has risen.
        Of what slows an opening down, or ends a control stream while its route opens, there is
        nothing more to see than its wires show."""
        met = victim.counts() - outcome.before
        if cell.fault is Fault.SLOW and not met["data slowed forward"]:
            return False
        if cell.phase is Phase.HANDSHAKE and (cell.fault is Fault.SLOW or cell.wire == "control"):
            return True
        paths = LONG_SLOW_PATHS if cell.is_slow_for_long else PATHS[cell.fault]
        now = await self._counted()
        risen = {
            f"{process} {name}"
            for (process, name), count in now.items()
            if name.startswith(paths)
            and (process == cell.dialler or name.startswith("hop_faults."))
            and count > outcome.counted.get((process, name), 0)
        }
        if (await self.mesh.generation_of(streams[0].request_id)).recoveries:
            risen.add("recovered")
        outcome.noticed = tuple(sorted(risen))
        return bool(risen)

    async def _counted(self) -> dict[tuple[str, str], int]:
        """(process, counter) → count, of every process."""
        seen = await self.mesh.diagnostics()
        named = [("coordinator", seen.counters), *((w.worker, w.counters) for w in seen.workers)]
        return {(who, name): count for who, some in named for name, count in some.items()}

    @staticmethod
    def _check_wires(cell: Cell, victim: Worker, outcome: Outcome) -> None:
        """The connection faults met traffic, of this cell."""
        met = victim.counts() - outcome.before
        if cell.fault is Fault.BLACK_HOLE:
            data, control = ("forward", "back") if cell.inbound else ("back", "forward")
            silent = met[f"data held {data}"] + met[f"control held {control}"]
            assert silent, f"{cell}: the black hole met nothing"
        if cell.fault is Fault.SLOW:
            assert met["data slowed forward"], f"{cell}: nothing was slowed down"
        if cell.is_slow_for_long:
            assert outcome.slow_s > SLOW_S_MIN, f"{cell}: over after {outcome.slow_s:.1f} s"

    async def _heal(self, cell: Cell) -> None:
        """Put everything right but what the mesh puts right by itself."""
        name = PIPELINE[cell.stage]
        victim = self.mesh.workers[name]
        self.mesh.returned.swallow_matching = None
        for worker in self.mesh.workers.values():
            worker.data.heal()
            worker.control.heal()
        if cell.fault is Fault.RESTART_OTHER and victim.is_alive:
            assert await within(10.0, says(victim, "other weights")), victim.log.read_text()
            await self.mesh.replace(name)
            return
        if cell.fault is Fault.STOP:
            pid = victim.pid
            victim.signal(signal.SIGCONT)
            if cell.phase is not Phase.DRAIN:
                await self.mesh.ready()
                assert self.mesh.workers[name].pid == pid
                return
        if cell.phase is Phase.DRAIN and cell.fault is not Fault.RESTART_EMPTY:
            assert await within(15.0, victim.ended()), f"{name} was drained and stays"
        if not victim.is_alive:
            await self.mesh.replace(name)


async def is_stopped(worker: Worker) -> None:
    while worker.status() != "stopped":
        await asyncio.sleep(0.005)


async def says(worker: Worker, words: str) -> None:
    while words not in worker.log.read_text(errors="replace"):
        await asyncio.sleep(0.05)


def other_weights(mesh: WiredMesh) -> str:
    """A model of the same shape that is not the mesh's."""
    if not Path(mesh.model).is_dir():
        return f"{mesh.model},seed=9"
    copy = mesh.directory / "other-weights"
    return str(copy if copy.exists() else write_other_weights(Path(mesh.model), copy))


def described(seen: Passing | None) -> str:
    """A held message in a few words."""
    if isinstance(seen, StepFrame):
        rows = " ".join(f"{one.first_position}+{len(one.token_ids)}" for one in seen.rows)
        return f"{seen.kind.name} step {seen.step} hop {seen.hop_from}→{seen.hop_to} rows {rows}"
    return f"opening of epoch {seen.epoch}" if seen is not None else ""


def requests(prompt_tokens: int, companion_tokens: int, count: int) -> dict[bool, list[Asked]]:
    """Eight greedy and eight sampled requests; the first has the longest prompt. Of each kind
    every other one is penalised, of the sampled ones the first: so that its own tokens come again
    and again, and what is drawn hangs on all of the answer so far."""

    def prompt(index: int) -> tuple[int, ...]:
        length = prompt_tokens if index == 0 else companion_tokens + index
        return tuple(
            3 + (index * 37 + position * 11 + position // 7) % 250 for position in range(length)
        )

    def one(index: int, is_sampled: bool) -> Asked:
        plain = Asked(prompt(index), count, 0.8 if is_sampled else 0.0, 100 + index)
        return replace(plain, **PENALTIES) if is_sampled == (index % 2 == 0) else plain

    return {
        is_sampled: [one(index, is_sampled) for index in range(8)] for is_sampled in (False, True)
    }


def answered(asked: dict[bool, list[Asked]], answers: list[list[int]]) -> dict[bool, list[Asked]]:
    """The same requests with what one machine answers, in the order of ``flat``."""
    given = iter(answers)
    return {
        key: [replace(one, answer=tuple(next(given))) for one in some]
        for key, some in asked.items()
    }


def flat(asked: dict[bool, list[Asked]]) -> list[dict[str, Any]]:
    return [one.specification() for some in asked.values() for one in some]


def undisturbed(model: str, asked: dict[bool, list[Asked]]) -> dict[bool, list[Asked]]:
    """What one machine answers, computed by mlx-lm in a process of its own."""
    return answered(asked, reference(model, flat(asked)))


def reference(model: str, specifications: list[dict[str, Any]]) -> list[list[int]]:
    """See the program of this name."""
    directory = model_source.resolve(model).directory
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("reference.py"))],
        input=json.dumps({"model": str(directory), "requests": specifications}),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    answers: list[list[int]] = json.loads(done.stdout)
    return answers
