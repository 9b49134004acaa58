"""One way to run a gRPC server: limits, keepalive, TLS, health, reflection, and an orderly end.

Anything but loopback needs TLS, unless the operator says ``insecure``; ports are never shared;
every method served must have a row in ``access.py``. ``drain`` turns health to NOT_SERVING, refuses
new calls, lets running ones finish within the grace, and then ends.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from services import health, reflection
from services.access import ACCESS
from services.channel import MESSAGE_BYTES_MAX, ChannelOption, message_options
from services.credentials import TlsFiles
from services.grpc_types import RpcMethodHandler
from services.interceptors import RpcObserver, ServerInterceptor
from stagemesh.errors import InvalidConfiguration

CONCURRENT_RPCS_MAX = 4096
"""Calls at a time on one server, streams included; more get RESOURCE_EXHAUSTED at the door."""
PING_INTERVAL_MS_MIN = 2_000
"""A peer may probe a silent connection this often; the mesh's own channels do so every 20 s,
control streams every 3 s."""
DRAIN_GRACE_S = 10.0
"""What running calls get by default."""
STOP_GRACE_S = 0.5
"""What the mesh's own streams get to notice that the connection closes."""

_log = logging.getLogger(__name__)


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can be reached from this host only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to listen. ``address`` is host:port; port 0 takes a free one."""

    address: str
    tls: TlsFiles | None = None
    insecure: bool = False
    """Serve without TLS even where other hosts can connect."""
    concurrent_rpcs_max: int = CONCURRENT_RPCS_MAX
    message_bytes_max: int = MESSAGE_BYTES_MAX

    def check(self) -> None:
        """Raise InvalidConfiguration if this would be open to others without TLS."""
        host, colon, port = self.address.rpartition(":")
        if not self.address.startswith("unix:") and not (colon and host and port.isdecimal()):
            raise InvalidConfiguration(
                "address is not HOST:PORT", setting="address", value=self.address
            )
        if self.tls is None and not self.insecure and not is_loopback(self.address):
            raise InvalidConfiguration(
                "refusing to listen beyond loopback without TLS; give certificates "
                "(stagemesh certs init) or say --insecure",
                setting="address",
                value=self.address,
            )


def server_options(message_bytes_max: int = MESSAGE_BYTES_MAX) -> list[ChannelOption]:
    """What every server of the mesh uses."""
    return [
        *message_options(message_bytes_max),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class _RegisteringServer:
    """Stands in for a server in generated ``add_…_to_server`` functions and records what they
    add.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.methods: list[str] = []

    def add_generic_rpc_handlers(self, handlers: tuple[grpc.GenericRpcHandler, ...]) -> None:
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, RpcMethodHandler]
    ) -> None:
        self.methods += [f"/{service}/{name}" for name in handlers]


class MeshServer:
    """A grpc.aio server with everything a mesh process needs around its own services.

    Belongs to one event loop. ``add`` services, ``start``, set ``health``, and ``drain`` at the
    end.
    """

    def __init__(self, options: ServerOptions, *, observer: RpcObserver | None = None) -> None:
        options.check()
        self.health = health.HealthService()
        self._options = options
        self._interceptor = ServerInterceptor(observer=observer)
        self._server = grpc.aio.server(
            interceptors=[self._interceptor],
            options=server_options(options.message_bytes_max),
            maximum_concurrent_rpcs=options.concurrent_rpcs_max,
            compression=grpc.Compression.NoCompression,
        )
        self._services: list[str] = []
        self._port = 0

    def add(self, add_to_server: Callable[..., None], servicer: object) -> None:
        """Register a generated service: ``add(add_FooServiceServicer_to_server, servicer)``.

        Its health starts as NOT_SERVING. Raises InvalidConfiguration if a method has no access row.
        """
        recorder = _RegisteringServer(self._server)
        add_to_server(servicer, recorder)
        self._admit(recorder.methods)

    def add_handlers(self, service: str, handlers: Mapping[str, RpcMethodHandler]) -> None:
        """Register handlers by method name for a service without generated code."""
        self._admit([f"/{service}/{name}" for name in handlers])
        generic = grpc.method_handlers_generic_handler(service, dict(handlers))
        self._server.add_generic_rpc_handlers((generic,))

    def _admit(self, methods: list[str]) -> None:
        for method in methods:
            if method not in ACCESS:
                raise InvalidConfiguration("a method has no row in access.py", method=method)
        for service in dict.fromkeys(method.split("/")[1] for method in methods):
            self._services.append(service)
            self.health.set(service, serving=False)

    async def start(self) -> None:
        """Bind and serve. Raises InvalidConfiguration if the address is taken or cannot be
        bound.
        """
        self.add_handlers(health.SERVICE_NAME, self.health.handlers())
        self.health.set(health.SERVICE_NAME, serving=True)
        self._server.add_generic_rpc_handlers(reflection.handlers(self._services))
        address = self._options.address
        try:
            if self._options.tls is None:
                self._port = self._server.add_insecure_port(address)
            else:
                credentials = self._options.tls.server_credentials()
                self._port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise InvalidConfiguration(
                "cannot listen: the port is in use, or the address is not of this host",
                setting="address",
                value=address,
            ) from error
        await self._server.start()
        _log.info("listening on %s (%s)", self.address, "TLS" if self._options.tls else "plaintext")

    @property
    def address(self) -> str:
        """host:port as bound (port 0 resolved)."""
        if self._options.address.startswith("unix:"):
            return self._options.address
        return f"{self._options.address.rpartition(':')[0]}:{self._port}"

    def set_serving(self, *, serving: bool) -> None:
        """Health of every own service and of the process as a whole."""
        for service in ("", *self._services):
            if service != health.SERVICE_NAME:
                self.health.set(service, serving=serving)

    async def drain(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """NOT_SERVING; new calls are refused; running ones have ``grace_s`` seconds; the end.
        Idempotent.

        Calls that carry the mesh itself go on until the very end.
        """
        self.health.enter_graceful_shutdown()
        await self._interceptor.drain(grace_s)
        await self._server.stop(STOP_GRACE_S)

    async def wait(self) -> None:
        """Until the server has ended."""
        await self._server.wait_for_termination()
