"""What is left of a run in the mesh and on the machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

import psutil
from opentelemetry.proto.trace.v1.trace_pb2 import Span, TracesData

from services.client import MeshClient
from services.stress.verdict import Remains
from stagemesh.errors import MeshError, RequestUnknown
from stagemesh.v1 import admin_service_pb2

EMPTY_S_MAX = 15.0
"""Audits behind the last answers and the workers' next reports take a moment."""
POLL_S = 0.2
TRACES_MAX = 50
BARRIER_LATE_MS = 60_000
WORK = frozenset({"prefill", "decode"})
"""Spans of a request's own work, which a recovery interrupts."""
READINGS_APART_NS = 50_000_000
"""A recovery's span is placed by two readings of the clock, which a busy coordinator takes one
after the other: work that ended so shortly before may have ended behind its beginning."""


async def look_at_remains(client: MeshClient, requests: Sequence[str]) -> Remains:
    """Wait until nothing is left, or for so long; then say what is. Of ``requests``, the traces of
    the last are looked at."""
    seen = await client.mesh()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EMPTY_S_MAX):
            while _holds_something(seen):
                await asyncio.sleep(POLL_S)
                seen = await client.mesh()
    diagnostics = await client.diagnostics()
    return Remains(
        kv_tokens={one.worker.name: one.kv_tokens for one in seen.workers},
        in_flight=sum(one.in_flight for one in seen.routes)
        + sum(one.in_flight for one in seen.workers),
        on_routes=sum(one.requests for one in seen.routes),
        running=seen.running,
        queued=seen.queued,
        spans_broken=await _broken_spans(client, requests[-TRACES_MAX:]),
        barriers=tuple(_wrong_barriers(diagnostics.barriers)),
    )


def _holds_something(seen: admin_service_pb2.GetMeshResponse) -> bool:
    on_routes = any(one.in_flight or one.requests for one in seen.routes)
    on_workers = any(one.in_flight or one.kv_tokens for one in seen.workers)
    return bool(seen.running or seen.queued or on_routes or on_workers)


async def _broken_spans(client: MeshClient, requests: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for request_id in requests:
        try:
            why = broken_tree(await client.trace(request_id))
        except RequestUnknown:
            continue  # pushed out by later ones
        except MeshError as error:
            why = error.message
        if why:
            found[request_id] = why
    return found


def broken_tree(traces: bytes) -> str:
    """Why the spans of TracesData are not one tree in which each recovery links to the work that it
    interrupted; empty if they are."""
    spans = [
        span
        for of_resource in TracesData.FromString(traces).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]
    known = {span.span_id for span in spans}
    roots = [span.name for span in spans if not span.parent_span_id]
    strays = [
        span.name for span in spans if span.parent_span_id and span.parent_span_id not in known
    ]
    if strays:
        return f"spans without their parent: {', '.join(sorted(set(strays)))}"
    return _broken_link(spans) if len(roots) == 1 else f"{len(roots)} spans have no parent"


def _broken_link(spans: Sequence[Span]) -> str:
    """A recovery that interrupted nothing, because nothing had been done yet, has no link."""
    work = {span.span_id: span for span in spans if span.name in WORK}
    for span in spans:
        if not span.name.startswith("recovery "):
            continue
        interrupted = [link.span_id for link in span.links if _kind_of(link) == "interrupted"]
        if any(one not in work for one in interrupted):
            return f"{span.name} links to work that is not there"
        before = span.start_time_unix_nano - READINGS_APART_NS
        siblings = [one for one in work.values() if one.parent_span_id == span.parent_span_id]
        if not interrupted and any(one.end_time_unix_nano < before for one in siblings):
            return f"{span.name} has no link to the work that it interrupted"
    return ""


def _kind_of(link: Span.Link) -> str:
    found = (one.value.string_value for one in link.attributes if one.key == "mesh.link")
    return next(found, "")


def _wrong_barriers(barriers: Sequence[object]) -> list[str]:
    found = []
    for one in barriers:
        name, state = getattr(one, "name", ""), getattr(one, "state", "")
        absent, age_ms = list(getattr(one, "absent", ())), int(getattr(one, "age_ms", 0))
        if state == "complete" and absent:
            found.append(f"barrier {name} is complete without {', '.join(absent)}")
        if state == "forming" and age_ms > BARRIER_LATE_MS:
            found.append(f"barrier {name} stands for {age_ms} ms")
    return found


def leftovers(ages: Mapping[int, float]) -> list[str]:
    """Processes, by id and time of birth, that are still there."""
    found = []
    for pid, born in ages.items():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{pid} ({process.name()})")
    return found
