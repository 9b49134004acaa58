"""A network namespace with one TUN device, held by nothing but two descriptors of this process.

There is no name anywhere that could be left behind: when the descriptors and the last process
inside are gone, so are the device, its address and the namespace, however this process ended.
Linux only; needs what root has (CAP_SYS_ADMIN, CAP_NET_ADMIN) and /dev/net/tun.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import ipaddress
import os
import shutil
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stagemesh.errors import InvalidConfiguration

DEVICE = b"tun0"
MASK = "255.255.255.0"
TUN = Path("/dev/net/tun")
NSENTER = "nsenter"
NETEM_S_MAX = 10.0
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS = 0x400454CA, 0x8916, 0x891C, 0x8914
_IFF_TUN_NO_PI, _IFF_UP_RUNNING = 0x1001, 0x41
_IFREQ_BYTES = 40
_OWN = "/proc/thread-self/ns/net"


class NamespacesRefused(InvalidConfiguration):
    """This process may not make network namespaces, or the machine has none."""

    reason = "NAMESPACES_REFUSED"


@dataclass(slots=True)
class Namespace:
    """``tun``: what processes inside send is read from it, and what is written to it they get."""

    address: str
    descriptor: int
    tun: int

    @property
    def packed(self) -> bytes:
        """The address as it stands in packets."""
        return ipaddress.IPv4Address(self.address).packed

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command line that runs ``command`` in here; it becomes the command."""
        return (NSENTER, f"--net=/proc/{os.getpid()}/fd/{self.descriptor}", "--", *command)

    def close(self) -> None:
        """Let go; it ends with the last process inside."""
        for descriptor in (self.tun, self.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self.tun = self.descriptor = -1


def why_not() -> str:
    """Why no namespace can be made here; empty if one can."""
    if not hasattr(os, "geteuid") or not Path(_OWN).exists():
        return "network namespaces are a thing of Linux"
    if shutil.which(NSENTER) is None:
        return f"there is no {NSENTER} (util-linux)"
    if not TUN.exists():
        return f"there is no {TUN}"
    try:
        make("10.0.0.1").close()
    except NamespacesRefused as error:
        return error.message
    return ""


def make(address: str) -> Namespace:
    """A namespace with a TUN device of this address. Raises NamespacesRefused.

    A thread leaves for a namespace of its own and makes the device there; then it ends.
    """
    with ThreadPoolExecutor(1) as apart:
        try:
            return apart.submit(_make, address).result()
        except OSError as error:
            raise NamespacesRefused(
                f"a network namespace cannot be made here ({error}); it takes root, or the "
                "capabilities SYS_ADMIN and NET_ADMIN",
                setting="network",
            ) from error


def _make(address: str) -> Namespace:
    _called("unshare", _CLONE_NEWNET)
    made = Namespace(address, os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC), -1)
    try:
        made.tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(made.tun, _TUNSETIFF, _ifreq(DEVICE, struct.pack("H", _IFF_TUN_NO_PI)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFADDR, _ifreq(DEVICE, _sockaddr(address)))
            fcntl.ioctl(control, _SIOCSIFNETMASK, _ifreq(DEVICE, _sockaddr(MASK)))
            for name in (b"lo", DEVICE):
                fcntl.ioctl(control, _SIOCSIFFLAGS, _ifreq(name, struct.pack("H", _IFF_UP_RUNNING)))
    except OSError:
        made.close()
        raise
    return made


def _called(name: str, *arguments: int) -> None:
    """A call of the C library that Python has no name for in every version we run on."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _ifreq(name: bytes, value: bytes) -> bytes:
    return (struct.pack("16s", name) + value).ljust(_IFREQ_BYTES, b"\0")


def _sockaddr(address: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, ipaddress.IPv4Address(address).packed)


class Visit:
    """The calling thread, and every thread it starts from now on, is inside until ``leave``."""

    def __init__(self, namespace: Namespace) -> None:
        self._home = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        _called("setns", namespace.descriptor, _CLONE_NEWNET)

    def leave(self) -> None:
        """Back to where it was. Idempotent."""
        if self._home >= 0:
            _called("setns", self._home, _CLONE_NEWNET)
            os.close(self._home)
            self._home = -1


def read_inside(namespace: Namespace, path: str) -> str:
    """What a file of ``/proc`` says of this namespace."""

    def read() -> str:
        _called("setns", namespace.descriptor, _CLONE_NEWNET)
        return Path(path).read_text(encoding="ascii")

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(read).result()


async def run_inside(namespace: Namespace, *command: str) -> tuple[int, str]:
    """Exit status and output of a short command in there; a missing program is status 127."""
    try:
        process = await asyncio.create_subprocess_exec(
            *namespace.inside(*command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
    except OSError as error:
        return 127, str(error)
    output, _ = await asyncio.wait_for(process.communicate(), NETEM_S_MAX)
    return process.returncode or 0, output.decode(errors="replace").strip()
