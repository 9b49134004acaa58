"""One stress run from beginning to end.

1  mlx-lm answers the pool of questions, undisturbed
2  proxies, processes, readers; the schedule is carried out while answers stream
3  no more faults, no more questions: everything that was asked has to end in time
4  answers are read a second time, caches and processes are counted, spans are gathered
5  the judge looks at the history
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from services.client import MeshClient
from services.mesh_report import environment_json
from services.settings import Settings
from services.stress import paths
from services.stress.expected import Undisturbed, expect, margin_least
from services.stress.history import Answer, Mark
from services.stress.injector import Injector
from services.stress.machines import Machines
from services.stress.network import Network
from services.stress.other_weights import write_other_weights
from services.stress.packets import Fate
from services.stress.plan import FaultName, Plan
from services.stress.readers import Readers, read_again
from services.stress.remains import leftovers, look_at_remains
from services.stress.schedule import Injection, schedule
from services.stress.verdict import (
    Life,
    Tally,
    judge,
    judge_faults,
    judge_lives,
    judge_remains,
    judge_retries,
    judge_silence,
    patience_until,
)
from services.stress.watch import Sample, Watch
from services.stress.wires import Wires
from services.stress.workload import Question, draw_question
from services.up import LocalMesh, Wishes, local_mesh
from stage_worker.model_source import ResolvedModel
from stage_worker.weights import read_config
from stagemesh.errors import MeshError, ModelRefused

READ_AGAIN_MAX = 60
"""Answers that are read a second time; the mesh keeps more than this."""
READ_AGAIN_S_MAX = 30.0
"""One answer has to be read in this time, and no other is begun behind it."""
OVERRUN_S_MAX = 900.0
"""A schedule whose faults had to wait may take so much longer than the run."""

Note = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What kind of run. ``folder``: logs, journal and the history go there."""

    settings: Settings
    model: ResolvedModel
    plan: Plan
    seed: int
    duration_s: float
    streams: int
    folder: Path
    command: str
    """What replays it."""
    is_lossy: bool = False
    """Each process on a machine of its own, with bad links between them."""
    plaintext: bool = False
    """Without TLS there."""

    @property
    def stages(self) -> int:
        """Of the pipeline."""
        return len(self.settings.mesh.spans) or self.settings.mesh.stages


@dataclass(slots=True)
class Run:
    """A run, as it goes on and once it is over. Times are seconds since readers began."""

    wanted: Wanted
    injections: tuple[Injection, ...] = ()
    pool: tuple[Question, ...] = ()
    expected: dict[int, tuple[int, ...]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    counters: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    network: dict[str, int] = field(default_factory=dict)
    """What became of packets, where the network is made of packets."""
    tally: Tally = field(default_factory=Tally)
    resumes: int = 0
    asked_again: int = 0
    began: float = 0.0
    faults_ended_at: float = 0.0
    ended_at: float = 0.0
    phase: str = "preparing"
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    """Set to end the faults now and judge what was seen."""

    @property
    def ok(self) -> bool:
        """Nothing was violated, and something was asked."""
        return not self.tally.violations and bool(self.answers)

    def clock(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    def recovery_seconds(self) -> list[float]:
        """Of every recovery that a finish told of."""
        return sorted(
            one.seconds for answer in self.answers for end in answer.ends for one in end.repairs
        )


async def stress(
    wanted: Wanted, *, note: Note, progress: Progress, shown: Callable[[Run], None]
) -> Run:
    """Carry a run out. ``shown`` is given the run before the faults begin, to look at meanwhile.

    Raises MeshError kinds for a model, a port or a process that does not start.
    """
    run = Run(wanted)
    await _prepare(run, progress)
    network = network_of(wanted)
    other = await asyncio.to_thread(
        write_other_weights, wanted.model.directory, wanted.folder / "other-weights"
    )
    try:
        await network.start()
        wishes = Wishes(
            settings=wanted.settings,
            listen=network.coordinator,
            run_directory=wanted.folder,
            certs=_certificates(wanted),
            adapt=network.rewired,
            is_remote=network.is_remote,
        )
        ages: dict[int, float] = {}
        async with local_mesh(wishes, report=note) as mesh:
            await _play(run, mesh, network, other, ages, shown)
        leftover = leftovers(ages)
        if leftover:
            run.tally.found("I7", f"processes are left: {', '.join(leftover)}")
    finally:
        await network.stop()
        shutil.rmtree(other, ignore_errors=True)
    run.phase = "done"
    return run


def network_of(wanted: Wanted) -> Network:
    """What connects the processes; not started yet."""
    if wanted.is_lossy:
        return Machines(wanted.stages, wanted.seed, _certificates(wanted))
    return Wires(wanted.stages)


def _certificates(wanted: Wanted) -> Path | None:
    return wanted.folder / "certs" if wanted.is_lossy and not wanted.plaintext else None


async def _prepare(run: Run, progress: Progress) -> None:
    wanted = run.wanted
    settings = wanted.settings
    config = read_config(wanted.model.directory)
    inner = config.get("text_config")
    vocabulary = config.get("vocab_size") or (inner or {}).get("vocab_size")
    if not isinstance(vocabulary, int):
        raise ModelRefused("the model's configuration does not say how large its vocabulary is")
    run.injections = schedule(wanted.plan, wanted.seed, wanted.duration_s, wanted.stages)
    side = Undisturbed(
        wanted.model.directory,
        dtype=settings.mesh.dtype,
        deterministic=settings.mesh.deterministic,
    )
    workload = wanted.plan.workload

    def draw(number: int, attempt: int) -> Question:
        return draw_question(workload, wanted.seed, vocabulary, number, attempt)

    async with side:
        exact = settings.mesh.deterministic
        margin = margin_least(str(side.facts.get("dtype", "")), exact=exact)
        found = await expect(side, draw, workload.answers, progress, margin=margin)
    run.pool = tuple(found)
    run.expected = {question.number: tokens for question, tokens in found.items()}


async def _play(
    run: Run,
    mesh: LocalMesh,
    network: Network,
    other: Path,
    ages: dict[int, float],
    shown: Callable[[Run], None],
) -> None:
    wanted = run.wanted
    run.environment = environment_json(await mesh.status())
    run.began = time.monotonic()
    readers = Readers(
        network.clients, wanted.seed, run.pool, run.expected, run.clock, tls=network.tls("client")
    )
    run.answers = readers.answers
    async with AsyncExitStack() as stack:
        looking = await stack.enter_async_context(
            MeshClient(mesh.address, tls=network.tls("admin"))
        )

        def outside() -> dict[str, int]:
            return {"client:resumes": readers.resumes, "client:tokens": readers.tokens}

        watch = Watch(looking, lambda: mesh.supervisor.pids, outside, run.clock, ages=ages)
        injector = Injector(mesh, network, watch, wanted.plan, run.clock, other)
        run.marks, run.samples, run.causes = injector.marks, watch.samples, watch.causes
        run.phase = "running"
        shown(run)
        watching = asyncio.create_task(watch.run())
        reading = asyncio.create_task(readers.run(wanted.streams))
        stack.push_async_callback(_cancelled, watching, reading)
        with _cut_by_signal(run):
            await _disturb(run, injector, reading)
        network.heal()
        await _settle(run, injector, readers, reading)
        await _inspect(run, looking, watch, injector)
        run.lives, run.counters = watch.lives(), watch.counters()
        run.network = dict(network.counts())
        run.resumes, run.asked_again = readers.resumes, readers.asked_again
    _judge(run, injector, watch)
    network.judge(run.tally)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _cut_by_signal(run: Run) -> Iterator[None]:
    """The first SIGINT or SIGTERM cuts the run short, and an hour's history is not lost; the second
    ends everything at once, as it does before and afterwards."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end() -> None:
        if task is not None:
            task.cancel()

    def cut() -> None:
        if run.cut.is_set():
            end()
        run.cut.set()

    def answer_with(act: Callable[[], None]) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, act)

    answer_with(cut)
    try:
        yield
    finally:
        answer_with(end)


async def _disturb(run: Run, injector: Injector, reading: asyncio.Task[None]) -> None:
    """Faults for the whole duration, longer only where one had to wait."""
    injecting = asyncio.create_task(injector.run(run.injections))
    cutting = asyncio.create_task(run.cut.wait())
    limit_s = run.wanted.duration_s + OVERRUN_S_MAX
    first = asyncio.FIRST_COMPLETED
    try:
        await asyncio.wait({injecting, reading, cutting}, timeout=limit_s, return_when=first)
        if injecting.done():
            injecting.result()
            left_s = max(0.0, run.wanted.duration_s - run.clock())
            await asyncio.wait({reading, cutting}, timeout=left_s, return_when=first)
        if reading.done():
            reading.result()
    finally:
        await _cancelled(injecting, cutting)
    run.faults_ended_at = run.clock()
    if run.cut.is_set():
        wanted_s = run.wanted.duration_s
        run.tally.found("S", f"cut short after {run.faults_ended_at:.0f} s of {wanted_s:.0f}")


async def _settle(
    run: Run, injector: Injector, readers: Readers, reading: asyncio.Task[None]
) -> None:
    """Everything that was asked ends, and the mesh is whole. How long an answer may take depends
    on the machine; how long nothing at all may come does not, and that is what is waited for."""
    run.phase = "settling"
    readers.stop.set()
    settle_s = run.wanted.plan.settle_s
    while not reading.done():
        left_s = patience_until(run.answers, run.faults_ended_at, settle_s) - run.clock()
        if left_s <= 0.0:
            reading.cancel()
            break
        await asyncio.wait({reading}, timeout=left_s)
    await asyncio.gather(reading, return_exceptions=True)
    if not await injector.whole():
        run.tally.found("I6", "the mesh is not whole after the last fault")
    run.ended_at = run.clock()


async def _inspect(run: Run, client: MeshClient, watch: Watch, injector: Injector) -> None:
    run.phase = "inspecting"
    await _read_again(run, client)
    await watch.look()
    traced = _traced(run.answers, since=max(injector.restarts, default=-1.0))
    try:
        remains = await look_at_remains(client, traced)
    except MeshError as error:
        run.tally.found("I7", f"the mesh did not say what is left: {error}")
        return
    judge_remains(remains, run.tally)


def _traced(answers: Iterable[Answer], *, since: float) -> list[str]:
    """Requests of which this coordinator has every span; those with most to tell come last."""
    ended = [one for one in answers if one.ends and one.asked_at > since]
    whole = [one for one in ended if len(one.attached) == 1]
    return [one.request_id for one in sorted(whole, key=lambda one: len(one.ends[0].repairs))]


async def _read_again(run: Run, client: MeshClient) -> None:
    """The newest answers that ended, as many as there is time for and the first in any case. What
    ended under an earlier coordinator is read as well: its journal has it."""
    ended = [answer for answer in run.answers if answer.ends and not answer.error]
    began = run.clock()
    for answer in reversed(ended[-READ_AGAIN_MAX:]):
        if run.clock() - began > READ_AGAIN_S_MAX:
            return
        try:
            async with asyncio.timeout(READ_AGAIN_S_MAX):
                await read_again(client, answer)
        except MeshError as error:
            run.tally.found("I2", f"cannot be read again: {error}", answer.request_id)
        except TimeoutError:
            detail = f"reading it again did not end in {READ_AGAIN_S_MAX:g} s"
            run.tally.found("I2", detail, answer.request_id)


def _judge(run: Run, injector: Injector, watch: Watch) -> None:
    tally = judge(run.answers, run.expected, {one.number: one for one in run.pool})
    judge_silence(run.answers, run.faults_ended_at, run.wanted.plan.settle_s, tally)
    for name in ("lost", "duplicated", "wrong", "hung"):
        setattr(run.tally, name, getattr(tally, name))
    run.tally.violations[:0] = tally.violations
    for why in injector.unrecovered:
        run.tally.found("I6", why)
    judge_faults(run.marks, _planned(run), run.tally)
    met = {FaultName(mark.fault) for mark in run.marks if mark.fired}
    for path in paths.untaken(met, watch.reading()):
        run.tally.found("S", f"the path {path} was never taken")
    if paths.is_forging_unnoticed(run.network.get(Fate.FORGED.value, 0), watch.reading()):
        run.tally.found("S", "packets were forged, and nobody noticed")
    judge_lives(run.lives, run.tally)
    judge_retries(run.counters, sum(mark.fired for mark in run.marks), run.tally)


def _planned(run: Run) -> dict[int, str]:
    """What had to happen, by number. What a run that was cut short did not come to is no news."""
    carried_out = {mark.number for mark in run.marks}
    return {
        one.number: one.fault.value
        for one in run.injections
        if not run.cut.is_set() or one.number in carried_out
    }


def with_stress_settings(settings: Settings, streams: int) -> Settings:
    """What a stress run changes: workers that failed come back soon, and everybody is admitted."""
    process = replace(
        settings.process,
        failed_worker_s_max=min(settings.process.failed_worker_s_max, 1.0),
        requests_max=max(settings.process.requests_max, streams),
        threads=settings.process.threads or 1,
        drain_s=min(settings.process.drain_s, 5.0),
    )
    return replace(settings, process=process)
