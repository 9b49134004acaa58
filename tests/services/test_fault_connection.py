"""Connections that fail below gRPC, and that the mesh's channels notice it in bounded time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from services.channel import (
    CONTROL_KEEPALIVE_TIME_MS,
    CONTROL_KEEPALIVE_TIMEOUT_MS,
    open_channel,
    open_control_channel,
)
from services.fault_connection import ConnectionProxy, Direction
from services.server import server_options

ECHO = "/test.Echo/Exchange"
NOTICED_S_MAX = (CONTROL_KEEPALIVE_TIME_MS + CONTROL_KEEPALIVE_TIMEOUT_MS) / 1000 + 2.0


async def echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.fixture
async def proxy() -> AsyncIterator[ConnectionProxy]:
    """In front of a server that sends everything back."""
    server = grpc.aio.server(options=server_options())
    handlers = {"Exchange": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
    one = ConnectionProxy(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    await server.start()
    await one.start()
    yield one
    await one.stop()
    await server.stop(0)


@contextlib.asynccontextmanager
async def a_call(proxy: ConnectionProxy, *, control: bool = False):
    opened = open_control_channel(proxy.address) if control else open_channel(proxy.address)
    async with opened as channel:
        call = channel.stream_stream(ECHO)()
        await call.write(b"first")
        assert await call.read() == b"first"
        yield call


async def nothing_comes(call, seconds: float = 0.3) -> asyncio.Task:
    reading = asyncio.create_task(call.read())
    await asyncio.wait({reading}, timeout=seconds)
    assert not reading.done()
    return reading


async def test_what_a_black_hole_held_back_arrives_when_it_closes(proxy: ConnectionProxy):
    for direction in Direction:
        async with a_call(proxy) as call:
            proxy.black_hole(direction)
            await call.write(b"late")
            reading = await nothing_comes(call)
            assert proxy.held(direction) > 0
            proxy.heal()
            assert await asyncio.wait_for(reading, 5.0) == b"late"


async def test_a_reset_ends_calls_at_once(proxy: ConnectionProxy):
    async with a_call(proxy) as call:
        proxy.reset()
        with pytest.raises(grpc.RpcError) as broken:
            await asyncio.wait_for(call.read(), 5.0)
        assert broken.value.code() is grpc.StatusCode.UNAVAILABLE
    assert proxy.resets == 1


async def test_a_slow_reader_holds_up_who_writes(proxy: ConnectionProxy):
    async with a_call(proxy) as call:
        proxy.slow_down(Direction.FORWARD, 20_000.0)
        began = time.monotonic()
        await call.write(bytes(8_000))
        assert len(await asyncio.wait_for(call.read(), 10.0)) == 8_000
        assert time.monotonic() - began >= 0.3
        assert proxy.slowed(Direction.FORWARD) >= 8_000


async def test_a_half_open_control_stream_is_noticed_by_the_end_that_was_not_told(
    proxy: ConnectionProxy,
):
    async with a_call(proxy, control=True) as call:
        proxy.half_open()
        await call.write(b"into the void")
        with pytest.raises(grpc.RpcError):
            await asyncio.wait_for(call.read(), NOTICED_S_MAX)
    assert proxy.half_opened == 1
    assert proxy.swallowed > 0


async def test_a_handshake_that_takes_its_time_is_waited_for(proxy: ConnectionProxy):
    proxy.black_hole(Direction.BACK)
    asyncio.get_running_loop().call_later(0.6, proxy.heal)
    async with a_call(proxy):
        assert proxy.accepted == 1
