"""Workers, their reports and their commands: protobuf on one side, plain data on the other.

What comes in over the wire is checked here and nowhere else: names, lengths and ranges, before
anything is stored. All errors are FrameMalformed, which a worker gets as INVALID_ARGUMENT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from coordinator import events, instructions
from services import codec
from services.channel import COORDINATOR_NAME
from stagemesh import PROTOCOL_VERSION
from stagemesh.errors import FrameMalformed
from stagemesh.topology import WorkerInfo, WorkerName
from stagemesh.v1 import topology_pb2, worker_service_pb2

NAME_CHARACTERS_MAX = 64
ADDRESS_CHARACTERS_MAX = 300
INSTANCE_CHARACTERS_MAX = 64
FACTS_MAX = 64
"""Entries of an environment or of a barrier's facts."""
COUNTERS_MAX = 512
"""Counters of one report."""
FACT_CHARACTERS_MAX = 512
DETAIL_CHARACTERS_MAX = 1000

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{NAME_CHARACTERS_MAX - 1}}}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def check_name(name: str) -> WorkerName:
    """Raise FrameMalformed unless ``name`` can name a worker."""
    if not _NAME.fullmatch(name) or name == COORDINATOR_NAME:
        raise FrameMalformed("not a worker name", name=name[:NAME_CHARACTERS_MAX])
    return WorkerName(name)


def bounded_facts(facts: Mapping[str, str]) -> dict[str, str]:
    """At most FACTS_MAX entries, cut to FACT_CHARACTERS_MAX."""
    pairs = list(facts.items())[:FACTS_MAX]
    return {key[:FACT_CHARACTERS_MAX]: value[:FACT_CHARACTERS_MAX] for key, value in pairs}


def worker_from_proto(worker: topology_pb2.Worker) -> WorkerInfo:
    """What a worker says of itself, checked. Raises FrameMalformed."""
    if worker.protocol_version != PROTOCOL_VERSION:
        raise FrameMalformed(
            "protocol version", version=worker.protocol_version, expected=PROTOCOL_VERSION
        )
    for field in ("fingerprint", "span_fingerprint"):
        if not _FINGERPRINT.fullmatch(getattr(worker, field)):
            raise FrameMalformed("not a SHA-256 in lower-case hex", field=field)
    if not 0 < len(worker.address) <= ADDRESS_CHARACTERS_MAX or ":" not in worker.address:
        raise FrameMalformed("worker address is not HOST:PORT", field="address")
    if not 0 < len(worker.instance) <= INSTANCE_CHARACTERS_MAX:
        raise FrameMalformed("worker instance is missing or too long", field="instance")
    if not worker.span_first < worker.span_last <= worker.layer_count:
        raise FrameMalformed("span is empty or ends behind the last layer", field="span")
    check_name(worker.name)
    return codec.worker_from_pb(worker)


def worker_to_proto(
    worker: WorkerInfo, environment: Mapping[str, str] | None = None
) -> topology_pb2.Worker:
    """A worker as it registers and as operators see it."""
    proto = codec.worker_to_pb(worker, protocol_version=PROTOCOL_VERSION)
    proto.environment.update(environment or {})
    return proto


def event_from_proto(
    worker: WorkerInfo, request: worker_service_pb2.ConnectRequest
) -> events.Event | None:
    """What a registered worker's message tells the coordinator's core; None if it is not for the
    core.
    """
    kind = request.WhichOneof("message")
    if kind == "progress":
        return _progressed(worker, request.progress)
    if kind == "arrival":
        arrival = request.arrival
        return events.BarrierArrived(
            worker=worker.name,
            name=arrival.name[:FACT_CHARACTERS_MAX],
            epoch=arrival.epoch,
            generation=arrival.generation,
            facts=bounded_facts(arrival.facts),
            refusal=arrival.refusal[:DETAIL_CHARACTERS_MAX],
        )
    if kind == "result":
        result = request.result
        info = worker_from_proto(result.worker) if result.HasField("worker") else None
        return events.CommandFinished(
            worker=worker.name,
            command_id=result.command_id[:FACT_CHARACTERS_MAX],
            ok=result.ok,
            detail=result.detail[:DETAIL_CHARACTERS_MAX],
            info=info,
        )
    if kind == "leave":
        return events.DrainRequested(worker.name, request.leave.timeout_ms / 1000.0)
    if kind == "fault":
        fault = request.fault
        return events.HopFaultSeen(
            worker=worker.name,
            epoch=fault.epoch,
            step=fault.step,
            hop_from=fault.hop_from_plus_one - 1,
            hop_to=fault.hop_to_plus_one - 1,
            reason=fault.reason[:FACT_CHARACTERS_MAX],
            detail=fault.detail[:DETAIL_CHARACTERS_MAX],
            fatal=fault.fatal,
        )
    return None


def _progressed(
    worker: WorkerInfo, report: worker_service_pb2.ProgressReport
) -> events.WorkerProgressed:
    counters = dict(sorted(report.counters.items())[:COUNTERS_MAX])
    return events.WorkerProgressed(
        worker=worker.name,
        instance=worker.instance,
        epoch=report.epoch,
        accepted_step=report.accepted_step,
        computed_step=report.computed_step,
        acknowledged_step=report.acknowledged_step,
        queued=report.queued,
        kv_tokens=report.kv_tokens,
        computing_step=report.computing_step,
        computing_s=report.computing_ms / 1000.0,
        starved_s=report.starved_us / 1e6,
        counters=counters,
    )


def open_route_to_proto(
    instruction: instructions.OpenRoute, stage_index: int, coordinator_address: str
) -> worker_service_pb2.ConnectResponse:
    """One worker's part of a route. The last stage's successor is the coordinator."""
    route = instruction.route
    last = stage_index == route.stage_count - 1
    successor = None if last else route.workers[stage_index + 1]
    return worker_service_pb2.ConnectResponse(
        open_route=worker_service_pb2.OpenRoute(
            epoch=route.epoch,
            stage_index=stage_index,
            stage_count=route.stage_count,
            successor_address=successor.address if successor else coordinator_address,
            successor_name=successor.name if successor else COORDINATOR_NAME,
            fingerprint=route.workers[stage_index].fingerprint,
            barrier=OPEN_ROUTE_BARRIER,
            generation=instruction.generation,
            timeout_ms=int(instruction.timeout_s * 1000),
        )
    )


OPEN_ROUTE_BARRIER = "open-route"
"""Name of the barrier every worker of a new route arrives at."""
