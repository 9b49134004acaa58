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


def channel_options() -> list[ChannelOption]:
    """What every channel of the mesh uses."""
    return [
        *message_options(),
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # The mesh resends from its own ledger and resumes by position; gRPC must not do it again.
        ("grpc.enable_retries", 0),
        # Reconnecting is bounded by our own backoff; the transport's must not outgrow it.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # A dial is a fresh connection, never another channel's wait for its backoff.
        ("grpc.use_local_subchannel_pool", 1),
        # A proxy named in the environment must not come between two stages.
        ("grpc.enable_http_proxy", 0),
    ]


def tls_name_of(peer: str) -> str:
    """The TLS name a mesh peer must present, by its mesh name (``"coordinator"`` or a worker's)."""
    return COORDINATOR_TLS_NAME if peer == COORDINATOR_NAME else WORKER_TLS_NAME


def open_channel(
    address: str, *, tls: TlsFiles | None = None, peer: str = COORDINATOR_NAME
) -> grpc.aio.Channel:
    """A channel to ``address`` (host:port). It connects on first use; close it when done.

    ``peer`` is the mesh name of who should be there. Raises InvalidConfiguration if a TLS file
    cannot be read.
    """
    options = channel_options()
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
