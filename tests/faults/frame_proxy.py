"""A StageService between two hops that damages, loses, repeats and delays what passes, by a seeded
plan.

It is a real gRPC server and client, so what it does happens on the path the mesh uses: serialized
bytes, HTTP/2, reconnects. A fault is *plain*, as a cable or a buggy buffer makes it, or *resealed*:
both checksums are recomputed over the wrong content, as a process makes it that damages data before
it seals them. Checksums catch the first kind; only the checks behind them catch the second.

The plan says which fault meets which copy of which step; everything that fired is recorded. The
same seed and the same traffic give the same faults. The proxy listens on loopback only and has no
remote control.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grpc

from services import codec
from services.stage_service import EXCHANGE, SERVICE
from stagemesh.frame import StepFrame
from stagemesh.tensor import DType
from stagemesh.v1 import stage_service_pb2

REORDER_WAIT_S = 0.05
"""A frame held back for the next one to overtake goes on after this if none comes."""


class FaultKind(enum.Enum):
    """What may happen to one message."""

    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    DELAY = "delay"
    GARBAGE = "garbage"
    """Not protobuf any more."""
    TRUNCATE = "truncate"
    """Half of the payload is missing."""
    PAYLOAD_BIT = "payload_bit"
    SWAP_BLOCKS = "swap_blocks"
    """Two 64-byte blocks of the payload change places."""
    SWAP_BF16 = "swap_bf16"
    """Two neighbouring 16-bit values of the payload change places."""
    NAN = "nan"
    HEADER_BIT = "header_bit"
    WRONG_DTYPE = "wrong_dtype"
    WRONG_SHAPE = "wrong_shape"
    RELABEL_REQUEST = "relabel_request"
    RELABEL_POSITION = "relabel_position"
    WRONG_HOP = "wrong_hop"
    WRONG_FINGERPRINT = "wrong_fingerprint"
    TOKEN_FIELD = "token_field"
    """The token is given to another position; last hop only."""
    OLD_EPOCH = "old_epoch"
    """A sealed frame of the epoch before goes first."""
    DROP_ANSWER = "drop_answer"
    DUPLICATE_ANSWER = "duplicate_answer"
    RESET = "reset"
    """The connection breaks here."""


PAYLOAD_KINDS = frozenset(
    {
        FaultKind.TRUNCATE,
        FaultKind.PAYLOAD_BIT,
        FaultKind.SWAP_BLOCKS,
        FaultKind.SWAP_BF16,
        FaultKind.NAN,
        FaultKind.WRONG_DTYPE,
        FaultKind.WRONG_SHAPE,
    }
)
"""Need an activation."""


@dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    resealed: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value}{' resealed' if self.resealed else ''}"


@dataclass(frozen=True, slots=True)
class Fired:
    """One fault that happened to one copy (from 1) of a step."""

    fault: Fault
    step: int
    copy: int


class FaultPlan(Protocol):
    """Decides about each copy of each step as it passes."""

    def pick(self, step: int, copy: int) -> Fault | None: ...


@dataclass(slots=True)
class ScriptedFaults:
    """Faults for the first copies of given steps: the n-th copy meets the n-th fault of its
    list."""

    script: Mapping[int, Sequence[Fault]]

    def pick(self, step: int, copy: int) -> Fault | None:
        faults = self.script.get(step, ())
        return faults[copy - 1] if copy <= len(faults) else None


class SeededFaults:
    """Each copy of each step meets a fault with probability ``rate``, retransmitted ones as
    well."""

    def __init__(self, seed: int, rate: float, faults: Sequence[Fault]) -> None:
        self._random = random.Random(seed)
        self._rate = rate
        self._faults = tuple(faults)

    def pick(self, step: int, copy: int) -> Fault | None:
        del step, copy
        if self._random.random() >= self._rate:
            return None
        return self._random.choice(self._faults)


class NoFaults:
    def pick(self, step: int, copy: int) -> Fault | None:
        del step, copy
        return None


class FrameDamage:
    """The faults that change a message. ``damage`` gives the bytes to send in its place."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def damage(self, data: bytes, fault: Fault) -> bytes:
        if fault.kind is FaultKind.GARBAGE:
            return bytes(255 - byte for byte in data[:64])
        message = stage_service_pb2.ExchangeRequest.FromString(data)
        body: Any = message.part if message.WhichOneof("message") == "part" else message.frame
        getattr(self, f"_{fault.kind.value}")(body)
        damaged = message.SerializeToString()
        return _reseal(damaged) if fault.resealed else damaged

    def _edit(self, body: Any, change: Any) -> None:
        field = "data" if hasattr(body, "data") else "payload"
        payload = bytearray(getattr(body, field))
        change(payload)
        setattr(body, field, bytes(payload))

    def _truncate(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            del payload[len(payload) // 2 :]

        self._edit(body, change)

    def _payload_bit(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)

        self._edit(body, change)

    def _swap_blocks(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:64], payload[64:128] = payload[64:128], payload[0:64]

        self._edit(body, change)

    def _swap_bf16(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:2], payload[2:4] = payload[2:4], payload[0:2]

        self._edit(body, change)

    def _nan(self, body: Any) -> None:
        def change(payload: bytearray) -> None:
            payload[0:4] = b"\xff\xff\xff\xff"

        self._edit(body, change)

    def _header_bit(self, body: Any) -> None:
        row = body.rows[self._random.randrange(len(body.rows))]
        fields = [(body, "step"), (body, "epoch"), (body, "hop_to_plus_one"), (body, "version")]
        fields += [(body, "header_crc32c"), (body, "payload_crc32c"), (row, "first_position")]
        fields += [(mark, "history_digest") for mark in row.marks]
        target, field = self._random.choice(fields)
        setattr(target, field, getattr(target, field) ^ 1 << self._random.randrange(8))

    def _wrong_dtype(self, body: Any) -> None:
        swap = {DType.BF16: DType.F16, DType.F16: DType.BF16, DType.F32: DType.I32}
        body.dtype = int(swap[DType(body.dtype)])

    def _wrong_shape(self, body: Any) -> None:
        tokens, hidden = body.shape
        body.shape[:] = [tokens * 2, hidden // 2]

    def _relabel_request(self, body: Any) -> None:
        body.rows[0].request = bytes(reversed(body.rows[0].request))

    def _relabel_position(self, body: Any) -> None:
        body.rows[0].first_position += 1

    def _wrong_hop(self, body: Any) -> None:
        body.hop_from_plus_one += 1

    def _wrong_fingerprint(self, body: Any) -> None:
        body.fingerprint = bytes(reversed(body.fingerprint))

    def _token_field(self, body: Any) -> None:
        body.rows[0].token.position += 1

    def _old_epoch(self, body: Any) -> None:
        body.epoch -= 1


def _reseal(data: bytes) -> bytes:
    """True checksums over whatever the message says now, tokens' own included."""
    frame = codec.decode_request(data)
    assert isinstance(frame, StepFrame)
    rows = tuple(replace(row, token=row.token.sealed()) if row.token else row for row in frame.rows)
    (encoded,) = codec.encode_frame(replace(frame, rows=rows).sealed())
    return encoded


class FrameProxy:
    """Listens where a predecessor dials, and dials ``target``. Belongs to one event loop."""

    def __init__(self, target: str, plan: FaultPlan | None = None, *, seed: int = 0) -> None:
        self.target = target
        self.plan: FaultPlan = plan or NoFaults()
        self.fired: list[Fired] = []
        self.forwarded = 0
        """Frames (not parts) put on the wire towards the target, whatever became of them."""
        self.swallow_requests = False
        """Black hole towards the target: read, and gone."""
        self.swallow_answers = False
        """Black hole towards the predecessor."""
        self.address = ""
        self._damage = FrameDamage(seed)
        self._copies: Counter[int] = Counter()
        self._armed: Fault | None = None
        """The fault for the frame now passing, until a message it can happen to comes by."""
        self._answer_faults: list[Fault] = []
        self._late: bytes | None = None
        self._calls: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Returns the address to dial."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handlers = {"Exchange": grpc.stream_stream_rpc_method_handler(self._exchange, None, None)}
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self) -> None:
        self.reset()
        if self._server is not None:
            await self._server.stop(0)

    def reset(self) -> None:
        """Break every connection now."""
        for task in tuple(self._calls):
            task.cancel()

    # ---------------------------------------------------------------- inside

    async def _exchange(self, requests: object, context: Any) -> None:
        del requests
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        options = [("grpc.use_local_subchannel_pool", 1)]
        try:
            async with grpc.aio.insecure_channel(self.target, options=options) as channel:
                call = channel.stream_stream(EXCHANGE)()
                await self._carry(context, call)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", error.trailing_metadata())
        except asyncio.CancelledError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "reset by the fault proxy")
        finally:
            self._calls.discard(task)

    async def _carry(self, context: Any, call: Any) -> None:
        forward = asyncio.create_task(self._forward(context, call))
        back = asyncio.create_task(self._return(context, call))
        try:
            await asyncio.wait({forward, back}, return_when=asyncio.FIRST_COMPLETED)
            if forward.done() and not forward.exception():
                await back
            for task in (forward, back):
                if task.done():
                    task.result()
        finally:
            for task in (forward, back):
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task
            self._late = None

    async def _forward(self, context: Any, call: Any) -> None:
        reading: asyncio.Task[Any] | None = None
        while True:
            reading = reading or asyncio.create_task(context.read())
            wait_s = REORDER_WAIT_S if self._late is not None else None
            await asyncio.wait({reading}, timeout=wait_s)
            if not reading.done():
                late, self._late = self._late, None
                await call.write(late)
                continue
            data, reading = reading.result(), None
            if data is grpc.aio.EOF:
                await call.done_writing()
                return
            for message in await self._pass(data):
                if not self.swallow_requests:
                    await call.write(message)

    async def _return(self, context: Any, call: Any) -> None:
        async for data in call:
            copies = 1
            if codec.decode_response(data).__class__ is not codec.LinkState and self._answer_faults:
                fault = self._answer_faults.pop(0)
                copies = 0 if fault.kind is FaultKind.DROP_ANSWER else 2
            for _ in range(0 if self.swallow_answers else copies):
                await context.write(data)

    async def _pass(self, data: bytes) -> list[bytes]:
        """What goes on in place of one message."""
        message = stage_service_pb2.ExchangeRequest.FromString(data)
        which = message.WhichOneof("message")
        if which == "open":
            return [data]
        body: Any = message.frame if which == "frame" else message.part
        if which == "frame":
            self.forwarded += 1
            self._copies[body.step] += 1
            self._armed = self.plan.pick(body.step, self._copies[body.step])
        out = await self._meet(data, body) if self._armed is not None else [data]
        if self._late is not None and out and out[0] is not self._late:
            out, self._late = [*out, self._late], None
        return out

    async def _meet(self, data: bytes, body: Any) -> list[bytes]:
        """Let the armed fault happen to this message, if it can."""
        fault = self._armed
        assert fault is not None
        kind = fault.kind
        if kind in PAYLOAD_KINDS and not (hasattr(body, "data") or body.payload):
            return [data]
        self._armed = None
        self.fired.append(Fired(fault, body.step, self._copies[body.step]))
        if kind is FaultKind.DROP:
            return []
        if kind is FaultKind.DUPLICATE:
            return [data, data]
        if kind is FaultKind.REORDER:
            late, self._late = self._late, data
            return [] if late is None else [late]
        if kind is FaultKind.DELAY:
            await asyncio.sleep(0.02)
            return [data]
        if kind is FaultKind.OLD_EPOCH:
            return [self._damage.damage(data, replace(fault, resealed=True)), data]
        if kind is FaultKind.RESET:
            self.reset()
            return []
        if kind in {FaultKind.DROP_ANSWER, FaultKind.DUPLICATE_ANSWER}:
            self._answer_faults.append(fault)
            return [data]
        return [self._damage.damage(data, fault)]
