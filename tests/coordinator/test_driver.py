"""The shell around the machine: order, timers, sinks, the journal's place."""

import asyncio
from dataclasses import replace

import pytest

from coordinator.core import Mesh
from coordinator.driver import MeshDriver
from coordinator.echo import EchoStage, oracle
from coordinator.events import (
    BarrierArrived,
    FrameReturned,
    GenerationRequested,
    LinkOpened,
    WorkerLost,
    WorkerRegistered,
)
from coordinator.memory_worker import worker_info
from coordinator.settings import MeshPolicy
from stagemesh.errors import RequestConflict
from stagemesh.sampling import SamplingSpec

KEY = bytes(15) + b"\x01"


class Ports:
    """Workers, links and topics in memory: every effect is answered by its event, some at once."""

    def __init__(self):
        self.driver = None
        self.stages = {}
        self.published = []
        self.sent = []
        self.returned = []
        self.fenced = []
        self.silent = False

    # WorkerControl
    def open_route(self, instruction):
        for index, info in enumerate(instruction.route.workers):
            epoch, count = instruction.route.epoch, instruction.route.stage_count
            self.stages[epoch, index] = EchoStage(info, epoch, index, count)
            facts = {"fingerprint": info.fingerprint, "dtype": "f32", "layer_count": "6"}
            arrived = BarrierArrived(info.name, "open-route", epoch, instruction.generation, facts)
            self.driver.feed(arrived)

    def fence(self, workers, epoch):
        self.fenced.append((tuple(workers), epoch))

    def announce_barrier(self, outcome): ...
    def meet(self, verdict): ...
    def drain(self, order): ...
    def reinitialise(self, worker, reason, command_id): ...

    # RouteLinks
    def open(self, route):
        asyncio.get_running_loop().call_soon(self.driver.feed, LinkOpened(route.epoch))

    def send(self, frame):
        self.sent.append(frame)
        if not self.silent:
            asyncio.get_running_loop().call_soon(self._answer, frame)

    def close(self, epoch): ...

    def _answer(self, frame):
        index = 0
        while (stage := self.stages.get((frame.epoch, index))) is not None:
            frame, index = stage.step(frame.sealed()).sealed(), index + 1
        self.driver.feed(FrameReturned(frame))

    # EventPublisher
    def publish(self, event):
        self.published.append(event)

    # StepObserver
    def step_sent(self, frame, now): ...

    def step_returned(self, frame, now, seconds):
        self.returned.append((frame.epoch, frame.step, seconds))


class Sink:
    """A client: what it got, and a future for its end."""

    def __init__(self):
        self.tokens = []
        self.end = asyncio.get_running_loop().create_future()

    def accept(self, instruction):
        assert instruction.first_index == len(self.tokens)
        self.tokens += [chunk.token_id for chunk in instruction.chunks]

    def advance(self, instruction): ...
    def correct(self, instruction): ...

    def finish(self, instruction):
        self.end.set_result(instruction)

    def fail(self, instruction):
        self.end.set_result(instruction)


def started(journal=None, **limits):
    ports = Ports()
    driver = MeshDriver(
        Mesh(MeshPolicy(vocab_size=997, **limits)),
        control=ports,
        links=ports,
        events=ports,
        observer=ports,
        journal=journal,
    )
    ports.driver = driver
    driver.feed(WorkerRegistered(worker_info("stage-0", "0-3")))
    driver.feed(WorkerRegistered(worker_info("stage-1", "3-6")))
    return ports, driver


def demand(tokens=6, key=KEY):
    return GenerationRequested(key, (3, 4, 5), SamplingSpec(), tokens)


async def test_a_request_runs_through_the_loop_to_its_sink():
    ports, driver = started()
    sink = Sink()
    driver.submit(demand(), sink)
    end = await asyncio.wait_for(sink.end, 10)
    assert end.reason == "length"
    assert sink.tokens == oracle((3, 4, 5), 6, layer_count=6)
    assert all(seconds >= 0 for _, _, seconds in ports.returned)
    assert len(ports.returned) >= 9
    assert driver.snapshot().ready
    driver.close()


async def test_an_event_fed_while_another_is_performed_waits_its_turn():
    ports, driver = started()
    opened = [event.type for event in ports.published]
    assert opened.index("RouteOpening") < opened.index("BarrierCompleted")
    driver.close()


async def test_a_request_id_is_taken_once():
    _, driver = started()
    sink = Sink()
    driver.submit(demand(), sink)
    with pytest.raises(RequestConflict):
        driver.submit(demand(), Sink())
    await asyncio.wait_for(sink.end, 10)
    with pytest.raises(RequestConflict):
        driver.submit(demand(), Sink())
    driver.close()


async def test_a_sink_that_raises_is_a_client_that_went_away_and_harms_nobody_else():
    class Broken(Sink):
        def accept(self, instruction):
            raise ConnectionError("gone")

    _, driver = started()
    sink = Sink()
    driver.submit(demand(50, bytes(16)), Broken())
    driver.submit(demand(), sink)
    end = await asyncio.wait_for(sink.end, 10)
    assert end.reason == "length"
    phases = {view.request: view.phase for view in driver.snapshot().generations}
    assert phases[bytes(16)] == "cancelled"
    driver.close()


async def test_nothing_reaches_a_client_before_the_journal_has_it():
    class Journal:
        """Keeps instructions until it is told that they are durable."""

        def __init__(self):
            self.kept, self.begun = [], []

        def begin(self, request):
            self.begun.append(request.request)

        def commit(self, instruction, deliver):
            self.kept.append((instruction, deliver))

        def sync(self):
            kept, self.kept = self.kept, []
            for instruction, deliver in kept:
                deliver(instruction)

    journal = Journal()
    _, driver = started(journal)
    sink = Sink()
    driver.submit(demand(), sink)
    while len(journal.kept) < 7:
        await asyncio.sleep(0)
    assert journal.begun == [KEY]
    assert sink.tokens == []
    journal.sync()
    assert len(sink.tokens) == 6
    assert sink.end.done()
    driver.close()


async def test_time_passes_by_itself():
    ports, driver = started(route_wait_s_max=0.05, fallback_wait_s_max=0.05)
    sink = Sink()
    ports.silent = True
    driver.submit(demand(), sink)
    driver.feed(WorkerLost("stage-1", "1", "killed"))
    end = await asyncio.wait_for(sink.end, 10)
    assert end.error.reason == "ROUTE_UNAVAILABLE"
    assert ports.fenced == [(("stage-0", "stage-1"), 1)]
    driver.close()


async def test_a_client_can_be_detached_and_attached():
    _, driver = started()
    first, second = Sink(), Sink()
    driver.submit(demand(), first)
    driver.attach(KEY, None)
    second.accept = lambda instruction: None
    driver.attach(KEY, second)
    await asyncio.wait_for(second.end, 10)
    assert not first.end.done()
    driver.close()


async def test_a_fault_in_the_machine_does_not_wedge_the_driver():
    _, driver = started()
    sink = Sink()
    with pytest.raises(Exception, match="no such event"):
        driver.feed(object())
    driver.submit(replace(demand(), max_tokens=2), sink)
    assert (await asyncio.wait_for(sink.end, 10)).reason == "length"
    driver.close()
