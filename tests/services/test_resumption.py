"""Answers outlive their coordinator, and clients that went away find them again."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from coordinator.echo import oracle
from coordinator.events import Event, StopMatched
from coordinator.instructions import AcceptTokens
from coordinator.settings import MeshPolicy
from services.answer import Answer
from services.journal_codec import instruction_record, request_record
from services.journal_contents import JournalLimits, Write
from services.journal_rows import StoredGeneration
from services.journal_store import JournalStore
from services.request_reader import EdgeLimits
from services.restored import restore
from stagemesh import errors
from stagemesh.guards import Counters
from stagemesh.v1 import generation_service_pb2 as pb
from tests.services.journal_helpers import chunk, demand, finish, key

PROMPT = (72, 101, 108, 108, 111)
COUNT = 60
EXPECTED = oracle(PROMPT, COUNT, layer_count=6)


def ask(**more: Any) -> pb.GenerateRequest:
    fields = {"max_tokens": COUNT, "ignore_eos": True, "request_id": str(uuid.uuid4())} | more
    return pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=PROMPT), **fields)


async def collect(stream: Any) -> list[pb.GenerateResponse]:
    async with aclosing(stream) as responses:
        return [response async for response in responses]


def ids_of(responses: list[pb.GenerateResponse]) -> list[int]:
    return [token.token_id for response in responses for token in response.tokens]


def text_of(responses: list[pb.GenerateResponse]) -> str:
    return "".join(response.text for response in responses)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


def open_store(path: Path, **limits: Any) -> JournalStore:
    return JournalStore.open(
        path, model="echo", wall_ns=time.time_ns(), limits=JournalLimits(**limits)
    )


def as_after_kill_9(path: Path, to: Path) -> Path:
    """The files as a kill would leave them now; their owner goes on with its own."""
    to.mkdir()
    for name in (path.name, path.name + "-wal"):
        shutil.copy(path.with_name(name), to / name)
    return to / path.name


async def crash(serve: Any, path: Path, request: pb.GenerateRequest, *, at: int) -> Path:
    """A coordinator that is killed once ``at`` tokens are kept; returns the journal it leaves."""
    store = open_store(path)
    async with serve(store=store) as edge:
        edge.ports.delay_s = 0.002 if at else 0.0
        if not at:
            edge.ports.pause()
        reading = asyncio.ensure_future(collect(edge.client.generate(request, resume=False)))
        await until(lambda: len(edge.book) == 1)
        record = edge.book.newest_first()[0]
        await until(lambda: len(record.answer.tokens) >= at and store.running == 1)
        left = as_after_kill_9(path, path.parent / f"left-{at}")
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return left


@pytest.mark.parametrize("at", [0, 1, 30, COUNT - 1])
async def test_what_was_running_is_finished_and_can_be_read_from_any_position(
    serve: Any, tmp_path: Path, at: int
):
    request = ask()
    left = await crash(serve, tmp_path / "journal.db", request, at=at)
    async with serve(store=open_store(left)) as edge:
        whole = edge.model.tokenizer.decode(EXPECTED)
        record = edge.book.newest_first()[0]
        kept = len(record.answer.tokens)
        assert kept >= at
        end = await record.answer.ended()
        assert end.reason == "length"
        assert end.summary.recoveries[0].cause == "COORDINATOR_RESTARTED"
        assert end.summary.recoveries[0].kept == kept
        for position in (0, 1, at, COUNT - 1, COUNT):
            responses = await collect(edge.client.resume(request.request_id, position))
            assert ids_of(responses) == EXPECTED[position:]
            assert whole.endswith(text_of(responses))
            assert sum(response.HasField("finish") for response in responses) == 1
        timings = responses[-1].finish.timings
        decoding_s = timings.total_s - timings.time_to_first_token_s
        assert round(timings.tokens_per_second * decoding_s) == max(0, COUNT - kept - 1)
        assert text_of(await collect(edge.client.resume(request.request_id))) == whole
        with pytest.raises(errors.InvalidRequest):
            await collect(edge.client.resume(request.request_id, COUNT + 1))


async def test_a_second_end_of_the_coordinator_does_not_hide_the_recovery_from_the_first(
    serve: Any, tmp_path: Path
):
    left = await crash(serve, tmp_path / "journal.db", ask(), at=5)
    async with serve(store=open_store(left)) as edge:
        edge.ports.delay_s = 0.002
        answer = edge.book.newest_first()[0].answer
        kept = len(answer.tokens)
        await until(lambda: len(answer.tokens) > kept)
        assert answer.end is None
        left = as_after_kill_9(left, tmp_path / "again")
    async with serve(store=open_store(left)) as edge:
        end = await edge.book.newest_first()[0].answer.ended()
        first, second = end.summary.recoveries
        assert (first.cause, first.kept) == ("COORDINATOR_RESTARTED", kept)
        assert first.seconds is not None
        assert (second.cause, second.kept > kept) == ("COORDINATOR_RESTARTED", True)


def test_text_goes_on_where_it_was_cut_inside_a_character_or_half_a_stop_string(echo_model: Any):
    """Tokens are bytes here; at every cut something may be held back."""
    token_ids = list("a😀b →é→c →end, not told".encode())

    def answer() -> tuple[Answer, list[Event]]:
        fed: list[Event] = []
        made = Answer(
            key(1),
            make_detokenizer=echo_model.tokenizer.detokenizer,
            stops=("never", "→end"),
            feed=fed.append,
            wall_clock_ns=lambda: 5,
        )
        return made, fed

    kept = [
        AcceptTokens(key(1), index, (dataclasses.replace(chunk(key(1), index), token_id=token),))
        for index, token in enumerate(token_ids)
    ]
    undisturbed, told = answer()
    for instruction in kept:
        undisturbed.accept(instruction)
    assert undisturbed.text == "a😀b →é→c "
    assert [type(event) for event in told] == [StopMatched]
    for cut in range(len(kept) + 1):
        restored, fed = answer()
        found = restored.restore((instruction, 3) for instruction in kept[:cut])
        assert fed == []
        for instruction in kept[cut:]:
            restored.accept(instruction)
        assert (restored.text, restored.tokens) == (undisturbed.text, undisturbed.tokens)
        assert found + fed == told
        for index in range(len(restored.tokens)):
            piece, other = restored.piece_at(index, 0), undisturbed.piece_at(index, 0)
            assert piece is not None
            assert other is not None
            assert (piece.text, piece.chunks) == (other.text, other.chunks)


@pytest.mark.parametrize("ended", [False, True])
def test_odd_text_is_counted_when_its_answer_ends_and_not_when_the_end_is_read_back(
    echo_model: Any, ended: bool
):
    kept = [
        AcceptTokens(key(1), index, (dataclasses.replace(chunk(key(1), index), token_id=token),))
        for index, token in enumerate(b"ha" * 100)
    ]
    end = finish(key(1), len(kept))
    told = [*kept, end] if ended else kept[:-3]  # what is left is too little to say anything
    records = [instruction_record(one, wall_ns=5) for one in told]
    opening = request_record(demand(key(1)), now=0.0, wall_ns=5)
    counters = Counters()
    answer = restore(
        StoredGeneration(key(1), (opening, *records), ended),
        echo_model,
        feed=lambda event: None,
        now=0.0,
        wall_clock_ns=lambda: 5,
        counters=counters,
    ).record.answer
    if ended:
        assert counters == {}
    else:
        for instruction in kept[-3:]:
            answer.accept(instruction)
        answer.finish(end)
        assert counters == {"text_signals.repetition": 1}
    assert answer.advice == ("repetition",)


async def test_a_stop_string_that_was_complete_before_the_crash_ends_the_answer(
    serve: Any, tmp_path: Path
):
    async with serve() as edge:
        text = edge.model.tokenizer.decode(EXPECTED)
        request = ask(stop=[text[20:24]])
        undisturbed = await collect(edge.client.generate(request))
    assert undisturbed[-1].finish.reason == pb.FINISH_REASON_STOP
    stopped_at = undisturbed[-1].finish.completion_tokens
    path = tmp_path / "journal.db"
    store = open_store(path)
    async with serve(store=store) as edge:
        await collect(edge.client.generate(request))
        # The journal as it was when the last token was kept and the end was not: the file is read
        # back and written again up to there.
        stored = await edge.journal.read(uuid.UUID(request.request_id).bytes)
    cut = open_store(tmp_path / "cut.db")
    bodies = [record.SerializeToString() for record in stored.records if not record.HasField("end")]
    cut.write(
        [Write(stored.request, body, begins=not index) for index, body in enumerate(bodies)],
        wall_ns=time.time_ns(),
    )
    async with serve(store=cut) as edge:
        responses = await collect(edge.client.resume(request.request_id))
        finish = responses[-1].finish
        assert (finish.reason, finish.completion_tokens) == (pb.FINISH_REASON_STOP, stopped_at)
        assert finish.chain == undisturbed[-1].finish.chain
        assert ids_of(responses) == ids_of(undisturbed)
        assert text_of(responses) == text_of(undisturbed)


async def test_an_ended_answer_is_read_back_from_the_journal_until_it_is_retired(
    serve: Any, tmp_path: Path
):
    path = tmp_path / "journal.db"
    requests = [ask() for _ in range(4)]
    async with serve(store=open_store(path)) as edge:
        for request in requests:
            await collect(edge.client.generate(request))
    async with serve(store=open_store(path, generations_max=3), answers_kept_max=1) as edge:
        assert len(edge.book) == 0
        for request in requests[1:]:
            responses = await collect(edge.client.resume(request.request_id, 10))
            assert ids_of(responses) == EXPECTED[10:]
        admitted = edge.driver.snapshot().generations
        again = await collect(edge.client.generate(requests[1]))
        assert ids_of(again) == EXPECTED
        assert edge.driver.snapshot().generations == admitted == ()
        other = ask(request_id=requests[1].request_id, seed=4)
        with pytest.raises(errors.RequestConflict):
            await collect(edge.client.generate(other))
        assert not await edge.client.cancel(requests[2].request_id)
        await collect(edge.client.generate(ask()))  # one more than the journal keeps
        with pytest.raises(errors.RequestUnknown):
            await collect(edge.client.resume(requests[0].request_id))


async def test_an_answer_is_not_finished_by_weights_that_did_not_begin_it(
    serve: Any, tmp_path: Path
):
    request = ask()
    left = await crash(serve, tmp_path / "journal.db", request, at=20)
    async with serve(store=open_store(left), fingerprint="cd" * 32) as edge:
        with pytest.raises(errors.JournalError, match="other weights"):
            await collect(edge.client.resume(request.request_id, 20))


async def test_recovered_requests_are_not_turned_away_by_a_queue_that_is_now_smaller(
    serve: Any, tmp_path: Path
):
    path = tmp_path / "journal.db"
    requests = [ask(max_tokens=8) for _ in range(4)]
    async with serve(store=open_store(path)) as edge:
        edge.ports.pause()
        calls = [edge.client.generation.Generate(request) for request in requests]
        await until(lambda: edge.journal.store.running == 4)
        left = as_after_kill_9(path, tmp_path / "left")
        for call in calls:
            call.cancel()
    policy = MeshPolicy(
        vocab_size=997, context_tokens_max=512, queue_length_max=1, requests_running_max=1
    )
    async with serve(store=open_store(left), policy=policy) as edge:
        for request in requests:
            responses = await collect(edge.client.resume(request.request_id))
            assert ids_of(responses) == EXPECTED[:8]


async def test_a_deadline_goes_on_while_the_coordinator_is_away(serve: Any, tmp_path: Path):
    request, path = ask(), tmp_path / "journal.db"
    async with serve(store=open_store(path)) as edge:
        edge.ports.pause()
        call = edge.client.generation.Generate(request, timeout=0.4)
        await until(lambda: edge.journal.store.running == 1)
        left = as_after_kill_9(path, tmp_path / "left")
        call.cancel()
    async with serve(store=open_store(left)) as edge:
        edge.ports.pause()
        with pytest.raises(errors.DeadlineExceeded):
            await collect(edge.client.resume(request.request_id))


async def test_a_client_that_is_back_in_time_finds_its_answer_going_on(serve: Any):
    request = ask(max_tokens=300)
    async with serve(limits=EdgeLimits(resume_grace_s=20.0)) as edge:
        edge.ports.delay_s = 0.001
        call = edge.client.generation.Generate(request)
        first = await call.read()
        call.cancel()
        await until(lambda: edge.book.newest_first()[0].readers == 0)
        responses = await collect(edge.client.resume(request.request_id, len(first.tokens)))
        assert len(ids_of(responses)) == 300 - len(first.tokens)
        assert responses[-1].finish.reason == pb.FINISH_REASON_LENGTH


async def test_a_client_that_stays_away_has_cancelled_when_its_grace_is_over(serve: Any):
    async with serve(limits=EdgeLimits(resume_grace_s=0.2)) as edge:
        edge.ports.pause()
        call = edge.client.generation.Generate(ask())
        await until(lambda: edge.driver.snapshot().running == 1)
        call.cancel()
        record = edge.book.newest_first()[0]
        await until(lambda: record.readers == 0)
        assert record.answer.end is None
        end = await asyncio.wait_for(record.answer.ended(), 10)
        assert end.reason == "cancelled"


async def test_a_reader_that_comes_and_goes_again_has_a_grace_of_its_own(serve: Any):
    request = ask(max_tokens=20)
    async with serve(limits=EdgeLimits(resume_grace_s=0.3)) as edge:
        edge.ports.pause()
        record = None
        for visit in range(1, 5):
            call = edge.client.generation.Generate(request)
            await until(lambda: len(edge.book) == 1)
            record = edge.book.newest_first()[0]
            await until(lambda visit=visit: edge.book.newest_first()[0].visits == visit)
            call.cancel()
            await until(lambda: edge.book.newest_first()[0].readers == 0)
            await asyncio.sleep(0.15)
            assert record.answer.end is None
        edge.ports.go_on()
        responses = await collect(edge.client.resume(request.request_id))
        assert ids_of(responses) == EXPECTED[:20]


async def test_leaving_for_good_or_cancelling_does_not_wait_for_the_grace(serve: Any):
    async with serve(limits=EdgeLimits(resume_grace_s=3600.0)) as edge:
        edge.ports.delay_s = 0.001
        async with aclosing(edge.client.generate(ask(max_tokens=400))) as stream:
            await anext(stream)
        await until(lambda: edge.driver.snapshot().running == 0)
        request = ask(max_tokens=400)
        call = edge.client.generation.Generate(request)
        await call.read()
        assert await edge.client.cancel(request.request_id)
        assert edge.driver.snapshot().running == 0


async def test_a_full_journal_fails_the_request_and_the_mesh_serves_on(serve: Any, tmp_path: Path):
    store = open_store(tmp_path / "journal.db", bytes_max=1 << 16)
    async with serve(store=store) as edge:
        requests = [ask(max_tokens=500) for _ in range(6)]
        outcomes = await asyncio.gather(
            *(collect(edge.client.generate(request)) for request in requests),
            return_exceptions=True,
        )
        failed = [one for one in outcomes if isinstance(one, errors.JournalError)]
        assert max(int(error.metadata["position"]) for error in failed) > 0
        assert edge.driver.snapshot().failed == len(failed)
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome not in failed:  # it had the room that the others left
                assert len(ids_of(outcome)) == 500
                continue
            stored = await edge.journal.read(uuid.UUID(request.request_id).bytes)
            position = int(outcome.metadata["position"])
            if stored is not None:
                assert position <= sum(len(record.tokens.tokens) for record in stored.records)
        await until(lambda: edge.ports.kv_tokens() == 0)
        # What has failed is retired, so there is room again for what fits.
        for _ in range(5):
            responses = await collect(edge.client.generate(ask(max_tokens=20)))
            assert ids_of(responses) == EXPECTED[:20]
