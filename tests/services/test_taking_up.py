"""A generation that failed through no fault of its client is gone on with when it is asked for."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.echo import VOCAB_SIZE, oracle
from coordinator.events import WorkerLost
from coordinator.instructions import CorrectTokens
from coordinator.settings import MeshPolicy
from services.journal_contents import Write
from services.stream_checker import StreamChecker
from stagemesh import errors
from stagemesh.v1 import generation_service_pb2 as pb
from tests.services.conftest import CONTEXT_LENGTH, Edge
from tests.services.test_resumption import (
    COUNT,
    EXPECTED,
    PROMPT,
    as_after_kill_9,
    ask,
    collect,
    ids_of,
    open_store,
    text_of,
    until,
)

CUT = 20
"""Tokens the client has when its mesh is lost."""


def policy(**more: Any) -> MeshPolicy:
    limits = {"fallback_wait_s_max": 0.05, "route_wait_s_max": 0.05} | more
    return MeshPolicy(vocab_size=VOCAB_SIZE, context_tokens_max=CONTEXT_LENGTH, **limits)


def lose_everybody(edge: Edge) -> None:
    for info in reversed(edge.ports.infos.values()):  # so that nothing is tried in between
        edge.driver.feed(WorkerLost(info.name, info.instance, "gone"))


async def bring_back(edge: Edge, **facts: Any) -> None:
    """New processes under the old names."""
    ports = edge.ports
    ports.infos = {
        name: replace(info, instance=info.instance + "'", **facts)
        for name, info in ports.infos.items()
    }
    ports.start()
    await until(lambda: edge.driver.snapshot().ready)


async def fail_in_the_middle(
    edge: Edge, request: pb.GenerateRequest
) -> tuple[list[pb.GenerateResponse], errors.MeshError]:
    """Read ``request`` until every worker is lost at its CUTth token, and to its failure."""

    def at_the_cut(seen: list[pb.GenerateResponse]) -> None:
        if len(ids_of(seen)) >= CUT:
            lose_everybody(edge)

    return await read_to_failure(edge, request, at_the_cut)


async def read_to_failure(
    edge: Edge, request: pb.GenerateRequest, look: Callable[[list[pb.GenerateResponse]], None]
) -> tuple[list[pb.GenerateResponse], errors.MeshError]:
    """Read ``request``, slowly, until it fails; ``look`` sees what was read so far."""
    edge.ports.delay_s = 0.0005
    seen: list[pb.GenerateResponse] = []
    try:
        async with aclosing(edge.client.generate(request)) as stream:
            async for response in stream:
                seen.append(response)
                look(seen)
    except errors.MeshError as failure:
        return seen, failure
    finally:
        edge.ports.delay_s = 0.0
    raise AssertionError("it did not fail")


@asynccontextmanager
async def failed(
    serve: Any, request: pb.GenerateRequest, **options: Any
) -> AsyncIterator[tuple[Edge, list[pb.GenerateResponse]]]:
    """A coordinator at which ``request`` ended for want of a route, and what its client read."""
    async with serve(policy=policy(), **options) as edge:
        seen, error = await fail_in_the_middle(edge, request)
        assert isinstance(error, errors.RouteUnavailable)
        assert error.metadata["position"] == str(len(ids_of(seen)))
        assert error.metadata["request_id"] == request.request_id
        assert error.metadata["resumable"] == "yes"
        assert CUT <= len(ids_of(seen)) < COUNT
        yield edge, seen


@pytest.mark.parametrize("journalled", [False, True])
async def test_the_rest_follows_exactly_once_when_the_mesh_is_back(
    serve: Any, tmp_path: Path, journalled: bool
):
    request = ask()
    store = open_store(tmp_path / "journal.db") if journalled else None
    async with failed(serve, request, store=store) as (edge, seen):
        await bring_back(edge)
        position = len(ids_of(seen))
        rest = await collect(edge.client.resume(request.request_id, position))
        assert ids_of(seen) + ids_of(rest) == EXPECTED
        assert text_of(seen) + text_of(rest) == edge.model.tokenizer.decode(EXPECTED)
        (finish,) = [response.finish for response in rest if response.HasField("finish")]
        assert (finish.reason, finish.completion_tokens) == (pb.FINISH_REASON_LENGTH, COUNT)
        last = finish.recoveries[-1]
        assert (last.cause, last.action) == ("ROUTE_UNAVAILABLE", "replay")
        assert (last.kept, last.replayed) == (position, position + len(PROMPT))
        assert [one.cause for one in finish.recoveries[:-1]] == ["STAGE_UNREACHABLE"]
        again = await collect(edge.client.resume(request.request_id))
        assert ids_of(again) == EXPECTED
        assert sum(response.HasField("finish") for response in again) == 1
        (shown,) = edge.driver.snapshot().generations
        assert (shown.phase, shown.completion_tokens) == ("finished", COUNT)


async def test_the_same_call_again_goes_on_and_repeats_what_it_said(serve: Any):
    request = ask()
    async with failed(serve, request) as (edge, _):
        await bring_back(edge)
        checker = StreamChecker(uuid.UUID(request.request_id).bytes, PROMPT)
        assert ids_of(await collect(edge.client.generate(request, checker=checker))) == EXPECTED
        assert checker.links_checked == COUNT


async def test_without_a_route_it_fails_again_as_it_did_and_loses_nothing(serve: Any):
    request = ask()
    async with failed(serve, request) as (edge, seen):
        for _ in range(2):
            with pytest.raises(errors.RouteUnavailable):
                await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        await bring_back(edge)
        rest = await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        assert ids_of(seen) + ids_of(rest) == EXPECTED
        causes = [one.cause for one in rest[-1].finish.recoveries]
        assert causes == ["STAGE_UNREACHABLE"] + ["ROUTE_UNAVAILABLE"] * 3


async def test_two_clients_that_come_back_read_one_answer(serve: Any):
    request = ask()
    async with failed(serve, request) as (edge, _):
        await bring_back(edge)
        edge.ports.pause()
        calls = [edge.client.generation.Generate(request) for _ in range(2)]
        await until(lambda: edge.book.newest_first()[0].readers == 2)
        edge.ports.go_on()
        for call in calls:
            assert ids_of([response async for response in call]) == EXPECTED
        assert edge.driver.snapshot().finished == 1


async def test_a_generation_that_failed_before_a_restart_is_gone_on_with_behind_it(
    serve: Any, tmp_path: Path
):
    request, path = ask(), tmp_path / "journal.db"
    async with failed(serve, request, store=open_store(path)) as (_, seen):
        pass
    store = open_store(path)
    assert (store.running, store.ended) == (0, 1)
    async with serve(store=store) as edge:
        rest = await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        assert ids_of(seen) + ids_of(rest) == EXPECTED
        causes = [one.cause for one in rest[-1].finish.recoveries]
        assert causes == ["STAGE_UNREACHABLE", "ROUTE_UNAVAILABLE"]
    async with serve(store=open_store(path)) as edge:
        assert ids_of(await collect(edge.client.resume(request.request_id))) == EXPECTED


async def test_one_that_was_gone_on_with_outlives_the_coordinator_like_any_other(
    serve: Any, tmp_path: Path
):
    request, path = ask(), tmp_path / "journal.db"
    store = open_store(path)
    async with failed(serve, request, store=store) as (edge, seen):
        await bring_back(edge)
        edge.ports.delay_s = 0.002
        call = edge.client.generation.Generate(request)
        record = edge.book.newest_first()[0]
        await until(lambda: len(record.answer.tokens) > len(ids_of(seen)) + 3)
        left = as_after_kill_9(path, tmp_path / "left")
        call.cancel()
    after = open_store(left)
    assert (after.running, after.ended) == (1, 0)
    async with serve(store=after) as edge:
        rest = await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        assert ids_of(seen) + ids_of(rest) == EXPECTED
        assert rest[-1].finish.recoveries[-1].cause == "COORDINATOR_RESTARTED"


@pytest.mark.parametrize("journalled", [False, True])
async def test_other_weights_do_not_go_on_with_it(serve: Any, tmp_path: Path, journalled: bool):
    request = ask()
    store = open_store(tmp_path / "journal.db") if journalled else None
    async with failed(serve, request, store=store) as (edge, seen):
        await bring_back(edge, fingerprint="cd" * 32)
        with pytest.raises(errors.JournalError, match="other weights"):
            await collect(edge.client.resume(request.request_id, len(ids_of(seen))))


async def test_what_its_client_caused_is_not_gone_on_with(serve: Any):
    async with serve(policy=policy()) as edge:
        edge.ports.pause()
        request = ask()
        with pytest.raises(errors.DeadlineExceeded):
            await collect(edge.client.generate(request, timeout_s=0.1, resume=False))
        record = edge.book.newest_first()[0]
        assert (await record.answer.ended()).error is not None
        edge.ports.go_on()
        with pytest.raises(errors.DeadlineExceeded):
            await collect(edge.client.resume(request.request_id))
        assert edge.driver.snapshot().running == 0


async def test_a_position_that_was_never_reached_wakes_nothing(serve: Any):
    request = ask()
    async with failed(serve, request) as (edge, seen):
        await bring_back(edge)
        with pytest.raises(errors.InvalidRequest):
            await collect(edge.client.resume(request.request_id, len(ids_of(seen)) + 1))
        assert edge.driver.snapshot().running == 0


async def test_a_client_that_also_missed_a_correction_is_told_of_it_and_the_rest_follows(
    serve: Any,
):
    request, kept = ask(), CUT // 2
    async with failed(serve, request) as (edge, seen):
        answer, position = edge.book.newest_first()[0].answer, len(ids_of(seen))
        last, end, answer.end = answer.tokens[-1].chain, answer.end, None
        answer.correct(CorrectTokens(answer.request, kept, "SHADOW_MISMATCH"))
        answer.end = end  # the correction came first, and then the failure
        message = pb.ResumeGenerationRequest(
            request_id=request.request_id, from_position=position, chain=last
        )
        state = edge.driver.mesh.state
        state.policy = policy(fallback_wait_s_max=60.0, route_wait_s_max=60.0)
        stream = aiter(edge.client.generation.ResumeGeneration(message))
        told = (await anext(stream)).response
        assert told.correction.from_position == kept
        # Not before: it makes the same tokens again, and a client that has them has missed nothing.
        await bring_back(edge)
        rest = [one.response async for one in stream]
        assert ids_of(rest) == EXPECTED[kept:]
        assert rest[-1].finish.reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_string_found_behind_the_failure_ends_it(serve: Any):
    async with serve(policy=policy()) as edge:
        text = edge.model.tokenizer.decode(EXPECTED)
        start = len(edge.model.tokenizer.decode(EXPECTED[: CUT + 20]))
        stop = text[start : start + 4]
        request = ask(stop=[stop])
        seen, _ = await fail_in_the_middle(edge, request)
        await bring_back(edge)
        rest = await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        assert rest[-1].finish.reason == pb.FINISH_REASON_STOP
        assert text_of(seen) + text_of(rest) == text[: text.index(stop)]


class FullDisk:
    """Refuses to write while ``is_full``."""

    def __init__(self, store: Any) -> None:
        self.is_full = False
        self._write: Callable[..., None] = store.write
        store.write = self

    def __call__(self, writes: list[Write], *, wall_ns: int) -> None:
        if self.is_full:
            raise errors.JournalError("the disk is full")
        self._write(writes, wall_ns=wall_ns)


@pytest.mark.parametrize("cut", [0, CUT])
async def test_what_could_not_be_kept_goes_on_when_the_disk_has_room(
    serve: Any, tmp_path: Path, cut: int
):
    request, path = ask(), tmp_path / "journal.db"
    store = open_store(path)
    disk = FullDisk(store)
    async with serve(store=store) as edge:
        disk.is_full = not cut

        def fill_the_disk(seen: list[pb.GenerateResponse]) -> None:
            disk.is_full = len(ids_of(seen)) >= cut

        seen, error = await read_to_failure(edge, request, fill_the_disk)
        assert isinstance(error, errors.JournalError)
        assert bool(seen) == bool(cut)
        disk.is_full = False
        rest = await collect(edge.client.resume(request.request_id, len(ids_of(seen))))
        assert ids_of(seen) + ids_of(rest) == EXPECTED
    async with serve(store=open_store(path)) as edge:
        assert ids_of(await collect(edge.client.resume(request.request_id))) == EXPECTED


async def test_one_the_journal_has_retired_is_not_known_any_more(serve: Any, tmp_path: Path):
    request = ask()
    store = open_store(tmp_path / "journal.db", generations_max=1)
    async with failed(serve, request, store=store) as (edge, seen):
        await bring_back(edge)
        await collect(edge.client.generate(ask(max_tokens=3)))
        with pytest.raises(errors.RequestUnknown, match="retired"):
            await collect(edge.client.resume(request.request_id, len(ids_of(seen))))


async def test_a_call_that_was_turned_away_comes_again_and_harms_no_other(
    serve: Any, tmp_path: Path
):
    store = open_store(tmp_path / "journal.db")
    full = policy(queue_length_max=1, requests_running_max=1)
    async with serve(policy=full, store=store) as edge:
        edge.ports.pause()
        calls = []
        for running in (1, 2):
            calls.append(edge.client.generation.Generate(ask(max_tokens=8)))
            await until(lambda count=running: edge.journal.store.running == count)
        refused = ask(max_tokens=8)
        with pytest.raises(errors.Overloaded):
            await collect(edge.client.generate(refused))
        edge.ports.go_on()
        for call in calls:
            assert ids_of([response async for response in call]) == EXPECTED[:8]
        responses = await collect(edge.client.generate(refused))
        assert ids_of(responses) == EXPECTED[:8] == oracle(PROMPT, 8, layer_count=6)
        assert not responses[-1].finish.recoveries
        other = ask(request_id=refused.request_id, max_tokens=9)
        with pytest.raises(errors.RequestConflict):
            await collect(edge.client.generate(other))
