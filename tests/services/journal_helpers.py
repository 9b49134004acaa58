"""Requests, tokens and files for the journal's tests."""

from __future__ import annotations

import time
from pathlib import Path

from coordinator.events import GenerationRequested
from coordinator.instructions import (
    AcceptTokens,
    FailRequest,
    FinishRequest,
    RecoveryRecord,
    RequestSummary,
)
from services.journal_codec import instruction_record, request_record, resumed_record
from services.journal_contents import JournalLimits, Write
from services.journal_rows import StoredGeneration
from services.journal_store import JournalStore
from stagemesh.checksum import chain_next, chain_start
from stagemesh.errors import RouteUnavailable
from stagemesh.sampling import SamplingSpec
from stagemesh.token import StageMark, TokenChunk, ValidationStatus
from stagemesh.topology import WorkerName

MODEL = "tiny 0123"
PROMPT = (3, 1, 4, 1, 5)
NOW_NS = 1_700_000_000 * 10**9


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def demand(request: bytes, **fields: object) -> GenerationRequested:
    return GenerationRequested(
        request,
        PROMPT,
        SamplingSpec(temperature=0.5, seed=7, logit_bias=((3, -1.5),)),
        max_tokens=1000,
        stop_token_ids=frozenset({9, 2}),
        **fields,  # type: ignore[arg-type]
    )


def chunk(request: bytes, index: int) -> TokenChunk:
    """Token ``index`` of an answer whose tokens count up; its chain links it to the one before."""
    chain = chain_start(request, PROMPT)
    for before in range(index + 1):
        chain = chain_next(chain, len(PROMPT) + before, before)
    return TokenChunk(
        request,
        len(PROMPT) + index,
        index,
        epoch=5,
        step=index + 1,
        logprob=-0.25,
        margin=1.5,
        sampled_at_unix_ns=NOW_NS,
        source="stage-1",
        chain=chain,
        marks=(StageMark(1, 2, 3), StageMark(1, 2, 0)),
        alternatives=((4, -2.5),),
        status=ValidationStatus.VALID,
    ).sealed()


def accept(request: bytes, index: int) -> AcceptTokens:
    return AcceptTokens(request, index, (chunk(request, index),))


def summary(tokens: int) -> RequestSummary:
    recovery = RecoveryRecord(
        "STAGE_UNREACHABLE",
        "reroute",
        "stage-1",
        (WorkerName("stage-0"), WorkerName("stage-1")),
        (WorkerName("full"),),
        epoch=6,
        kept=2,
        replayed=7,
        seconds=0.25,
    )
    return RequestSummary(
        len(PROMPT), tokens, (WorkerName("full"),), (recovery,), 0.5, 0.75, 2.0, b"c" * 16
    )


def finish(request: bytes, tokens: int) -> FinishRequest:
    return FinishRequest(request, "length", summary(tokens))


def failure(request: bytes, tokens: int) -> FailRequest:
    return FailRequest(request, RouteUnavailable("gone", worker="stage-1"), summary(tokens))


def open_store(path: Path, *, wall_ns: int = NOW_NS, **limits: object) -> JournalStore:
    return JournalStore.open(
        path,
        model=MODEL,
        wall_ns=wall_ns,
        limits=JournalLimits(**limits) if limits else None,  # type: ignore[arg-type]
    )


def begin_write(request: bytes) -> Write:
    record = request_record(demand(request), now=time.monotonic(), wall_ns=NOW_NS)
    return Write(request, record.SerializeToString(), begins=True)


def token_write(request: bytes, index: int) -> Write:
    record = instruction_record(accept(request, index), wall_ns=NOW_NS + index)
    return Write(request, record.SerializeToString())


def end_write(request: bytes, tokens: int) -> Write:
    record = instruction_record(finish(request, tokens), wall_ns=NOW_NS)
    return Write(request, record.SerializeToString(), ends=True)


def resume_write(request: bytes) -> Write:
    failed = demand(request, resumed_after="ROUTE_UNAVAILABLE", deadline=5.0)
    record = resumed_record(failed, now=3.0, wall_ns=NOW_NS)
    return Write(request, record.SerializeToString(), resumes=True)


def keep(
    store: JournalStore, number: int, tokens: int, *, ends: bool = True, wall_ns: int = NOW_NS
) -> bytes:
    """Write one generation in as many transactions as it has records."""
    request = key(number)
    store.write([begin_write(request)], wall_ns=wall_ns)
    for index in range(tokens):
        store.write([token_write(request, index)], wall_ns=wall_ns)
    if ends:
        store.write([end_write(request, tokens)], wall_ns=wall_ns)
    return request


def tokens_of(stored: StoredGeneration | None) -> list[int]:
    assert stored is not None
    return [token.token_id for record in stored.records for token in record.tokens.tokens]


def content(store: JournalStore) -> dict[bytes, tuple[list[int], bool]]:
    """Everything a reader could be told."""
    found = {}
    for number in range(1, 20):
        stored = store.read(key(number))
        if stored is not None:
            found[key(number)] = (tokens_of(stored), stored.ended)
    return found
