"""Hops over real gRPC on loopback: every fault is caught and named, every frame arrives once, in
order."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from services import codec, stage_service
from services.channel import open_channel
from services.server import MeshServer, ServerOptions
from services.stage_link import StageLink
from services.stage_service import (
    INTEGRITY_US,
    SERVICE,
    TIMED_EVERY,
    HopEndpoint,
    StageServicer,
    add_stage_servicer,
)
from stagemesh import errors
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.tensor import DType, Tensor
from stagemesh.token import StageMark, TokenChunk
from stagemesh.transport import Boundary, HopFault, HopLimits, HopReceiver

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from frame_proxy import (
    PAYLOAD_KINDS,
    Fault,
    FaultKind,
    FrameProxy,
    ScriptedFaults,
    SeededFaults,
)

FINGERPRINT = b"weights!"
EPOCH = 5
HIDDEN = 128
REQUESTS = tuple(bytes(range(index, index + 16)) for index in (1, 2))
HOPS = {"first": (-1, 0), "middle": (0, 1), "last": (1, -1)}
FAST = HopLimits(silence_s_max=1.5, retransmit_wait_s_min=0.03, retransmit_wait_s_initial=0.05)


def a_token(request: bytes, step: int, position: int) -> TokenChunk:
    chunk = TokenChunk(request, position, 7, EPOCH, step, -0.5, 1.0, 1, "stage-1", b"c" * 16)
    return chunk.sealed()


def a_row(request: bytes, step: int, tokens: int, hop: tuple[int, int]) -> StepRow:
    row = StepRow(request, 3 + step, tuple(range(tokens)), samples=True)
    if hop[0] >= 0:
        row = replace(row, marks=(StageMark(row.end_position, step, step * 3),))
    if hop[1] < 0:
        row = replace(row, token=a_token(request, step, row.end_position))
    return row


def a_frame(
    step: int, *, hop: tuple[int, int] = (0, 1), tokens: int = 1, hidden: int = HIDDEN
) -> StepFrame:
    """A decode step of two rows, or a prefill step when ``tokens`` > 1."""
    rows = tuple(a_row(request, step, tokens, hop) for request in REQUESTS)
    count = tokens * len(rows)
    tensor = None
    if -1 not in hop:
        payload = bytearray(random.Random(step).randbytes(count * hidden * 2))
        payload[1::2] = b"\x3f" * (count * hidden)
        tensor = Tensor(DType.BF16, (count, hidden), bytes(payload))
    kind = FrameKind.PREFILL if tokens > 1 else FrameKind.DECODE
    return StepFrame(kind, FINGERPRINT, EPOCH, step, *hop, rows, tensor)


@dataclass
class Hop:
    """Both ends of one hop, and what they reported."""

    servicer: StageServicer
    link: StageLink
    proxy: FrameProxy | None
    hop: tuple[int, int]
    delivered: list[StepFrame] = field(default_factory=list)
    sent: list[StepFrame] = field(default_factory=list)
    seen: list[HopFault] = field(default_factory=list)
    """By the receiver."""
    felt: list[HopFault] = field(default_factory=list)
    """By the sender."""
    broken: list[errors.MeshError] = field(default_factory=list)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, count: int, *, tokens: int = 1) -> None:
        for _ in range(count):
            step = self.link.sender.next_step
            self.sent.append(self.link.send(a_frame(step, hop=self.hop, tokens=tokens)))

    async def wait_delivered(self, count: int, *, limit_s: float = 10.0) -> None:
        async with asyncio.timeout(limit_s):
            while len(self.delivered) < count:
                self.arrived.clear()
                await self.arrived.wait()

    async def wait_room(self) -> None:
        while not self.link.sender.writable:
            await asyncio.sleep(0.005)

    @property
    def reasons(self) -> set[str]:
        return {fault.reason for fault in self.seen}


@contextlib.asynccontextmanager
async def a_server(servicer: StageServicer, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = MeshServer(ServerOptions(address))
    server.add(add_stage_servicer, servicer)
    await server.start()
    try:
        yield server.address
    finally:
        await server._server.stop(0)


@contextlib.asynccontextmanager
async def a_hop(
    *,
    where: str = "middle",
    plan=None,
    deliver=None,
    limits: HopLimits = FAST,
    queue_frames_max: int = 16,
    proxied: bool = True,
    expected: bool = True,
    address: str = "",
    **link_facts,
) -> AsyncIterator[Hop]:
    hop = HOPS[where]
    async with contextlib.AsyncExitStack() as stack:
        made: list[Hop] = []
        servicer = StageServicer(limits=limits, on_fault=lambda fault: made[0].seen.append(fault))
        target = address or await stack.enter_async_context(a_server(servicer))
        proxy = None
        if proxied:
            proxy = FrameProxy(target, plan, seed=11)
            target = await proxy.start()
            stack.push_async_callback(proxy.stop)
        link = StageLink(
            target,
            open_channel,
            epoch=EPOCH,
            hop_from=hop[0],
            hop_to=hop[1],
            fingerprint=FINGERPRINT,
            worker_name="w0",
            peer="w1",
            limits=limits,
            on_fault=lambda fault: made[0].felt.append(fault),
            on_opened=lambda: made[0].opened.set(),
            on_broken=lambda error: made[0].broken.append(error),
            **link_facts,
        )
        stack.push_async_callback(link.close)
        made.append(Hop(servicer, link, proxy, hop))

        def take(frame: StepFrame):
            made[0].delivered.append(frame)
            made[0].arrived.set()
            return deliver(frame) if deliver else None

        if expected:
            servicer.expect(
                EPOCH,
                *hop,
                FINGERPRINT,
                take,
                queue_frames_max=queue_frames_max,
                boundary=Boundary(DType.BF16, HIDDEN),
            )
        link.open()
        yield made[0]


# ---------------------------------------------------------------- every fault, on every hop

NAMES = {
    FaultKind.DROP: {"SEQUENCE_GAP"},
    FaultKind.REORDER: {"SEQUENCE_GAP"},
    FaultKind.GARBAGE: {"FRAME_MALFORMED"},
    FaultKind.TRUNCATE: {"FRAME_MALFORMED"},
    FaultKind.PAYLOAD_BIT: {"CHECKSUM_MISMATCH"},
    FaultKind.SWAP_BLOCKS: {"CHECKSUM_MISMATCH"},
    FaultKind.SWAP_BF16: {"CHECKSUM_MISMATCH"},
    FaultKind.NAN: {"CHECKSUM_MISMATCH"},
    FaultKind.INFINITY: {"CHECKSUM_MISMATCH"},
    FaultKind.HEADER_BIT: {"CHECKSUM_MISMATCH"},
    FaultKind.WRONG_DTYPE: {"CHECKSUM_MISMATCH"},
    FaultKind.WRONG_SHAPE: {"CHECKSUM_MISMATCH"},
    FaultKind.RELABEL_REQUEST: {"CHECKSUM_MISMATCH"},
    FaultKind.RELABEL_POSITION: {"CHECKSUM_MISMATCH"},
    FaultKind.WRONG_HOP: {"CHECKSUM_MISMATCH"},
    FaultKind.WRONG_FINGERPRINT: {"CHECKSUM_MISMATCH"},
    FaultKind.TOKEN_FIELD: {"CHECKSUM_MISMATCH"},
    FaultKind.OLD_EPOCH: {"EPOCH_FENCED"},
}
RESEALED_NAMES = {
    FaultKind.NAN: {"NON_FINITE_ACTIVATION"},
    FaultKind.INFINITY: {"NON_FINITE_ACTIVATION"},
    FaultKind.WRONG_DTYPE: {"FRAME_MALFORMED"},
    FaultKind.WRONG_SHAPE: {"FRAME_MALFORMED"},
    FaultKind.WRONG_HOP: {"HOP_MISMATCH"},
    FaultKind.WRONG_FINGERPRINT: {"FINGERPRINT_MISMATCH"},
    FaultKind.TOKEN_FIELD: {"TOKEN_REJECTED"},
}
CASES = [
    pytest.param(
        Fault(kind, resealed), where, tokens, id=f"{Fault(kind, resealed)} {where} {tokens}"
    )
    for resealed, names in ((False, NAMES), (True, RESEALED_NAMES))
    for kind in names
    for where in HOPS
    for tokens in (1, 6)
    if (kind not in PAYLOAD_KINDS or where == "middle")
    and (kind is not FaultKind.TOKEN_FIELD or where == "last")
]


@pytest.mark.parametrize(("fault", "where", "tokens"), CASES)
async def test_a_fault_is_caught_and_named_and_leaves_no_trace(fault, where, tokens):
    async with a_hop(where=where, plan=ScriptedFaults({4: [fault]})) as hop:
        hop.send(10, tokens=tokens)
        await hop.wait_delivered(10)
        assert [fired.fault for fired in hop.proxy.fired] == [fault]
        expected = (RESEALED_NAMES if fault.resealed else NAMES)[fault.kind]
        assert expected <= hop.reasons
        assert {(seen.hop_from, seen.hop_to, seen.peer) for seen in hop.seen} == {(*hop.hop, "w0")}
        assert hop.delivered == hop.sent
        assert not hop.broken
        assert hop.proxy.forwarded <= 12
        assert not hop.servicer.counters.unregistered()


@pytest.mark.parametrize(
    "kind",
    [FaultKind.DUPLICATE, FaultKind.DELAY, FaultKind.DROP_ANSWER, FaultKind.DUPLICATE_ANSWER],
)
async def test_what_is_repeated_or_late_is_delivered_once(kind):
    async with a_hop(plan=ScriptedFaults({4: [Fault(kind)], 10: [Fault(kind)]})) as hop:
        hop.send(10)
        await hop.wait_delivered(10)
        async with asyncio.timeout(5):
            while hop.link.sender.unacknowledged:
                await asyncio.sleep(0.01)
        assert hop.delivered == hop.sent
        if kind in {FaultKind.DUPLICATE, FaultKind.DROP_ANSWER}:  # others: if a timer was early
            assert hop.servicer.counters["duplicates_answered"] > 0


@pytest.mark.parametrize("count", [1, 2])
async def test_a_frame_is_reordered_once_another_has_overtaken_it(count):
    """One that was only held back for a moment has not been."""
    patient = replace(FAST, silence_s_max=9.0, retransmit_wait_s_initial=5.0)
    plan = ScriptedFaults({1: [Fault(FaultKind.REORDER)]})
    async with a_hop(plan=plan, limits=patient) as hop:
        hop.send(count)
        await hop.wait_delivered(count)
        assert hop.delivered == hop.sent
        assert len(hop.proxy.fired) == count - 1
        assert hop.servicer.counters["frames_held"] == count - 1


async def test_a_frame_that_is_sent_again_is_not_reordered():
    """Nobody could tell: the receiver holds what overtook it the first time."""
    reorder = Fault(FaultKind.REORDER)
    async with a_hop(plan=ScriptedFaults({1: [Fault(FaultKind.DROP), reorder, reorder]})) as hop:
        hop.send(4)
        await hop.wait_delivered(4)
        assert hop.delivered == hop.sent
        assert [one.fault.kind for one in hop.proxy.fired] == [FaultKind.DROP]


async def test_answers_are_lost_until_a_frame_is_sent_again():
    plan = ScriptedFaults({2: [Fault(FaultKind.LOSE_ANSWERS)]})
    async with a_hop(plan=plan) as hop:
        hop.send(6)
        await hop.wait_delivered(6)
        async with asyncio.timeout(5):
            while hop.link.sender.unacknowledged:
                await asyncio.sleep(0.01)
        assert hop.delivered == hop.sent
        assert [(fired.step, fired.epoch) for fired in hop.proxy.fired] == [(2, EPOCH)]
        assert hop.link.counters["frames_retransmitted"] > 0
        assert hop.servicer.counters["duplicates_answered"] > 0


async def test_the_last_frame_of_all_may_be_lost():
    async with a_hop(plan=ScriptedFaults({3: [Fault(FaultKind.DROP)]})) as hop:
        hop.send(3)
        await hop.wait_delivered(3)
        assert hop.delivered == hop.sent


async def test_a_frame_damaged_again_and_again_arrives_in_the_end():
    faults = [Fault(FaultKind.PAYLOAD_BIT), Fault(FaultKind.DROP), Fault(FaultKind.HEADER_BIT)]
    async with a_hop(plan=ScriptedFaults({2: faults})) as hop:
        hop.send(4)
        await hop.wait_delivered(4)
        assert [fired.copy for fired in hop.proxy.fired] == [1, 2, 3]
        assert hop.delivered == hop.sent


async def test_a_stage_that_really_computes_nan_ends_the_route_with_that_name():
    bad = [Fault(FaultKind.NAN, resealed=True)] * 9
    async with a_hop(plan=ScriptedFaults({2: bad})) as hop:
        hop.send(3)
        async with asyncio.timeout(5):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.NonFiniteActivation)
        assert len(hop.proxy.fired) == 2
        assert [fault.fatal for fault in hop.felt] == [True]


PART_KINDS = (FaultKind.DROP, FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BLOCKS, FaultKind.TRUNCATE)


@pytest.mark.parametrize("kind", PART_KINDS)
async def test_a_prefill_in_parts_survives_a_fault_in_one_of_them(kind):
    async with a_hop(plan=ScriptedFaults({2: [Fault(kind)]})) as hop:
        for step in (1, 2, 3):
            hop.sent.append(hop.link.send(a_frame(step, tokens=5000)))
        await hop.wait_delivered(3)
        assert hop.delivered == hop.sent
        assert len(hop.sent[0].tensor.payload) > 2 * 1024 * 1024


TRANSIENT = (
    [Fault(kind) for kind in NAMES if kind not in PAYLOAD_KINDS | {FaultKind.TOKEN_FIELD}]
    + [Fault(kind) for kind in (FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BF16, FaultKind.TRUNCATE)]
    + [Fault(kind, resealed=True) for kind in RESEALED_NAMES if kind is not FaultKind.TOKEN_FIELD]
    + [Fault(FaultKind.DUPLICATE), Fault(FaultKind.DROP_ANSWER), Fault(FaultKind.DUPLICATE_ANSWER)]
)


async def test_five_percent_of_faults_cost_at_most_ten_percent_extra_frames():
    count = 600
    plan = SeededFaults(3, 0.05, TRANSIENT)
    async with a_hop(plan=plan, limits=replace(FAST, inflight_frames_max=8)) as hop:
        for _ in range(count):
            await hop.wait_room()
            hop.send(1)
        await hop.wait_delivered(count, limit_s=60)
        assert hop.delivered == hop.sent
        assert len(hop.proxy.fired) > count * 0.03
        assert hop.proxy.forwarded <= count * 1.1
        assert not hop.servicer.counters.unregistered()
        assert not hop.link.counters.unregistered()


# ---------------------------------------------------------------- connections


async def test_a_link_survives_resets_and_resumes_from_its_ledger():
    plan = ScriptedFaults({step: [Fault(FaultKind.RESET)] for step in (3, 8)})
    async with a_hop(plan=plan) as hop:
        hop.send(12)
        await hop.wait_delivered(12)
        assert hop.delivered == hop.sent
        assert hop.link.counters["links_reopened"] == 2
        assert {fault.reason for fault in hop.felt} == {"STAGE_UNREACHABLE"}
        assert not hop.broken


async def test_a_link_survives_a_restart_of_its_successors_server():
    delivered: list[StepFrame] = []
    servicer = StageServicer()
    servicer.expect(EPOCH, 0, 1, FINGERPRINT, delivered.append)
    async with a_server(servicer) as address:
        hop_context = a_hop(proxied=False, address=address, expected=False)
        hop = await hop_context.__aenter__()
        hop.send(3)
        async with asyncio.timeout(5):
            while len(delivered) < 3:
                await asyncio.sleep(0.01)
    hop.send(3)
    async with a_server(servicer, address), asyncio.timeout(5):
        while len(delivered) < 6:
            await asyncio.sleep(0.01)
        assert delivered == hop.sent
        assert not hop.broken
        await hop_context.__aexit__(None, None, None)


async def test_a_refused_connection_is_reported_at_once_and_given_up_in_bounded_time():
    loop = asyncio.get_running_loop()
    started = loop.time()
    async with a_hop(proxied=False, address="127.0.0.1:9", expected=False, open_s_max=1.0) as hop:
        async with asyncio.timeout(0.5):
            while not hop.felt:
                await asyncio.sleep(0.005)
        assert hop.felt[0].reason == "STAGE_UNREACHABLE"
        async with asyncio.timeout(5):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert loop.time() - started < 3
        with pytest.raises(errors.StageUnreachable):
            hop.link.send(a_frame(1))


@pytest.mark.parametrize("direction", ["requests", "answers"])
async def test_a_black_hole_is_noticed_by_missing_acknowledgements(direction):
    async with a_hop() as hop:
        hop.send(2)
        await hop.wait_delivered(2)
        setattr(hop.proxy, f"swallow_{direction}", True)
        before = hop.proxy.forwarded
        hop.send(3)
        async with asyncio.timeout(5):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.StageUnreachable)
        assert hop.proxy.forwarded - before <= 3 + 8
        assert hop.felt[-1].fatal


async def test_a_black_hole_that_ends_in_time_leaves_no_trace():
    async with a_hop() as hop:
        hop.send(2)
        await hop.wait_delivered(2)
        hop.proxy.swallow_requests = True
        hop.send(8)
        await asyncio.sleep(0.4)
        hop.proxy.swallow_requests = False
        await hop.wait_delivered(10)
        assert hop.delivered == hop.sent
        assert not hop.broken


async def test_a_link_waits_for_a_route_that_is_still_opening():
    async with a_hop(proxied=False, expected=False) as hop:
        await asyncio.sleep(0.1)
        hop.send(2)
        hop.servicer.expect(EPOCH, 0, 1, FINGERPRINT, hop.delivered.append)
        async with asyncio.timeout(5):
            await hop.opened.wait()
            while len(hop.delivered) < 2:
                await asyncio.sleep(0.01)
        assert hop.felt == []


@pytest.mark.parametrize(
    ("fact", "kind"),
    [
        ({"epoch": EPOCH - 1}, errors.EpochFenced),
        ({"fingerprint": b"another!"}, errors.FingerprintMismatch),
        ({"hop_to": 2}, errors.HopMismatch),
    ],
)
async def test_a_link_that_does_not_belong_here_is_refused_for_good(fact, kind):
    servicer = StageServicer()
    servicer.fence(EPOCH - 1)
    servicer.expect(EPOCH, 0, 1, FINGERPRINT, lambda _frame: None)
    facts = {"epoch": EPOCH, "hop_from": 0, "hop_to": 1, "fingerprint": FINGERPRINT} | fact
    async with a_server(servicer) as address:
        broken = asyncio.get_running_loop().create_future()
        link = StageLink(
            address, open_channel, worker_name="w0", on_broken=broken.set_result, **facts
        )
        link.open()
        async with asyncio.timeout(3):
            assert type(await broken) is kind
        await link.close()


async def test_fencing_an_epoch_ends_its_link_and_keeps_it_ended():
    async with a_hop(proxied=False) as hop:
        hop.send(1)
        await hop.wait_delivered(1)
        hop.servicer.fence(EPOCH)
        async with asyncio.timeout(3):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.EpochFenced)
        with pytest.raises(errors.EpochFenced):
            hop.servicer.expect(EPOCH, 0, 1, FINGERPRINT, hop.delivered.append)


async def test_retiring_one_epoch_leaves_another_open():
    async with a_hop(proxied=False) as hop:
        hop.servicer.expect(EPOCH - 1, 0, 1, FINGERPRINT, hop.delivered.append)
        hop.servicer.retire(EPOCH - 1)
        hop.send(2)
        await hop.wait_delivered(2)
        with pytest.raises(errors.EpochFenced):
            hop.servicer.expect(EPOCH - 1, 0, 1, FINGERPRINT, hop.delivered.append)


async def test_a_newer_connection_takes_the_link_over():
    async with a_hop(proxied=False) as hop:
        hop.send(2)
        await hop.wait_delivered(2)
        second = StageLink(
            hop.link.address,
            open_channel,
            epoch=EPOCH,
            hop_from=0,
            hop_to=1,
            fingerprint=FINGERPRINT,
            worker_name="w0",
        )
        for step in (1, 2, 3):
            second.send(a_frame(step))
        second.open()
        await hop.wait_delivered(3)
        assert [frame.step for frame in hop.delivered] == [1, 2, 3]
        await second.close()


async def test_a_call_that_does_not_begin_with_an_opening_is_refused():
    servicer = StageServicer()
    async with a_server(servicer) as address, open_channel(address) as channel:
        for first in (b"\xff\xff", b"", b"\x12\x00"):
            call = channel.stream_stream(f"/{SERVICE}/Exchange")()
            await call.write(first)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ---------------------------------------------------------------- backpressure and consumers


async def test_a_slow_consumer_slows_the_sender_and_loses_nothing():
    gate = asyncio.Event()
    waits = {"retransmit_wait_s_initial": 0.2, "retransmit_wait_s_min": 0.2}
    limits = replace(FAST, inflight_frames_max=4, ledger_frames_max=8, **waits)
    async with a_hop(
        proxied=False, deliver=lambda _frame: gate.wait(), limits=limits, queue_frames_max=3
    ) as hop:
        sent = 0
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(0.3):
                    await hop.wait_room()
                hop.send(1)
                sent += 1
        assert len(hop.delivered) == 1
        assert sent <= 1 + 3 + 4 + 8
        await asyncio.sleep(2 * FAST.silence_s_max)
        assert not hop.broken
        assert hop.link.counters["window_waits"] > 0
        gate.set()
        await hop.wait_delivered(sent)
        assert hop.delivered == hop.sent
        assert hop.link.counters["frames_retransmitted"] <= 2


async def test_a_consumer_that_fails_ends_the_hop_instead_of_losing_frames():
    def deliver(frame: StepFrame) -> None:
        if frame.step == 2:
            raise RuntimeError("compute thread is gone")

    async with a_hop(proxied=False, deliver=deliver, reconnect_s_max=0.5) as hop:
        hop.send(4)
        async with asyncio.timeout(8):
            while not hop.broken:
                await asyncio.sleep(0.01)
        assert isinstance(hop.broken[0], errors.ComputeFailed)
        assert [fault.reason for fault in hop.seen if fault.fatal] == ["COMPUTE_FAILED"]
        assert [frame.step for frame in hop.delivered] == [1, 2]


async def test_a_full_ledger_refuses_without_blocking():
    limits = replace(FAST, inflight_frames_max=2, ledger_frames_max=2)
    async with a_hop(proxied=False, limits=limits, expected=False) as hop:
        hop.send(2)
        assert not hop.link.sender.writable
        with pytest.raises(errors.Overloaded):
            hop.send(1)


def test_one_frame_in_eight_is_timed_and_counts_for_all(monkeypatch):
    """In CPU time of this thread: what others do to the machine is no cost of a check."""
    looks = iter(range(0, 1_000_000, 5000))
    clock = SimpleNamespace(thread_time_ns=lambda: next(looks))
    monkeypatch.setattr(stage_service, "time", clock)
    receiver = HopReceiver(epoch=EPOCH, hop_from=0, hop_to=1, fingerprint=FINGERPRINT)
    endpoint = HopEndpoint(receiver, lambda _frame: None)
    for step in range(1, 2 * TIMED_EVERY + 1):
        (message,) = codec.encode_frame(a_frame(step).sealed())
        assert endpoint._judge(message).ack is not None
    assert receiver.counters["frames_checked"] == 2 * TIMED_EVERY
    assert receiver.counters[INTEGRITY_US] == 2 * TIMED_EVERY * 5
    assert next(looks) == 4 * 5000
