"""Everything a stress run looks at is judged: each thing that can be wrong makes it fail."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import psutil
import pytest

from services.client import ConnectionLost
from services.settings import load
from services.stress import remains, session
from services.stress.history import Answer, End, Line, Mark, Repair
from services.stress.packets import Fate
from services.stress.plan import FaultName, builtin
from services.stress.remains import _wrong_barriers, leftovers, look_at_remains
from services.stress.schedule import Injection
from services.stress.session import Run, Wanted
from services.stress.verdict import RSS_SAMPLES_MIN, Life
from services.stress.workload import Question
from stage_worker.model_source import ResolvedModel
from stagemesh.errors import RequestUnknown
from stagemesh.v1 import admin_service_pb2 as admin
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1.token_pb2 import TokenChunk

TOKENS = (11, 12, 13)
QUESTION = Question(0, (5, 6), len(TOKENS), 0.0, 1, shadow=False)
STEADY = Life("stage-0", 1, (100.0,) * RSS_SAMPLES_MIN)


def an_answer(*, tokens: tuple[int, ...] = TOKENS, silent_s: float = 0.0) -> Answer:
    lines = [Line(0.1, 0, tokens[:1], 7), Line(0.2 + silent_s, 1, tokens[1:], 7)]
    return Answer(0, 0, "id-0", 0.0, lines=lines, ends=[End(0.3 + silent_s, "length", 3)])


class Stage:
    """A mesh, its clients, its faults and whoever looks at them: all well, until something is
    changed."""

    def __init__(self) -> None:
        self.answers = [an_answer()]
        self.marks = [Mark(0, "drop", "a", 1.0, 1.0, 1.0, True, "step 3", "counter:x")]
        self.numbers = {"counter:frames_retransmitted": 1, "counter:frames_checked": 100}
        self.lives = [STEADY]
        self.is_whole = True
        self.unrecovered: list[str] = []
        self.read: tuple[int, ...] | Exception | None = TOKENS
        self.mesh = admin.GetMeshResponse()
        self.packets: dict[str, int] = {}
        self.links: list[str] = []
        self.leftover: dict[int, float] = {}
        self.is_mute = False


class FakeClient:
    """Reads again, and says what the mesh holds."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def resume(self, _request: str, _position: int) -> AsyncIterator[pb.GenerateResponse]:
        if self.stage.read is None:
            await asyncio.Event().wait()
        if isinstance(self.stage.read, Exception):
            raise self.stage.read
        yield pb.GenerateResponse(tokens=[TokenChunk(token_id=one) for one in self.stage.read])

    async def mesh(self) -> admin.GetMeshResponse:
        if self.stage.is_mute:
            raise ConnectionLost("the coordinator is gone")
        return self.stage.mesh

    async def diagnostics(self) -> admin.GetDiagnosticsResponse:
        return admin.GetDiagnosticsResponse()

    async def trace(self, _request: str) -> bytes:
        raise RequestUnknown("pushed out by later ones")


class FakeReaders:
    """Have asked already."""

    resumes = tokens = asked_again = 0

    def __init__(self, stage: Stage) -> None:
        self.answers, self.stop = stage.answers, asyncio.Event()

    async def run(self, _streams: int) -> None:
        await self.stop.wait()


class FakeWatch:
    """Has seen everything already."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.samples, self.causes = stage, [], Counter()

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def look(self) -> None:
        pass

    def lives(self) -> list[Life]:
        return self.stage.lives

    def reading(self) -> dict[str, int]:
        return self.stage.numbers

    def counters(self) -> dict[str, int]:
        return {name.removeprefix("counter:"): one for name, one in self.stage.numbers.items()}


class FakeInjector:
    """Has carried everything out already."""

    restarts = ()

    def __init__(self, stage: Stage) -> None:
        self.stage, self.marks, self.unrecovered = stage, stage.marks, stage.unrecovered

    async def run(self, _injections: object) -> None:
        pass

    async def whole(self) -> bool:
        return self.stage.is_whole


class FakeNetwork:
    clients = "nowhere"
    rewired = staticmethod(tuple)
    is_remote = False

    def __init__(self, stage: Stage) -> None:
        self.stage, self.coordinator = stage, "nowhere"

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def tls(self, _role: str) -> None:
        return None

    def heal(self) -> None:
        pass

    def counts(self) -> dict[str, int]:
        return self.stage.packets

    def judge(self, tally) -> None:
        for why in self.stage.links:
            tally.found("S", why)


@contextlib.asynccontextmanager
async def a_mesh(*_: object, **__: object):
    async def status() -> admin.GetMeshResponse:
        return admin.GetMeshResponse()

    yield SimpleNamespace(address="nowhere", status=status, supervisor=SimpleNamespace(pids={}))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """What ``session`` plays on."""
    one = Stage()

    async def prepared(run: Run, _progress: object) -> None:
        run.injections = (Injection(0, 1.0, FaultName.DROP, 0),)
        run.pool, run.expected = (QUESTION,), {0: TOKENS}

    def watch(*_: object, ages: dict[int, float]) -> FakeWatch:
        ages.update(one.leftover)
        return FakeWatch(one)

    for name, fake in {
        "_prepare": prepared,
        "network_of": lambda _wanted: FakeNetwork(one),
        "local_mesh": a_mesh,
        "write_other_weights": lambda _model, folder: folder,
        "MeshClient": lambda *_, **__: FakeClient(one),
        "Readers": lambda *_, **__: FakeReaders(one),
        "Watch": watch,
        "Injector": lambda *_: FakeInjector(one),
        "READ_AGAIN_S_MAX": 0.2,
    }.items():
        monkeypatch.setattr(session, name, fake)
    monkeypatch.setattr(remains, "EMPTY_S_MAX", 0.2)
    monkeypatch.setattr(remains, "POLL_S", 0.01)
    return one


async def judged(tmp_path: Path) -> Run:
    wanted = Wanted(
        settings=load(environment={}, flags={"stages": 3}),
        model=ResolvedModel(tmp_path, "tiny", "tiny"),
        plan=replace(builtin("drop"), settle_s=30.0),
        seed=9,
        duration_s=0.05,
        streams=2,
        folder=tmp_path,
        command="",
    )
    return await session.stress(
        wanted, note=lambda _: None, progress=lambda *_: None, shown=lambda _: None
    )


async def test_a_run_in_which_all_was_well_has_no_violation(tmp_path: Path, stage: Stage):
    run = await judged(tmp_path)
    assert run.tally.violations == []
    assert run.ok
    assert run.answers[0].again == TOKENS


def wrong_token(stage: Stage) -> None:
    stage.read = (11, 99, 13)
    stage.answers[:] = [an_answer(tokens=stage.read)]


def silent(stage: Stage) -> None:
    stage.answers[:] = [an_answer(silent_s=1e4)]


def other_second_reading(stage: Stage) -> None:
    stage.read = (11, 12, 99)


def unreadable(stage: Stage) -> None:
    stage.read = RequestUnknown("nobody remembers")


def endless_second_reading(stage: Stage) -> None:
    stage.read = None


def not_whole(stage: Stage) -> None:
    stage.is_whole = False


def unrecovered(stage: Stage) -> None:
    stage.unrecovered.append("not whole 90 s after #3")


def not_fired(stage: Stage) -> None:
    stage.marks[:] = [replace(stage.marks[0], fired=False)]


def path_never_taken(stage: Stage) -> None:
    stage.numbers["counter:frames_retransmitted"] = 0


def forged_unnoticed(stage: Stage) -> None:
    stage.packets[Fate.FORGED.value] = 99


def links_never_bad(stage: Stage) -> None:
    stage.links.append("no packet was lost")


def leaking(stage: Stage) -> None:
    readings = tuple(100.0 + at for at in range(400))
    stage.lives.append(Life("stage-1", 2, readings))


def repeating(stage: Stage) -> None:
    stage.numbers["counter:frames_retransmitted"] = 100_000


def queued(stage: Stage) -> None:
    stage.mesh.queued = 1


def mute(stage: Stage) -> None:
    stage.is_mute = True


def process_left(stage: Stage) -> None:
    stage.leftover[os.getpid()] = psutil.Process().create_time()


@pytest.mark.parametrize(
    ("spoil", "violation"),
    [
        (wrong_token, "I1 request id-0: 1 wrong tokens; the first at position 1: 99, not 12"),
        (silent, "I6 request id-0: silent for 10000 s"),
        (other_second_reading, "I2 request id-0: a second reading gave other tokens"),
        (unreadable, "I2 request id-0: cannot be read again"),
        (endless_second_reading, "I2 request id-0: reading it again did not end in 0.2 s"),
        (not_whole, "I6: the mesh is not whole after the last fault"),
        (unrecovered, "I6: not whole 90 s after #3"),
        (not_fired, "S: drop: 1 of 1 never fired"),
        (path_never_taken, "S: the path counter:frames_retransmitted was never taken"),
        (forged_unnoticed, "S: packets were forged, and nobody noticed"),
        (links_never_bad, "S: no packet was lost"),
        (leaking, "I7: stage-1 (pid 2) grew from"),
        (repeating, "I11: 100000 frames were sent again"),
        (queued, "I7: 1 queued after the end"),
        (mute, "I7: the mesh did not say what is left: the coordinator is gone"),
        (process_left, "I7: processes are left: "),
    ],
)
async def test_each_thing_that_is_wrong_fails_the_run(
    tmp_path: Path, stage: Stage, spoil, violation: str
):
    spoil(stage)
    run = await judged(tmp_path)
    assert violation in "\n".join(map(str, run.tally.violations))
    assert not run.ok
    others = [str(one) for one in run.tally.violations if not str(one).startswith(violation)]
    assert others == [], "and nothing else is said"


def test_traces_of_answers_that_had_recoveries_are_looked_at_first():
    repair = Repair("STAGE_UNREACHABLE", "reroute", "stage-1", ("a",), ("b",), 7, 2, 4, 0.1)

    def ended(number: int, *, repairs=(), **facts) -> Answer:
        end = End(9.0, "length", 4, 2, repairs)
        return Answer(number, 0, f"id-{number}", **{"asked_at": 5.0, "ends": [end]} | facts)

    answers = [
        ended(0, repairs=(repair,)),
        ended(1, asked_at=1.0, repairs=(repair,)),  # of an earlier coordinator
        ended(2, attached=[0, 3], repairs=(repair,)),  # its later streams have traces of their own
        ended(3, ends=[]),
        *(ended(number) for number in range(4, 4 + 2 * remains.TRACES_MAX)),
    ]
    chosen = session._traced(answers, since=2.0)
    assert len(chosen) == 1 + 2 * remains.TRACES_MAX
    assert chosen[-1] == "id-0"


# -- what is left ----------------------------------------------------------------------------------


class Mesh:
    """Says what is in it, one thing after the other; the last for ever."""

    def __init__(self, *states: admin.GetMeshResponse, barriers=()) -> None:
        self.states, self.barriers = list(states), barriers

    async def mesh(self) -> admin.GetMeshResponse:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    async def diagnostics(self) -> admin.GetDiagnosticsResponse:
        return admin.GetDiagnosticsResponse(barriers=self.barriers)


def a_state(*, kv_tokens: int = 0, at_worker: int = 0, in_flight: int = 0, requests: int = 0):
    state = admin.GetMeshResponse()
    worker = state.workers.add(kv_tokens=kv_tokens, in_flight=at_worker)
    worker.worker.name = "stage-0"
    state.routes.add(epoch=7, in_flight=in_flight, requests=requests)
    return state


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"kv_tokens": 3}, ({"stage-0": 3}, 0, 0)),
        ({"at_worker": 2}, ({"stage-0": 0}, 2, 0)),
        ({"in_flight": 1, "at_worker": 2}, ({"stage-0": 0}, 3, 0)),
        ({"requests": 4}, ({"stage-0": 0}, 0, 4)),
        ({}, ({"stage-0": 0}, 0, 0)),
    ],
)
async def test_caches_steps_and_requests_that_are_left_are_counted(monkeypatch, state, found):
    monkeypatch.setattr(remains, "EMPTY_S_MAX", 0.1)
    monkeypatch.setattr(remains, "POLL_S", 0.01)
    left = await look_at_remains(Mesh(a_state(**state)), [])
    assert (left.kv_tokens, left.in_flight, left.on_routes) == found
    late = Mesh(a_state(**state), a_state(**state), a_state())
    assert (await look_at_remains(late, [])).kv_tokens == {"stage-0": 0}, "a moment is given"


def test_a_process_that_lives_is_left_and_one_that_ended_or_is_another_is_not():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        born = psutil.Process(child.pid).create_time()
        assert [one.split()[0] for one in leftovers({child.pid: born})] == [str(child.pid)]
        assert leftovers({child.pid: born - 1.0}) == [], "the id is another process's now"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert leftovers({child.pid: born}) == [], "it only waits to be collected"
        child.wait()
        assert leftovers({child.pid: born}) == []
    finally:
        child.kill()
        child.communicate()


LATE_MS = remains.BARRIER_LATE_MS


@pytest.mark.parametrize(
    ("state", "absent", "age_ms", "wrong"),
    [
        ("forming", ["b"], LATE_MS, []),
        ("forming", ["b"], LATE_MS + 1, [f"barrier open stands for {LATE_MS + 1} ms"]),
        ("complete", ["b", "c"], 5, ["barrier open is complete without b, c"]),
        ("complete", [], LATE_MS + 1, []),
        ("broken", ["b"], LATE_MS + 1, []),
    ],
)
async def test_a_barrier_that_stands_too_long_or_lacks_somebody_is_wrong(
    state, absent, age_ms, wrong
):
    barrier = admin.BarrierStatus(name="open", state=state, absent=absent, age_ms=age_ms)
    assert _wrong_barriers([barrier]) == wrong
    left = await look_at_remains(Mesh(a_state(), barriers=[barrier]), [])
    assert left.barriers == tuple(wrong)
