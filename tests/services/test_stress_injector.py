"""What the injector does to wires and processes, and that it says a fault fired only if it did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from services.fault_connection import ConnectionProxy, Direction
from services.fault_damage import Fault, FaultKind, Fired
from services.fault_proxy import FrameProxy
from services.stress import injector as injector_module
from services.stress import wire_faults
from services.stress.injector import Injector
from services.stress.network import Network
from services.stress.paths import Where
from services.stress.plan import FRAME_FAULTS, FaultName, Plan, builtin
from services.stress.schedule import Injection, schedule
from services.stress.wire_faults import WireFaults
from services.stress.wires import ArmedFaults, Wires

STAGES = 4
PLAN = Plan({FaultName.SWIZZLE_CLOG: 1}, hold_s=0.01)


class FakeNetwork:
    """Writes down what is done to it. Bytes arrive at whatever is held, but for ``idle``."""

    pipeline = tuple(f"stage-{index}" for index in range(STAGES))
    workers = (*pipeline, "full-worker")

    def __init__(self, *idle: str) -> None:
        self.did: list[tuple[str, str, tuple[Direction, ...]]] = []
        self.idle = idle

    def hold(self, worker: str, *ways: Direction) -> None:
        self.did.append(("hold", worker, ways))

    def release(self, worker: str) -> None:
        self.did.append(("release", worker, ()))

    def held(self, worker: str) -> int:
        is_held = any(did == "hold" and who == worker for did, who, _ in self.did)
        return 100 if is_held and worker not in self.idle else 0


class SeenAtOnce:
    """A watch under which every number grows."""

    def __init__(self) -> None:
        self.looks = 0

    def reading(self) -> dict[str, int]:
        self.looks += 1
        names = [f"event:WorkerSuspect@{one}" for one in FakeNetwork.workers]
        return dict.fromkeys(names, self.looks)


def injector_on(network: Network) -> Injector:
    return Injector(SimpleNamespace(), network, SeenAtOnce(), PLAN, lambda: 0.0, Path())


def a_swizzle(stop: tuple[int, ...], back: tuple[int, ...]) -> Injection:
    return Injection(0, 0.0, FaultName.SWIZZLE_CLOG, 0, order=(stop, back))


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injector_module, "SWIZZLE_GAP_S", 0.0)
    monkeypatch.setattr(wire_faults, "FIRE_S_MAX", 0.3)


@pytest.mark.parametrize("seed", range(6))
async def test_a_swizzle_stops_wires_and_brings_them_back_in_the_orders_that_were_drawn(seed):
    plan = Plan({FaultName.SWIZZLE_CLOG: 1}, every_s=1.0)
    drawn = schedule(plan, seed, 9.0, STAGES)[-1]
    network = FakeNetwork()
    done = await injector_on(network).swizzle_clog(drawn)
    names, (stop, back) = FakeNetwork.pipeline, drawn.order
    held = [("hold", names[at], tuple(Direction)) for at in stop]
    assert network.did == held + [("release", names[at], ()) for at in back]
    assert done.fired


async def test_a_swizzle_that_was_broken_off_lets_every_wire_go():
    network = FakeNetwork()
    one = injector_on(network)
    one.watch.reading = dict
    one.plan = Plan({}, hold_s=600.0)
    running = asyncio.create_task(one.swizzle_clog(a_swizzle((2, 0), (0, 2))))
    while len(network.did) < 2:
        await asyncio.sleep(0)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert [(did, who) for did, who, _ in network.did[2:]] == [
        ("release", "stage-0"),
        ("release", "stage-2"),
    ]


async def test_a_wire_of_a_swizzle_on_which_nothing_was_held_back_was_not_stopped():
    done = await injector_on(FakeNetwork("stage-2")).swizzle_clog(a_swizzle((2, 0), (0, 2)))
    assert not done.fired
    assert done.evidence == "bytes held back: stage-2 0, stage-0 100"


@pytest.mark.parametrize(("variant", "way"), [(0, Direction.FORWARD), (1, Direction.BACK)])
async def test_a_black_hole_swallows_one_way_and_is_closed_again(variant, way):
    network = FakeNetwork()
    hole = Injection(0, 0.0, FaultName.BLACK_HOLE, 1, variant=variant)
    done = await injector_on(network).black_hole(hole)
    assert network.did == [("hold", "stage-1", (way,)), ("release", "stage-1", ())]
    assert done.fired
    assert not (await injector_on(FakeNetwork("stage-1")).black_hole(hole)).fired


@pytest.mark.parametrize(
    ("fault", "place", "where"),
    [
        (FaultName.DROP, 0, Where(("stage-0",), "coordinator")),
        (FaultName.DROP, 2, Where(("stage-2",), "stage-1")),
        (FaultName.DROP, STAGES, Where(("coordinator",), "stage-3")),
        (FaultName.RESET, 0, Where(("stage-0",), "coordinator")),
        (FaultName.SIGKILL, STAGES, Where(("full-worker",), "stage-3")),
    ],
)
def test_the_answer_is_looked_for_at_both_ends_of_the_hop(fault, place, where):
    assert injector_on(FakeNetwork()).where(Injection(0, 0.0, fault, place)) == where


async def test_faults_on_frames_of_one_hop_come_one_at_a_time(monkeypatch):
    """Else one would be taken for the other, and one answer for both."""
    going: list[int] = []
    most: dict[str, int] = {}

    async def act(_self: Injector, injection: Injection, _before: dict[str, int]):
        going.append(injection.place)
        for _ in range(5):
            place = str(injection.place)
            most[place] = max(most.get(place, 0), going.count(injection.place))
            most["all"] = max(most.get("all", 0), len(going))
            await asyncio.sleep(0)
        going.remove(injection.place)
        return wire_faults.Done(False, "")

    monkeypatch.setattr(Injector, "_act", act)
    drops = [Injection(number, 0.0, FaultName.DROP, number % 2) for number in range(8)]
    one = injector_on(FakeNetwork())
    await one.run(drops)
    assert len(one.marks) == 8
    assert most == {"0": 1, "1": 1, "all": 2}


# -- proxies ---------------------------------------------------------------------------------------


class OneHop:
    """What ``WireFaults`` needs of wires, with real proxies in front of ``target``."""

    stages = 1
    workers = ("stage-0",)
    hop = Wires.hop

    def __init__(self, target: str) -> None:
        self.frames = FrameProxy("")
        self.armed = ArmedFaults(self.frames)
        self.data, self.control = ConnectionProxy(target), ConnectionProxy(target)
        self.from_clients = ConnectionProxy(target)
        self.name = "stage-0"
        self.pipeline, self.of = ("stage-0",), {"stage-0": self}


@contextlib.asynccontextmanager
async def a_hop() -> AsyncIterator[OneHop]:
    """In front of a server that takes everything and says nothing."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    hop = OneHop(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    proxies = (hop.data, hop.control, hop.from_clients)
    for proxy in proxies:
        await proxy.start()
    try:
        yield hop
    finally:
        for proxy in proxies:
            await proxy.stop()
        server.close()


@contextlib.asynccontextmanager
async def dialled(proxy: ConnectionProxy) -> AsyncIterator[asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    _reader, writer = await asyncio.open_connection(host, int(port))
    while not proxy.connections:
        await asyncio.sleep(0.001)
    try:
        yield writer
    finally:
        writer.close()


def faults_on(hop: OneHop, noticed=lambda: True) -> WireFaults:
    return WireFaults(hop, 0.05, noticed)


def about(fault: FaultName, *, frames: int = 1) -> Injection:
    return Injection(0, 0.0, fault, 0, frames=frames, variant=1)


@pytest.mark.parametrize(("met", "fired"), [(0, False), (1, False), (2, False), (3, True)])
async def test_a_fault_on_three_frames_has_fired_once_three_have_met_it(met, fired):
    hop = OneHop("")
    running = asyncio.create_task(faults_on(hop).frames(about(FaultName.DROP, frames=3)))
    while not hop.armed.waiting:
        await asyncio.sleep(0)
    hop.frames.fired += [Fired(Fault(FaultKind.DROP), step, 1, 7) for step in range(met)]
    done = await running
    assert done.fired is fired
    assert done.epochs == ((7,) if met else ())
    assert fired or f"{met} of 3" in done.evidence
    assert hop.armed.left == 0, "what has not happened is not waited for any longer"


async def test_a_connection_is_half_open_once_something_was_sent_into_it():
    async with a_hop() as hop, dialled(hop.data) as writer:
        silent = await faults_on(hop).half_open(about(FaultName.HALF_OPEN))
        assert not silent.fired
        assert silent.evidence == "1 stage-0 data connections half-open, 0 bytes"
        writer.write(b"into the void")
    async with a_hop() as hop, dialled(hop.data) as writer:
        half_open = asyncio.create_task(faults_on(hop).half_open(about(FaultName.HALF_OPEN)))
        while not hop.data.half_opened:
            await asyncio.sleep(0)
        writer.write(b"into the void")
        assert (await half_open).fired


async def test_what_an_earlier_half_open_connection_swallows_is_not_the_next_ones():
    async with a_hop() as hop, dialled(hop.data) as earlier:
        hop.data.half_open()
        async with dialled(hop.data):
            while hop.data.accepted < 2:
                await asyncio.sleep(0)
            half_open = asyncio.create_task(faults_on(hop).half_open(about(FaultName.HALF_OPEN)))
            while hop.data.half_opened < 2:
                await asyncio.sleep(0)
            earlier.write(b"into the void")
            assert not (await half_open).fired
            assert hop.data.swallowed > 0


@pytest.mark.parametrize("act", [WireFaults.half_open, WireFaults.reset_connections])
async def test_what_happens_to_connections_waits_until_there_is_one(act):
    async with a_hop() as hop:
        assert not (await act(faults_on(hop), about(FaultName.RESET))).fired
        waiting = asyncio.create_task(act(faults_on(hop), about(FaultName.RESET)))
        async with dialled(hop.data) as writer:
            writer.write(b"something")
            while not (hop.data.resets or hop.data.half_opened):
                await asyncio.sleep(0)
            with contextlib.suppress(OSError):
                writer.write(b"more")
            assert (await waiting).fired


async def test_a_slow_reader_becomes_slower_until_the_mesh_notices():
    rates: list[float] = []

    async def slowed(noticed_at: float) -> wire_faults.Done:
        async with a_hop() as hop, dialled(hop.data) as writer:
            slow_down = hop.data.slow_down

            def slower(way: Direction, rate: float) -> None:
                rates.append(rate)
                slow_down(way, rate * 100)

            hop.data.slow_down = slower
            writer.write(bytes(20_000))
            faults = faults_on(hop, lambda: rates[-1] <= noticed_at)
            return await faults.slow_reader(about(FaultName.SLOW_READER))

    done = await slowed(1000.0)
    assert rates == [4000.0, 1000.0]
    assert done.fired
    rates.clear()
    await slowed(0.0)
    assert rates == [4000.0, 1000.0, 250.0], "and not for ever"


async def test_a_reader_that_nobody_wrote_to_was_not_slow():
    async with a_hop() as hop, dialled(hop.data):
        assert not (await faults_on(hop).slow_reader(about(FaultName.SLOW_READER))).fired


def test_every_fault_has_an_act():
    able = {*injector_module._ACTS, *injector_module._WIRE_ACTS}
    assert able == set(builtin("all").faults) == set(FaultName)
    assert set(injector_module._WIRE_ACTS) >= FRAME_FAULTS
