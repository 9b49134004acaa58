"""The mesh's side: ask one question of a running mesh and keep everything it says of it."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from coordinator.settings import MeshPolicy
from coordinator.validation.evidence import Delivered, Failure, Observation, StagePlace
from services.client import MeshClient
from services.codec import token_from_pb
from services.mesh_report import CHUNK_FACT
from services.stream_checker import StreamChecker
from services.validate.cases import Case
from stagemesh.errors import MeshError, RouteUnavailable
from stagemesh.token import TokenChunk
from stagemesh.topology import Span
from stagemesh.v1 import admin_service_pb2, topology_pb2

ANSWER_S_MAX = 1800.0
"""Deadline of one answer: a long prompt on a slow matrix library takes minutes."""

OnToken = Callable[[int], Awaitable[None]]
"""Called with the answer index of each token as it arrives."""


async def route_under_test(client: MeshClient) -> tuple[StagePlace, ...]:
    """The stages of the open pipeline, in order; of the full worker when there is no pipeline.

    Raises RouteUnavailable when no route is open.
    """
    return stages_of(await client.mesh())


def stages_of(mesh: admin_service_pb2.GetMeshResponse) -> tuple[StagePlace, ...]:
    """See `route_under_test`."""
    workers = {one.worker.name: one.worker for one in mesh.workers}
    is_open = [one for one in mesh.routes if one.state == topology_pb2.ROUTE_STATE_OPEN]
    longest = max(is_open, key=lambda route: len(route.workers), default=None)
    if longest is None:
        raise RouteUnavailable(f"no route is open: {mesh.not_ready_reason or 'not ready'}")
    return tuple(
        StagePlace(name, Span(workers[name].span_first, workers[name].span_last))
        for name in longest.workers
    )


def chunk_of(mesh: admin_service_pb2.GetMeshResponse) -> int:
    """Prompt tokens per step of a request that is alone; the usual where the mesh does not say."""
    told = mesh.environment.get(CHUNK_FACT, "")
    return int(told) if told.isdecimal() and int(told) else MeshPolicy().prefill_chunk_tokens


async def observe(
    client: MeshClient,
    case: Case,
    stages: Sequence[StagePlace],
    *,
    on_token: OnToken | None = None,
) -> tuple[Observation, Any]:
    """Ask ``case``; what came, and the answer's ``Finish`` (None when it failed).

    The client verifies every token's seal, position and chain; what does not verify counts as a
    failed answer, like an error of the mesh itself.
    """
    prompt = await client.tokenize(case.prompt_request())
    request = case.request(prompt)
    request.request_id = str(uuid.uuid4())
    checker = StreamChecker(uuid.UUID(request.request_id).bytes, prompt)
    chunks: list[TokenChunk] = []
    finish: Any = None
    failure: Failure | None = None
    stream = client.generate(request, timeout_s=ANSWER_S_MAX, checker=checker)
    try:
        async with aclosing(stream) as responses:
            async for response in responses:
                if response.HasField("correction"):
                    del chunks[response.correction.from_position :]
                for message in response.tokens:
                    chunks.append(token_from_pb(message))
                    if on_token is not None:
                        await on_token(len(chunks) - 1)
                if response.HasField("finish"):
                    finish = response.finish
    except MeshError as error:
        failure = failure_of(error)
    seen = Observation(
        prompt=tuple(prompt),
        wanted=case.count,
        tokens=tuple(delivered(chunk) for chunk in chunks),
        text=checker.text,
        stages=tuple(stages),
        failure=failure,
    )
    return seen, finish


def failure_of(error: MeshError) -> Failure:
    """An error as evidence: which worker it names, if any."""
    worker = error.metadata.get("worker") or error.metadata.get("source") or ""
    return Failure(error.reason, error.message, worker)


def delivered(chunk: TokenChunk) -> Delivered:
    """A token chunk as evidence."""
    return Delivered(
        token_id=chunk.token_id,
        position=chunk.position,
        epoch=chunk.epoch,
        logprobs=((chunk.token_id, chunk.logprob), *chunk.alternatives),
        marks=chunk.marks,
    )
