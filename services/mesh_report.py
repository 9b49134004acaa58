"""The mesh's state, for people and for programs, from what AdminService says."""

from __future__ import annotations

from typing import Any

from stagemesh import __version__
from stagemesh.v1 import admin_service_pb2, generation_service_pb2, topology_pb2

CHUNK_FACT = "prefill_chunk_tokens"
"""Fact of the environment: where a prompt that is computed alone is cut. Who computes an answer
again, to compare it bit for bit on a fast matrix library, must cut it in the same places."""
_JOURNAL = "journal"
"""What the names of the journal's facts begin with among the coordinator's."""
SETTING = "setting."
"""What the names of settings begin with among them."""


def _word(name: str) -> str:
    """``WORKER_STATE_READY`` as ``ready``."""
    return name.split("_STATE_", 1)[-1].lower()


def word_of(status: topology_pb2.WorkerStatus) -> str:
    """A worker's state in one lower-case word."""
    return _word(topology_pb2.WorkerState.Name(status.state))


def worker_json(status: topology_pb2.WorkerStatus) -> dict[str, Any]:
    """One worker; ``stage_index`` is null for a worker on no route."""
    worker = status.worker
    return {
        "name": worker.name,
        "pid": worker.pid,
        "address": worker.address,
        "span": [worker.span_first, worker.span_last],
        "layer_count": worker.layer_count,
        "stage_index": status.stage_index_plus_one - 1 if status.stage_index_plus_one else None,
        "state": word_of(status),
        "epoch": status.epoch,
        "weights_fingerprint": worker.fingerprint,
        "in_flight": status.in_flight,
        "kv_tokens": status.kv_tokens,
        "memory_bytes": worker.memory_bytes,
        "dtype": worker.dtype,
        "instance": worker.instance,
        "evidence": status.evidence,
    }


def route_json(route: topology_pb2.RouteStatus) -> dict[str, Any]:
    """One route."""
    return {
        "epoch": route.epoch,
        "workers": list(route.workers),
        "state": _word(topology_pb2.RouteState.Name(route.state)),
        "step": route.step,
        "in_flight": route.in_flight,
        "requests": route.requests,
        "full_worker": route.full_worker,
    }


def status_json(mesh: admin_service_pb2.GetMeshResponse) -> dict[str, Any]:
    """What ``stagemesh status --json`` prints."""
    return {
        "version": __version__,
        "coordinator": {"version": mesh.version, "pid": mesh.pid, "uptime_s": mesh.uptime_s},
        "ready": mesh.ready,
        "not_ready_reason": mesh.not_ready_reason,
        "workers": [worker_json(worker) for worker in mesh.workers],
        "routes": [route_json(route) for route in mesh.routes],
        "requests": {
            "running": mesh.running,
            "queued": mesh.queued,
            "finished": mesh.finished,
            "failed": mesh.failed,
        },
        "journal": journal_json(mesh),
        "settings": settings_json(mesh),
        "environment": environment_json(mesh),
    }


def diagnostics_json(seen: admin_service_pb2.GetDiagnosticsResponse) -> dict[str, Any]:
    """What ``stagemesh status --barriers --guards --json`` adds: every barrier, forming ones first,
    and every counter by process."""
    return {
        "barriers": [
            {
                "name": one.name,
                "epoch": one.epoch,
                "generation": one.generation,
                "state": one.state,
                "participants": list(one.participants),
                "arrived": list(one.arrived),
                "absent": list(one.absent),
                "culprits": list(one.culprits),
                "cause": one.cause,
                "detail": one.detail,
                "age_ms": one.age_ms,
                "remaining_ms": one.remaining_ms,
                "last_progress": dict(one.last_progress),
            }
            for one in seen.barriers
        ],
        "guards": {
            "coordinator": dict(seen.counters),
            **{one.worker: dict(one.counters) for one in seen.workers},
        },
    }


def barrier_line(barrier: dict[str, Any]) -> str:
    """One barrier for people."""
    came = f"{len(barrier['arrived'])} of {len(barrier['participants'])} arrived"
    why = f", {barrier['cause']}: {barrier['detail']}" if barrier["cause"] else ""
    left = f", {barrier['remaining_ms']} ms left" if barrier["remaining_ms"] else ""
    key = f"{barrier['name']} epoch {barrier['epoch']} generation {barrier['generation']}"
    return f"barrier {key}: {barrier['state']}, {came}, {barrier['age_ms']} ms{left}{why}"


def environment_json(mesh: admin_service_pb2.GetMeshResponse) -> dict[str, str]:
    """Model, dtype, BLAS, threads, cores and versions: the coordinator's facts and a worker's.

    The dtype is the one that is computed in: a coordinator may only know that it was left open.
    """
    facts = {
        name: fact
        for name, fact in mesh.environment.items()
        if not _is_journals(name) and not name.startswith(SETTING)
    }
    for worker in mesh.workers:
        facts |= dict(worker.worker.environment) | {"dtype": worker.worker.dtype}
    return facts


def journal_json(mesh: admin_service_pb2.GetMeshResponse) -> dict[str, str]:
    """The coordinator's journal: ``path``, ``state``, what is kept; empty if it keeps none."""
    return {
        name.removeprefix(_JOURNAL).removeprefix("_") or "path": fact
        for name, fact in mesh.environment.items()
        if _is_journals(name)
    }


def settings_json(mesh: admin_service_pb2.GetMeshResponse) -> dict[str, str]:
    """The coordinator's settings that explain what it did: name → value."""
    return {
        name.removeprefix(SETTING): value
        for name, value in sorted(mesh.environment.items())
        if name.startswith(SETTING)
    }


def _is_journals(fact: str) -> bool:
    return fact.startswith(_JOURNAL)


def finish_json(finish: generation_service_pb2.Finish) -> dict[str, Any]:
    """The end of an answer, without what the client measures itself."""
    reason = generation_service_pb2.FinishReason.Name(finish.reason)
    return {
        "finish_reason": reason.removeprefix("FINISH_REASON_").lower(),
        "matched_stop": finish.matched_stop,
        "usage": {
            "prompt_tokens": finish.prompt_tokens,
            "completion_tokens": finish.completion_tokens,
        },
        "route": list(finish.route),
        "recoveries": [
            {
                "cause": one.cause,
                "action": one.action,
                "worker": one.worker,
                "from": list(one.from_route),
                "to": list(one.to_route),
                "epoch": one.epoch,
                "kept": one.kept,
                "replayed": one.replayed,
                "seconds": one.seconds,
            }
            for one in finish.recoveries
        ],
        "checks": dict(finish.checks),
        "timings": {
            "queue_s": finish.timings.queue_s,
            "tokenize_s": finish.timings.tokenize_s,
            "time_to_first_token_s": finish.timings.time_to_first_token_s,
            "total_s": finish.timings.total_s,
            "tokens_per_second": finish.timings.tokens_per_second,
        },
    }
