"""Bad links between network namespaces, with the kernel's own TCP at both ends."""

import asyncio
import os
import socket
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from services.fault_connection import Direction
from services.stress import namespaces
from services.stress.machines import checksum_errors, netem_command
from services.stress.namespaces import Namespace, Visit
from services.stress.packets import Fate, LinkQuality
from services.stress.switch import OVERTAKING, Switch

WHY_NOT = namespaces.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
NEAR, FAR, PORT = "10.77.0.1", "10.77.0.2", 7070
BYTES = 400_000


@contextmanager
def two_machines(quality: LinkQuality, seed: int = 1, spared: tuple[str, ...] = ()):
    """Both on one switch; needs a running loop."""
    switch = Switch(quality, seed, frozenset(spared))
    near, far = namespaces.make(NEAR), namespaces.make(FAR)
    switch.attach("near", near)
    switch.attach("far", far)
    try:
        yield switch, near, far
    finally:
        switch.close()
        near.close()
        far.close()


def inside(namespace: Namespace, work):
    """The result of ``work``, done by a thread in there."""

    def visit():
        there = Visit(namespace)
        try:
            return work()
        finally:
            there.leave()

    return asyncio.to_thread(visit)


def listener() -> socket.socket:
    return socket.create_server((FAR, PORT))


def received(server: socket.socket) -> bytes:
    server.settimeout(60.0)
    connection, _ = server.accept()
    with server, connection:
        connection.settimeout(60.0)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def send(data: bytes) -> None:
    with socket.create_connection((FAR, PORT), timeout=60.0) as connection:
        connection.sendall(data)


async def transfer(near: Namespace, far: Namespace, data: bytes) -> bytes:
    server = await inside(far, listener)
    receiving = asyncio.create_task(asyncio.to_thread(received, server))
    await inside(near, lambda: send(data))
    return await receiving


def links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


async def test_tcp_gets_everything_across_a_link_that_loses_damages_and_reorders():
    data = os.urandom(BYTES)
    quality = LinkQuality(delay_s=0.002, lost=0.02, corrupted=0.02, forged=0.0, overtaking=0.05)
    before = links()
    with two_machines(quality) as (switch, near, far):
        assert await transfer(near, far, data) == data
        assert switch.counts[Fate.LOST.value] > 0
        assert switch.counts[OVERTAKING] > 0
        damaged = switch.counts[Fate.CORRUPTED.value]
        assert damaged > 0
        assert 0 < checksum_errors(near) + checksum_errors(far) <= damaged
    assert links() == before, "nothing of it was ever in our own namespace"


async def test_what_is_forged_gets_past_tcp():
    data = bytes(BYTES)
    with two_machines(LinkQuality(0.002, 0.0, 0.0, 0.05, 0.0)) as (switch, near, far):
        got = await transfer(near, far, data)
        assert len(got) == len(data)
        wrong = sum(byte.bit_count() for byte in got)
        assert 0 < wrong <= switch.counts[Fate.FORGED.value]
        assert checksum_errors(near) + checksum_errors(far) == 0


async def test_nothing_is_forged_for_whom_nothing_could_notice():
    data = bytes(BYTES // 4)
    with two_machines(LinkQuality(0.002, 0.0, 0.0, 0.5, 0.0), spared=("near",)) as (switch, *both):
        assert await transfer(*both, data) == data
        assert switch.counts[Fate.FORGED.value] == 0


async def test_a_machine_that_is_cut_off_gets_nothing_until_it_is_back():
    with two_machines(LinkQuality(0.001, 0.0, 0.0, 0.0, 0.0)) as (switch, near, far):
        switch.hold("far", Direction.FORWARD)
        going = asyncio.create_task(transfer(near, far, b"hello"))
        while not switch.held("far"):
            await asyncio.sleep(0.01)
        assert not going.done()
        switch.release("far")
        assert await going == b"hello"


async def test_a_namespace_ends_with_its_descriptors():
    made = namespaces.make(NEAR)
    assert (await namespaces.run_inside(made, "cat", "/proc/net/dev"))[1].count("tun0") == 1
    there = os.readlink(f"/proc/self/fd/{made.descriptor}")
    made.close()
    assert there not in set(held_anywhere()), "no process holds it"
    made.close()


def held_anywhere():
    """The namespaces that processes are in or have open."""
    for process in Path("/proc").glob("[0-9]*"):
        for link in (process / "ns/net", *(process / "fd").glob("*")):
            with suppress(OSError):
                yield os.readlink(link)


async def test_only_the_visiting_thread_is_elsewhere():
    home = os.readlink("/proc/thread-self/ns/net")
    with two_machines(LinkQuality()) as (_switch, near, _far):
        there = await inside(near, lambda: os.readlink("/proc/thread-self/ns/net"))
        assert there == os.readlink(f"/proc/self/fd/{near.descriptor}") != home
        assert os.readlink("/proc/thread-self/ns/net") == home
        assert threading.current_thread() is threading.main_thread()


async def test_netem_does_the_same_where_the_kernel_has_it():
    command = netem_command(LinkQuality())
    assert command[-8:] == (
        "delay", "50ms", "loss", "1.000%", "corrupt", "0.100%", "reorder", "1.000%",
    )  # fmt: skip
    made = namespaces.make(NEAR)
    try:
        status, said = await namespaces.run_inside(made, *command)
    finally:
        made.close()
    assert status == 0 or "qdisc kind is unknown" in said or "No such file" in said, said
