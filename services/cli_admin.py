"""``stagemesh status | trace | events | drain | health``: looking into a running mesh."""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import sys
from contextlib import aclosing
from typing import Any

from services.cli_common import add_config, add_connection, connect, note, print_json, run_async
from services.mesh_report import barrier_line, diagnostics_json, status_json, word_of
from services.setting_fields import PORT_DEFAULT

ADDRESS_DEFAULT = f"127.0.0.1:{PORT_DEFAULT}"
HEALTH_TIMEOUT_S = 3.0
HEALTH_SERVING, HEALTH_NOT_SERVING = 0, 1
"""Exit statuses of ``stagemesh health``: what container engines understand. 2 is bad usage, as with
every command."""
PLAIN_COLUMNS = 120
"""Width of tables that go into a file or a pipe."""
TOPICS = ("membership", "generation", "integrity", "recovery", "barrier", "diagnostics")


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of the command that was asked for."""
    add_config(parser)
    add_connection(parser, required_note=f"[{ADDRESS_DEFAULT}]")
    if command == "health":
        parser.epilog = "exit status: 0 serving, 1 not serving or not to be reached, 2 bad usage"
        parser.add_argument(
            "--service", default="", help="health service name; empty is the process"
        )
        parser.add_argument(
            "--worker",
            action="store_true",
            help="it is a worker: with TLS, its certificate says so",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=HEALTH_TIMEOUT_S,
            metavar="S",
            help=f"for the connection, and again for the answer [{HEALTH_TIMEOUT_S:g}]",
        )
        return
    parser.add_argument("--json", action="store_true", help="for programs")
    if command == "status":
        parser.add_argument(
            "--barriers", action="store_true", help="rendezvous: forming, and the last that ended"
        )
        parser.add_argument(
            "--guards", action="store_true", help="what every guard counted, by process"
        )
    elif command == "trace":
        parser.add_argument(
            "request_id", metavar="REQUEST_ID", help="as `generate --json` or a log line gives it"
        )
    elif command == "drain":
        parser.add_argument("worker", metavar="WORKER", help="its name in `status`")
        parser.add_argument(
            "--timeout", type=int, default=0, metavar="S", help="for its work to finish [30]"
        )
    elif command == "events":
        parser.add_argument(
            "--topic",
            action="append",
            default=[],
            choices=TOPICS,
            help="only these; may be repeated [all]",
        )
        parser.add_argument(
            "--from",
            "--from-offset",
            dest="from_offset",
            type=int,
            default=0,
            metavar="N",
            help="0: from now on; 1: the oldest kept",
        )
        parser.add_argument("--count", type=int, default=0, metavar="N", help="end after N events")


def run(arguments: argparse.Namespace) -> int:
    """Entry point of all of them."""
    arguments.address = arguments.address or ADDRESS_DEFAULT
    commands = {
        "status": _status,
        "trace": _trace,
        "events": _events,
        "drain": _drain,
        "health": _health,
    }
    return run_async(commands[arguments.command](arguments))


async def _status(arguments: argparse.Namespace) -> int:
    async with connect(arguments, arguments.address) as client:
        mesh = await client.mesh()
        wanted = [name for name in ("barriers", "guards") if getattr(arguments, name)]
        looked_into = diagnostics_json(await client.diagnostics()) if wanted else {}
    inside = {name: looked_into[name] for name in wanted}
    if arguments.json:
        print_json(status_json(mesh) | inside)
        return 0
    _print_status(mesh)
    for barrier in inside.get("barriers", ()):
        print(barrier_line(barrier))
    for process, counters in inside.get("guards", {}).items():
        for name, count in sorted(counters.items()):
            print(f"{process:<14} {name:<36} {count}")
    return 0


def _print_status(mesh: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    document = status_json(mesh)
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_COLUMNS)
    state = "ready" if mesh.ready else f"not ready: {mesh.not_ready_reason}"
    console.print(f"coordinator {mesh.version}, pid {mesh.pid}, up {mesh.uptime_s:.0f} s, {state}")
    workers = Table("worker", "layers", "stage", "state", "epoch", "in flight", "KV", "address")
    for one in document["workers"]:
        stage = "" if one["stage_index"] is None else str(one["stage_index"])
        span = f"{one['span'][0]}-{one['span'][1]}"
        facts = (one["state"], one["epoch"], one["in_flight"], one["kv_tokens"], one["address"])
        workers.add_row(one["name"], span, stage, *(str(fact) for fact in facts))
    console.print(workers)
    for route in document["routes"]:
        console.print(
            f"route epoch {route['epoch']}: {' → '.join(route['workers'])} {route['state']}, "
            f"{route['requests']} requests, {route['in_flight']} steps in flight"
        )
    counts = document["requests"]
    console.print("requests: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    journal = document["journal"]
    if journal:
        kept = f"{journal['generations']}, {journal['bytes']} bytes"
        console.print(f"journal {journal['path']}: {journal['state']}, {kept}")
    else:
        console.print("journal: none; answers do not outlive the coordinator")


async def _trace(arguments: argparse.Namespace) -> int:
    from services.trace_store import to_otlp_json
    from services.trace_view import print_trace

    async with connect(arguments, arguments.address) as client:
        traces = await client.trace(arguments.request_id)
    if arguments.json:
        print_json(to_otlp_json(traces))
    else:
        print_trace(traces)
    return 0


async def _events(arguments: argparse.Namespace) -> int:
    from stagemesh.v1 import event_service_pb2

    topics = [event_service_pb2.Topic.Value(f"TOPIC_{one.upper()}") for one in arguments.topic]
    count = 0
    async with connect(arguments, arguments.address) as client:
        stream = client.follow(topics, arguments.from_offset)
        async with aclosing(stream) as responses:
            async for response in responses:
                count += response.HasField("event")
                if arguments.json:
                    print_json(event_json(response))
                else:
                    print(event_line(response), flush=True)
                if arguments.count and count >= arguments.count:
                    break
    return 0


def event_json(response: Any) -> dict[str, Any]:
    """A line of ``stagemesh events --json``: an event, or a gap."""
    from stagemesh.v1 import event_service_pb2

    if response.HasField("gap"):
        gap = response.gap
        return {
            "topic": event_service_pb2.Topic.Name(gap.topic).removeprefix("TOPIC_").lower(),
            "gap": [gap.first_offset, gap.last_offset],
        }
    event = response.event
    return {
        "topic": event_service_pb2.Topic.Name(event.topic).removeprefix("TOPIC_").lower(),
        "offset": event.offset,
        "time": dt.datetime.fromtimestamp(event.time_unix_ns / 1e9, dt.UTC).isoformat(),
        "type": event.type,
        "request_id": event.request_id,
        "worker": event.worker,
        "attributes": dict(event.attributes),
        "publisher": event.publisher,
        "sequence": event.sequence,
    }


def event_line(response: Any) -> str:
    """The same for people."""
    facts = event_json(response)
    if "gap" in facts:
        return f"{facts['topic']}: offsets {facts['gap'][0]} to {facts['gap'][1]} are gone"
    attributes = " ".join(f"{key}={value}" for key, value in sorted(facts["attributes"].items()))
    concerns = " ".join(part for part in (facts["worker"], facts["request_id"]) if part)
    return f"{facts['time'][11:23]} {facts['topic']:<11} {facts['type']} {concerns} {attributes}"


async def _drain(arguments: argparse.Namespace) -> int:
    async with connect(arguments, arguments.address) as client:
        status = await client.drain(arguments.worker, arguments.timeout)
    state = word_of(status)
    if arguments.json:
        print_json({"worker": arguments.worker, "state": state})
    else:
        print(f"{arguments.worker}: {state}")
    return 0


async def _health(arguments: argparse.Namespace) -> int:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from services.channel import COORDINATOR_NAME, open_channel
    from services.cli_common import client_tls

    peer = "worker" if arguments.worker else COORDINATOR_NAME
    async with open_channel(arguments.address, tls=client_tls(arguments), peer=peer) as channel:
        try:
            async with asyncio.timeout(arguments.timeout):
                await channel.channel_ready()
        except TimeoutError:
            note(f"stagemesh: no connection to {arguments.address}")
            return HEALTH_NOT_SERVING
        stub: Any = health_pb2_grpc.HealthStub(channel)
        message = health_pb2.HealthCheckRequest(service=arguments.service)
        try:
            response = await stub.Check(message, timeout=arguments.timeout)
        except grpc.aio.AioRpcError as error:
            note(f"stagemesh: {error.code().name}: {error.details()}")
            return HEALTH_NOT_SERVING
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
    serving = response.status == health_pb2.HealthCheckResponse.SERVING
    return HEALTH_SERVING if serving else HEALTH_NOT_SERVING
