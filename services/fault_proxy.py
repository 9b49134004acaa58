"""A StageService between two hops that damages, loses, repeats, delays and holds what passes.

It is a real gRPC server and client, so what it does happens on the path the mesh uses: serialized
bytes, HTTP/2, reconnects. ``plan`` says which fault meets which copy of which step
(``fault_damage``); ``hold`` stops the first message that matches until it is released, so that
something else can be made to happen at exactly that point of a generation. Everything that fired is
recorded, and not before it has: a frame that is held back is reordered once a later one of its
epoch has gone ahead of it, and answers are lost once one of them was on its way.

The proxy listens on loopback only and has no remote control: whoever runs it owns the object. A
mesh passes through it only if it was started with the proxy's address in the place of a process's
own (``--advertise``).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from services import codec
from services.channel import message_options
from services.codec import LinkOpening
from services.fault_damage import (
    PAYLOAD_KINDS,
    Fault,
    FaultKind,
    FaultPlan,
    Fired,
    FrameDamage,
    NoFaults,
    SameFault,
    ScriptedFaults,
    SeededFaults,
)
from services.server import PING_INTERVAL_MS_MIN
from services.stage_service import EXCHANGE, SERVICE
from stagemesh.errors import InvalidConfiguration
from stagemesh.frame import StepFrame
from stagemesh.parts import PartedFrame
from stagemesh.v1 import stage_service_pb2

__all__ = [
    "PAYLOAD_KINDS",
    "Fault",
    "FaultKind",
    "FaultPlan",
    "Fired",
    "FrameDamage",
    "FrameProxy",
    "Hold",
    "NoFaults",
    "SameFault",
    "ScriptedFaults",
    "SeededFaults",
]

REORDER_WAIT_S = 0.05
"""A frame held back for the next one to overtake goes on after this if none comes."""
DELAY_S = 0.02

_FIRE_LATER = frozenset({FaultKind.REORDER, FaultKind.LOSE_ANSWERS})

Passing = LinkOpening | StepFrame
"""What a hold may match: the opening of a link, or a frame (of a parted one, its head)."""


@dataclass(slots=True, eq=False)
class Hold:
    """One message that does not go on until it is released. ``seen``: what is (or was) held."""

    matches: Callable[[Passing], bool]
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    seen: Passing | None = None
    waiting: bool = False
    """The message is at the proxy now, and its connection still stands."""
    drop: bool = False
    """Once released it vanishes instead of going on, and with it every copy that is sent again."""

    def release(self, *, drop: bool = False) -> None:
        """Let it go on, or drop it."""
        self.drop = drop
        self.released.set()


@dataclass(frozen=True, slots=True, eq=False)
class _Late:
    """A frame held back so that a later one of its epoch, on the same connection, overtakes it."""

    call: Any
    data: bytes
    fired: Fired


@dataclass(slots=True, eq=False)
class _Loss:
    """Answers of one connection that are being lost. ``began``: one has been."""

    call: Any
    fired: Fired
    began: bool = False


class FrameProxy:
    """Listens where a predecessor dials, and dials ``target``. Belongs to one event loop."""

    def __init__(self, target: str, plan: FaultPlan | None = None, *, seed: int = 0) -> None:
        self.target = target
        self.plan: FaultPlan = plan or NoFaults()
        self.plan_hop_from: int | None = None
        """The plan concerns only frames of this sender (its stage index); None: everybody's."""
        self.fired: list[Fired] = []
        self.forwarded = 0
        """Frames (not parts) put on the wire towards the target, whatever became of them."""
        self.swallowed = 0
        """Messages that went into a black hole."""
        self.swallow_requests = False
        """Black hole towards the target: read, and gone."""
        self.swallow_answers = False
        """Black hole towards the predecessor."""
        self.swallow_matching: Callable[[StepFrame], bool] | None = None
        """Black hole for some frames only."""
        self.address = ""
        self._holds: list[Hold] = []
        self._dropped: set[tuple[int, int]] = set()
        """(epoch, step) of frames that a hold made vanish."""
        self._damage = FrameDamage(seed)
        self._copies: Counter[int] = Counter()
        self._armed: Fault | None = None
        """The fault for the frame now passing, until a message it can happen to comes by."""
        self._answer_faults: list[Fault] = []
        self._late: _Late | None = None
        self._loss: _Loss | None = None
        self._furthest: dict[int, int] = {}
        """Highest step seen of an epoch."""
        self._is_repeat = False
        """The frame now passing has been here before."""
        self._calls: set[asyncio.Task[Any]] = set()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Returns the address to dial. Raises InvalidConfiguration if there is no port."""
        # As patient with keepalive pings as the mesh's own servers: else long steps break links.
        pings = ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN // 2)
        options = [("grpc.so_reuseport", 0), pings, *message_options()]
        self._server = grpc.aio.server(options=options)
        handlers: dict[str, Any] = {
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange, None, None)
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            port = self._server.add_insecure_port("127.0.0.1:0")
        except RuntimeError as error:
            raise InvalidConfiguration("no port for a fault proxy") from error
        await self._server.start()
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self) -> None:
        """Break what passes, let go of what is held, and stop listening."""
        for hold in self._holds:
            hold.release()
        self._holds.clear()
        self.reset()
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def reset(self) -> None:
        """Break every connection now."""
        for task in tuple(self._calls):
            task.cancel()

    def hold(self, matches: Callable[[Passing], bool]) -> Hold:
        """Stop the first message that matches from now on. Until it is released, everything behind
        it on the same connection waits as well."""
        hold = Hold(matches)
        self._holds.append(hold)
        return hold

    def forget(self, hold: Hold) -> None:
        """Release a hold, whether or not anything reached it."""
        hold.release()
        if hold in self._holds:
            self._holds.remove(hold)

    # ---------------------------------------------------------------- inside

    async def _exchange(self, requests: object, context: Any) -> None:
        del requests
        task = asyncio.current_task()
        if task is None:
            return
        self._calls.add(task)
        options = [("grpc.use_local_subchannel_pool", 1), *message_options()]
        try:
            async with grpc.aio.insecure_channel(self.target, options=options) as channel:
                call: Any = channel.stream_stream(EXCHANGE)()
                await self._carry(context, call)
        except grpc.aio.AioRpcError as error:
            if not context.done():
                trailing = tuple(error.trailing_metadata() or ())
                await context.abort(error.code(), error.details() or "", trailing)
        except asyncio.CancelledError:
            if not context.done():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "reset by the fault proxy")
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # Whoever dialled has gone, and there is nobody left to tell.
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
            if self._late is not None and self._late.call is call:
                self._late = None
            if self._loss is not None and self._loss.call is call:
                self._loss = None

    async def _forward(self, context: Any, call: Any) -> None:
        reading: asyncio.Task[Any] | None = None
        try:
            while True:
                reading = reading or asyncio.create_task(context.read())
                late = self._late if self._late is not None and self._late.call is call else None
                await asyncio.wait({reading}, timeout=REORDER_WAIT_S if late else None)
                if late is not None and not reading.done():
                    self._late = None
                    await call.write(late.data)
                    continue
                data, reading = reading.result(), None
                if data is grpc.aio.EOF:
                    await call.done_writing()
                    return
                await self._send(call, data)
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    async def _send(self, call: Any, data: bytes) -> None:
        for message in await self._pass(call, data):
            if self.swallow_requests:
                self.swallowed += 1
            else:
                await call.write(message)

    async def _return(self, context: Any, call: Any) -> None:
        async for data in call:
            copies = 1
            is_answer = codec.decode_response(data).__class__ is not codec.LinkState
            if is_answer and self._is_lost(call):
                continue
            if is_answer and self._answer_faults:
                fault = self._answer_faults.pop(0)
                copies = 0 if fault.kind is FaultKind.DROP_ANSWER else 2
            if self.swallow_answers:
                self.swallowed += 1
                continue
            for _ in range(copies):
                await context.write(data)

    def _is_lost(self, call: Any) -> bool:
        loss = self._loss
        if loss is None or loss.call is not call:
            return False
        if not loss.began:
            loss.began = True
            self.fired.append(loss.fired)
        return True

    async def _pass(self, call: Any, data: bytes) -> list[bytes]:
        """What goes on in place of one message."""
        looks = self._holds or self._dropped or self.swallow_matching
        if looks and not await self._let_through(data):
            return []
        message = stage_service_pb2.ExchangeRequest.FromString(data)
        which = message.WhichOneof("message")
        if which == "open":
            return [data]
        body: Any = message.frame if which == "frame" else message.part
        if which == "frame":
            self.forwarded += 1
            self._copies[body.step] += 1
            self._see(body)
            concerns = self.plan_hop_from in (None, body.hop_from_plus_one - 1)
            self._armed = self.plan.pick(body.step, self._copies[body.step]) if concerns else None
        late = self._late if self._late is not None and self._late.call is call else None
        out = [data] if self._armed is None else await self._meet(self._armed, call, data, body)
        if late is None or not out:
            return out
        self._late = None
        held = late.fired
        ahead = body.epoch == held.epoch and body.step > held.step
        if which != "frame" or self._is_repeat or not ahead:
            return [late.data, *out]
        self.fired.append(held)
        return [*out, late.data]

    def _see(self, frame: Any) -> None:
        """A frame that is sent again ends the loss of answers. It overtakes nobody and is not
        overtaken: the receiver may have it."""
        furthest = self._furthest.get(frame.epoch, 0)
        self._is_repeat = frame.step <= furthest
        self._furthest[frame.epoch] = max(furthest, frame.step)
        if self._loss is not None and self._loss.began and self._is_repeat:
            self._loss = None

    async def _let_through(self, data: bytes) -> bool:
        """Wait while this message is held; False if it is to vanish."""
        decoded = codec.decode_request(data)
        passing = decoded.frame if isinstance(decoded, PartedFrame) else decoded
        if not isinstance(passing, LinkOpening | StepFrame):
            return True
        hold = next((one for one in self._holds if one.matches(passing)), None)
        if hold is not None:
            self._holds.remove(hold)
            hold.seen, hold.waiting = passing, True
            hold.reached.set()
            try:
                await hold.released.wait()
            finally:
                hold.waiting = False
            if hold.drop:
                if isinstance(passing, StepFrame):
                    self._dropped.add((passing.epoch, passing.step))
                return False
        if isinstance(passing, StepFrame) and (passing.epoch, passing.step) in self._dropped:
            return False
        vanishes = self.swallow_matching
        if vanishes is not None and isinstance(passing, StepFrame) and vanishes(passing):
            self.swallowed += 1
            return False
        return True

    async def _meet(self, fault: Fault, call: Any, data: bytes, body: Any) -> list[bytes]:
        """Let a fault happen to this message, if it can."""
        kind = fault.kind
        if not _can_meet(kind, data, body):
            return [data]
        self._armed = None
        fired = Fired(fault, body.step, self._copies[body.step], body.epoch)
        if kind in _FIRE_LATER:
            return self._begin(call, data, fired)
        self.fired.append(fired)
        if kind is FaultKind.DROP:
            return []
        if kind is FaultKind.DUPLICATE:
            return [data, data]
        if kind is FaultKind.DELAY:
            await asyncio.sleep(DELAY_S)
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

    def _begin(self, call: Any, data: bytes, fired: Fired) -> list[bytes]:
        """What has only happened once something else did. One at a time of each."""
        if fired.fault.kind is FaultKind.LOSE_ANSWERS:
            self._loss = self._loss or _Loss(call, fired)
        elif self._late is None and not self._is_repeat:
            self._late = _Late(call, data, fired)
            return []
        return [data]


def _can_meet(kind: FaultKind, data: bytes, body: Any) -> bool:
    """Whether there is in this message what the fault is about."""
    is_part = hasattr(body, "data")
    if kind in PAYLOAD_KINDS:
        return bool(is_part or body.payload)
    if kind is FaultKind.OLD_EPOCH:  # only a whole frame can be sealed again
        return not is_part and not isinstance(codec.decode_request(data), PartedFrame)
    return True
