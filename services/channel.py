"""One way to open a channel: explicit limits, keepalive, no compression, mutual TLS where files are
given.

A mesh peer is known by its *role*, not by the host name it happens to run on: the TLS target name
is overridden with the role's name (``coordinator.stagemesh`` or ``worker.stagemesh``), which only a
certificate of that role carries. A stage's certificate therefore cannot stand in for the
coordinator's, and addresses may change freely.
"""

from __future__ import annotations

import grpc

from services.credentials import TlsFiles

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Largest gRPC message either way; payloads above 1 MiB travel in parts, so this is generous."""
KEEPALIVE_TIME_MS = 20_000
"""A silent connection is probed this often."""
KEEPALIVE_TIMEOUT_MS = 10_000
"""An unanswered probe closes the connection after this long."""
CONTROL_KEEPALIVE_TIME_MS = 3_000
"""The same for a worker's control stream, on which the coordinator may say nothing for hours: a
worker whose connection is open at its own end only is out of service until it notices."""
CONTROL_KEEPALIVE_TIMEOUT_MS = 5_000
CONNECT_TIMEOUT_MS = 2_000
"""For TCP, TLS and HTTP/2 together; an address that refuses fails at once all the same."""
METADATA_BYTES_MAX = 16 * 1024
"""Largest header block either way."""

COORDINATOR_TLS_NAME = "coordinator.stagemesh"
WORKER_TLS_NAME = "worker.stagemesh"
COORDINATOR_NAME = "coordinator"
"""The name the coordinator goes by in links and reports; no worker may take it."""

ChannelOption = tuple[str, int | str]


def message_options(message_bytes_max: int = MESSAGE_BYTES_MAX) -> list[ChannelOption]:
    """Size limits, the same on both ends."""
    return [
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.max_send_message_length", message_bytes_max),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
    ]


def channel_options(
    keepalive_ms: int = KEEPALIVE_TIME_MS, timeout_ms: int = KEEPALIVE_TIMEOUT_MS
) -> list[ChannelOption]:
    """What every channel of the mesh uses."""
    return [
        *message_options(),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # The one that counts: without it an unanswered probe is waited for a whole minute.
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # The mesh resends from its own ledger and resumes by position; gRPC must not do it again.
        ("grpc.enable_retries", 0),
        # Reconnecting is bounded by our own backoff; the transport's must not outgrow it.
        ("grpc.initial_reconnect_backoff_ms", 100),
        # How long one attempt to connect may take, whatever its name says. Every dial of a link is
        # a first attempt: with less than a handshake takes, none would ever succeed.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A dial is a fresh connection, never another channel's wait for its backoff.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy named in the environment must not come between two stages.
        ("grpc.enable_http_proxy", 0),
    ]


def tls_name_of(peer: str) -> str:
    """The TLS name a mesh peer must present, by its mesh name (``"coordinator"`` or a worker's)."""
    return COORDINATOR_TLS_NAME if peer == COORDINATOR_NAME else WORKER_TLS_NAME


def open_control_channel(address: str, *, tls: TlsFiles | None = None) -> grpc.aio.Channel:
    """A channel for a worker's control stream: a dead connection is noticed within seconds."""
    options = channel_options(CONTROL_KEEPALIVE_TIME_MS, CONTROL_KEEPALIVE_TIMEOUT_MS)
    return _channel(address, options, tls, COORDINATOR_NAME)


def open_channel(
    address: str, *, tls: TlsFiles | None = None, peer: str = COORDINATOR_NAME
) -> grpc.aio.Channel:
    """A channel to ``address`` (host:port). It connects on first use; close it when done.

    ``peer`` is the mesh name of who should be there. Raises InvalidConfiguration if a TLS file
    cannot be read.
    """
    return _channel(address, channel_options(), tls, peer)


def _channel(
    address: str, options: list[ChannelOption], tls: TlsFiles | None, peer: str
) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(
            address, options=options, compression=grpc.Compression.NoCompression
        )
    options.append(("grpc.ssl_target_name_override", tls_name_of(peer)))
    return grpc.aio.secure_channel(
        address,
        tls.channel_credentials(),
        options=options,
        compression=grpc.Compression.NoCompression,
    )
