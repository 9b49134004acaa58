"""Everything that is known of one request, from everybody who had part in it.

``gather`` asks the mesh: the generation, its spans, every event that concerns it, the guards'
counters and barriers, workers, versions and settings; and reads the processes' logs if it is told
where they are.

Nothing here is text of the prompt: the mesh's services do not give it out. The answer's token ids
and text are left out as well unless they are asked for; what is left are positions, epochs, times
and counts. The chain digests of single tokens, and what each stage's mark says of one, go with the
text: between two neighbours there is one token, and a vocabulary is small enough to try. What stays
is the digest behind the last token and, for each epoch and boundary between two stages, one CRC
over the checksums of all activations that crossed it: the same answer computed again to the last
bit has the same ones, and the first that differs names the stage.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from services.client import MeshClient
from services.log_reader import LogLine, read_logs
from services.mesh_report import finish_json, status_json
from services.trace_store import to_otlp_json
from services.trace_view import TraceSpan, read_spans, walk
from stagemesh.checksum import crc32c
from stagemesh.errors import MeshError, RequestUnknown
from stagemesh.v1 import admin_service_pb2, event_service_pb2, generation_service_pb2

EVENTS_QUIET_S = 0.5
"""Events are read until none has come for this long."""
EVENTS_S_MAX = 10.0
AROUND_NS = 2_000_000_000
"""Events of a request's workers count from so long before it to so long after."""
TOKENS_S_MAX = 10.0
CHUNK = "ChunkGenerated"
"""The event of a single accepted token."""
_TELLING = ("chain", "checksum")
"""Attributes of such an event that a vocabulary could be tried against."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that is known of one request. ``missing``: what could not be had, and why."""

    request_id: str
    generation: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    mesh: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    trace: dict[str, Any] = field(default_factory=dict)
    spans: list[TraceSpan] = field(default_factory=list)
    tokens: list[dict[str, Any]] = field(default_factory=list)
    digests: list[dict[str, Any]] = field(default_factory=list)
    """Of each epoch and boundary, over all tokens that came of it."""
    logs: list[LogLine] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


async def gather(
    client: MeshClient, request_id: str, *, with_text: bool = False, logs: Path | None = None
) -> Evidence:
    """Ask everybody. Raises RequestUnknown if the mesh has never heard of the request, and whatever
    keeps the coordinator from answering at all."""
    found = Evidence(request_id)
    found.mesh.update(status_json(await client.mesh()))
    found.events.extend(await _events(client))
    await _ask_generation(client, found)
    if not found.generation and not any(_is_of(one, request_id) for one in found.events):
        raise RequestUnknown("nothing is known of this request", request_id=request_id)
    found.diagnostics.update(await _diagnostics(client))
    try:
        traces = await client.trace(request_id)
        found.trace.update(to_otlp_json(traces))
        found.spans.extend(read_spans(traces))
    except MeshError as error:
        found.missing["trace"] = error.message
    found.events[:] = _concerning(found)
    if not with_text:
        for one in found.events:
            _keep_quiet(one)
    try:
        answer = await _answer(client, request_id)
        found.tokens.extend(_of_answer(one, with_text=with_text) for one in answer)
        found.digests.extend(boundary_digests(answer))
    except (MeshError, TimeoutError) as error:
        found.missing["tokens"] = str(error) or "the answer is still being made"
    if logs is not None:
        names = {request_id, found.generation.get("trace_id", "")} - {""}
        near_ns = found.generation.get("created_at_unix_ns", 0) or time.time_ns()
        found.logs.extend(await asyncio.to_thread(read_logs, logs, names, near_ns))
    return found


async def _ask_generation(client: MeshClient, found: Evidence) -> None:
    try:
        one = await client.generation_of(found.request_id)
    except RequestUnknown as error:
        found.missing["generation"] = error.message
        return
    found.generation.update(generation_json(one))


def generation_json(one: admin_service_pb2.Generation) -> dict[str, Any]:
    """A generation as programs read it."""
    state = admin_service_pb2.GenerationState.Name(one.state)
    return {
        "request_id": one.request_id,
        "state": state.removeprefix("GENERATION_STATE_").lower(),
        "prompt_tokens": one.prompt_tokens,
        "completion_tokens": one.completion_tokens,
        "verified_through": one.verified_through,
        "epoch": one.epoch,
        "route": list(one.route),
        "created_at_unix_ns": one.created_at.ToNanoseconds(),
        "trace_id": one.trace_id,
        "error_reason": one.error_reason,
        "recoveries": [MessageToDict(record) for record in one.recoveries],
        "finish": finish_json(one.finish) if one.HasField("finish") else None,
        "chain": one.finish.chain.hex() if one.HasField("finish") else "",
    }


async def _diagnostics(client: MeshClient) -> dict[str, Any]:
    seen = await client.diagnostics()
    return {
        "coordinator": dict(sorted(seen.counters.items())),
        "workers": {one.worker: dict(sorted(one.counters.items())) for one in seen.workers},
        "barriers": [MessageToDict(one) for one in seen.barriers],
    }


async def _events(client: MeshClient) -> list[dict[str, Any]]:
    """Everything that is retained, oldest first."""
    found: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    deadline = loop.time() + EVENTS_S_MAX
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(EVENTS_QUIET_S) as quiet:
            async with aclosing(client.follow((), 1)) as responses:
                async for response in responses:
                    if response.HasField("event"):
                        found.append(event_json(response.event))
                    quiet.reschedule(min(deadline, loop.time() + EVENTS_QUIET_S))
    return sorted(found, key=lambda one: one["time_unix_ns"])


def event_json(event: event_service_pb2.Event) -> dict[str, Any]:
    """An event as programs read it."""
    topic = event_service_pb2.Topic.Name(event.topic)
    return {
        "topic": topic.removeprefix("TOPIC_").lower(),
        "offset": event.offset,
        "time_unix_ns": event.time_unix_ns,
        "type": event.type,
        "request_id": event.request_id,
        "worker": event.worker,
        "attributes": dict(sorted(event.attributes.items())),
    }


async def _answer(
    client: MeshClient, request_id: str
) -> list[generation_service_pb2.GenerateResponse]:
    """Every response of the answer, read once more from its beginning."""
    async with asyncio.timeout(TOKENS_S_MAX):
        async with aclosing(client.resume(request_id, 0)) as responses:
            return [one async for one in responses]


def _of_answer(
    response: generation_service_pb2.GenerateResponse, *, with_text: bool
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "position": response.position,
        "epoch": response.epoch,
        "accepted_at_unix_ns": response.accepted_at_unix_ns,
        "verified_through": response.verified_through,
        "count": len(response.tokens),
        "sources": sorted({token.source for token in response.tokens}),
    }
    if with_text:
        entry["token_ids"] = [token.token_id for token in response.tokens]
        entry["chains"] = [token.chain.hex() for token in response.tokens]
        entry["boundary_crc32c"] = [
            [f"{mark.output_crc32c:08x}" for mark in token.marks] for token in response.tokens
        ]
        entry["text"] = response.text
    return entry


def boundary_digests(
    answer: Sequence[generation_service_pb2.GenerateResponse],
) -> list[dict[str, Any]]:
    """One entry for each epoch and boundary behind a stage: how many tokens' activations crossed
    it, from which position on, and a CRC over the checksums that the stage marked them with."""
    tokens = [
        (response.position + index, token)
        for response in answer
        for index, token in enumerate(response.tokens)
    ]
    found: list[dict[str, Any]] = []
    for epoch in dict.fromkeys(token.epoch for _, token in tokens):
        same = [(position, token) for position, token in tokens if token.epoch == epoch]
        for stage in range(min(len(token.marks) for _, token in same) - 1):
            marked = [token.marks[stage].output_crc32c for _, token in same]
            found.append(
                {
                    "epoch": epoch,
                    "boundary": stage,
                    "position": same[0][0],
                    "tokens": len(same),
                    "crc32c": f"{crc32c(struct.pack(f'<{len(marked)}I', *marked)):08x}",
                }
            )
    return found


# -- what concerns it ------------------------------------------------------------------------------


def _is_of(event: Mapping[str, Any], request_id: str) -> bool:
    return bool(event["request_id"] == request_id)


def _concerning(found: Evidence) -> list[dict[str, Any]]:
    """The request's own events, and those of its workers and epochs in its time."""
    own = [one for one in found.events if _is_of(one, found.request_id)]
    workers, epochs = involved(found.generation, own)
    times = [one["time_unix_ns"] for one in own]
    times += [span.start_ns for _, span in walk(found.spans)]
    times += [span.end_ns for _, span in walk(found.spans)]
    if found.generation:
        times.append(found.generation["created_at_unix_ns"])
    first, last = min(times, default=0) - AROUND_NS, max(times, default=0) + AROUND_NS
    return [
        one
        for one in found.events
        if _is_of(one, found.request_id)
        or (
            not one["request_id"]
            and first <= one["time_unix_ns"] <= last
            and (one["worker"] in workers or one["attributes"].get("epoch", "") in epochs)
        )
    ]


def involved(
    generation: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> tuple[set[str], set[str]]:
    """Workers and epochs (as text) of a request."""
    workers, epochs = set(generation.get("route", ())), set[str]()
    if generation.get("epoch"):
        epochs.add(str(generation["epoch"]))
    for record in generation.get("recoveries", ()):
        workers |= {*record.get("fromRoute", ()), *record.get("toRoute", ())}
        epochs.add(str(record.get("epoch", "")))
    for one in events:
        workers |= {one["worker"], *one["attributes"].get("route", "").split()}
        epochs.add(one["attributes"].get("epoch", ""))
    return workers - {""}, epochs - {""}


def _keep_quiet(event: dict[str, Any]) -> None:
    if event["type"] == CHUNK:
        for name in _TELLING:
            event["attributes"].pop(name, None)
