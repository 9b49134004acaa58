"""GenerationService over a real loopback server and the real driver."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from coordinator.echo import oracle
from coordinator.events import Delivery, Verification
from coordinator.instructions import CorrectTokens
from coordinator.settings import MeshPolicy
from services.request_reader import STOP_CHARACTERS_MAX, STOP_STRINGS_MAX, EdgeLimits
from services.rpc_errors import DETAILS_KEY
from stagemesh import errors
from stagemesh.sampling import SamplingSpec
from stagemesh.v1 import admin_service_pb2
from stagemesh.v1 import generation_service_pb2 as pb
from tests.services.journal_helpers import accept, chunk

PROMPT = (72, 101, 108, 108, 111)
VOCAB_SIZE = 997


def ask(**more: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=PROMPT), **more)


async def collect(client, request, **options):
    async with aclosing(client.generate(request, **options)) as stream:
        return [response async for response in stream]


def ids_of(responses) -> list[int]:
    return [token.token_id for response in responses for token in response.tokens]


def text_of(responses) -> str:
    return "".join(response.text for response in responses)


async def until(condition, *, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_answer_is_what_one_process_computes_and_its_text_is_the_tokenizers(serve):
    async with serve() as edge:
        responses = await collect(edge.client, ask(max_tokens=40, ignore_eos=True))
    expected = oracle(PROMPT, 40, layer_count=6)
    assert ids_of(responses) == expected
    assert text_of(responses) == edge.model.tokenizer.decode(expected)
    reached = 0
    for response in responses:
        assert response.position == reached
        reached += len(response.tokens)
    finish = responses[-1].finish
    assert (finish.reason, finish.prompt_tokens, finish.completion_tokens) == (
        pb.FINISH_REASON_LENGTH,
        len(PROMPT),
        40,
    )
    assert list(finish.route) == ["stage-0", "stage-1"]
    assert sum(r.HasField("finish") for r in responses) == 1


async def test_a_seeded_answer_is_drawn_by_seed_and_position(serve):
    sampling = SamplingSpec(temperature=0.5, seed=11)
    async with serve() as edge:
        responses = await collect(
            edge.client, ask(max_tokens=12, ignore_eos=True, temperature=0.5, seed=11)
        )
    assert ids_of(responses) == oracle(PROMPT, 12, layer_count=6, sampling=sampling)


async def test_text_and_chat_prompts_are_tokenized_as_tokenize_says(serve):
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi 😀")])
    async with serve() as edge:
        for request in (pb.GenerateRequest(text="hi"), pb.GenerateRequest(chat=chat)):
            prompt = await edge.client.tokenize(request)
            request.max_tokens, request.ignore_eos = 5, True
            responses = await collect(edge.client, request)
            assert ids_of(responses) == oracle(prompt, 5, layer_count=6)
        rendered = await edge.client.generation.Tokenize(pb.TokenizeRequest(chat=chat))
    assert rendered.rendered == "user: hi 😀\nassistant:"


async def test_an_end_token_counts_and_yields_no_text(serve):
    expected = oracle(PROMPT, 8, layer_count=6)
    async with serve() as edge:
        responses = await collect(
            edge.client, ask(max_tokens=8, ignore_eos=True, stop_token_ids=[expected[4]])
        )
        first = expected.index(expected[4]) + 1
        assert ids_of(responses) == expected[:first]
        assert text_of(responses) == edge.model.tokenizer.decode(expected[: first - 1])
    assert responses[-1].finish.reason == pb.FINISH_REASON_STOP


async def test_a_stop_string_that_spans_tokens_never_leaks_not_even_in_part(serve):
    expected = oracle(PROMPT, 40, layer_count=6)
    async with serve() as edge:
        whole = edge.model.tokenizer.decode(expected)
        stop = whole[21:27]
        responses = await collect(edge.client, ask(max_tokens=40, ignore_eos=True, stop=[stop]))
    assert text_of(responses) == whole[: whole.index(stop)]
    finish = responses[-1].finish
    assert (finish.reason, finish.matched_stop) == (pb.FINISH_REASON_STOP, stop)
    assert finish.completion_tokens == len(ids_of(responses)) < 40
    await asyncio.sleep(0)
    assert ids_of(responses) == expected[: finish.completion_tokens]


async def test_a_client_that_was_away_during_a_correction_is_told_of_it(serve):
    async with serve() as edge:
        edge.ports.pause()
        request = ask(request_id=str(uuid.uuid4()), detach=True)
        asked = edge.client.generation.Generate(request)
        await asked.initial_metadata()
        answer = edge.book.newest_first()[0].answer
        for index in range(6):
            answer.accept(accept(answer.request, index))
        last = answer.tokens[-1].chain
        answer.correct(CorrectTokens(answer.request, 2, "SHADOW_MISMATCH"))
        for link, position in ((last, 6), (chunk(answer.request, 3).chain, 4)):
            message = pb.ResumeGenerationRequest(
                request_id=request.request_id, from_position=position, chain=link
            )
            stream = edge.client.generation.ResumeGeneration(message)
            told = (await anext(aiter(stream))).response.correction
            assert (told.from_position, told.reason) == (2, "SHADOW_MISMATCH")
            stream.cancel()


BAD = {
    "no prompt": (pb.GenerateRequest(), "INVALID_REQUEST", "prompt"),
    "empty text": (pb.GenerateRequest(text=""), "INVALID_REQUEST", "prompt"),
    "no tokens": (pb.GenerateRequest(tokens=pb.TokenPrompt()), "INVALID_REQUEST", "prompt"),
    "no messages": (pb.GenerateRequest(chat=pb.ChatPrompt()), "INVALID_REQUEST", "chat.messages"),
    "no role": (
        pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage(content="x")])),
        "INVALID_REQUEST",
        "chat.messages[0].role",
    ),
    "prompt beyond the context": (
        pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[1] * 512)),
        "CONTEXT_EXCEEDED",
        "",
    ),
    "text beyond the context": (pb.GenerateRequest(text="x" * 600), "CONTEXT_EXCEEDED", ""),
    "text far beyond the context": (
        pb.GenerateRequest(text="x" * (512 * 256 + 1)),
        "CONTEXT_EXCEEDED",
        "",
    ),
    "unknown model": (ask(model="other"), "MODEL_UNKNOWN", ""),
    "token id": (
        pb.GenerateRequest(tokens=pb.TokenPrompt(token_ids=[5, VOCAB_SIZE])),
        "INVALID_REQUEST",
        "tokens.token_ids[1]",
    ),
    "request id": (ask(request_id="seven"), "INVALID_REQUEST", "request_id"),
    "temperature": (ask(temperature=-1.0), "INVALID_REQUEST", "temperature"),
    "temperature nan": (ask(temperature=float("nan")), "INVALID_REQUEST", "temperature"),
    "top_p": (ask(top_p=1.5), "INVALID_REQUEST", "top_p"),
    "top_p zero": (ask(top_p=0.0), "INVALID_REQUEST", "top_p"),
    "min_p": (ask(min_p=-0.1), "INVALID_REQUEST", "min_p"),
    "repetition penalty": (ask(repetition_penalty=0.0), "INVALID_REQUEST", "repetition_penalty"),
    "frequency penalty": (ask(frequency_penalty=3.0), "INVALID_REQUEST", "frequency_penalty"),
    "logprobs": (ask(logprobs=21), "INVALID_REQUEST", "logprobs"),
    "empty stop": (ask(stop=["ok", ""]), "INVALID_REQUEST", "stop[1]"),
    "long stop": (ask(stop=["x" * (STOP_CHARACTERS_MAX + 1)]), "INVALID_REQUEST", "stop[0]"),
    "many stops": (ask(stop=["x"] * (STOP_STRINGS_MAX + 1)), "INVALID_REQUEST", "stop"),
    "stop token": (ask(stop_token_ids=[VOCAB_SIZE]), "INVALID_REQUEST", "stop_token_ids[0]"),
    "verified without shadow": (ask(deliver=2, verify=2), "INVALID_REQUEST", "deliver"),
    "level": (ask(verify=9), "INVALID_REQUEST", "verify"),
    "mode": (ask(deliver=9), "INVALID_REQUEST", "deliver"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_a_typed_error_and_is_never_admitted(serve, name):
    request, reason, field = BAD[name]
    async with serve() as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.client.generation.Generate(request).read()
        assert edge.driver.snapshot().generations == ()
        assert len(edge.book) == 0
        responses = await collect(edge.client, ask(max_tokens=3, ignore_eos=True))
        assert len(ids_of(responses)) == 3
    info, violations = details_of(caught.value)
    assert (info.reason, info.domain) == (reason, "stagemesh")
    if field:
        assert [one.field for one in violations] == [field]


def details_of(error: grpc.aio.AioRpcError):
    raw = next(value for key, value in error.trailing_metadata() if key == DETAILS_KEY)
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(raw).details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return info, bad.field_violations


def unaudited() -> MeshPolicy:
    """Nobody is verified who did not ask, or whom the mesh does not verify."""
    return MeshPolicy(vocab_size=VOCAB_SIZE, audit_budget=0.0, audit_first_streams=0)


def is_held_back(responses) -> bool:
    """Whether no token came before it was verified."""
    return all(one.position + len(one.tokens) <= one.verified_through for one in responses)


@pytest.mark.parametrize("level", [Verification.NUMERIC, Verification.SHADOW])
async def test_a_request_that_names_no_level_is_verified_as_the_mesh_is(serve, level):
    limits = EdgeLimits(verification=level)
    async with serve(limits=limits, policy=unaudited()) as edge:
        responses = await collect(edge.client, ask(max_tokens=40, ignore_eos=True))
    assert ids_of(responses) == oracle(PROMPT, 40, layer_count=6)
    verified = 40 if level is Verification.SHADOW else 0
    assert responses[-1].verified_through == verified


@pytest.mark.parametrize(
    ("asked", "held_back"),
    [
        ({}, True),
        ({"verify": pb.VERIFICATION_LEVEL_SHADOW}, True),
        ({"verify": pb.VERIFICATION_LEVEL_NUMERIC}, False),
        ({"deliver": pb.DELIVERY_MODE_IMMEDIATE}, False),
    ],
)
async def test_a_request_that_does_not_say_is_delivered_as_the_mesh_does(serve, asked, held_back):
    limits = EdgeLimits(delivery=Delivery.VERIFIED)
    async with serve(limits=limits, policy=unaudited()) as edge:
        responses = await collect(edge.client, ask(max_tokens=40, ignore_eos=True, **asked))
    assert ids_of(responses) == oracle(PROMPT, 40, layer_count=6)
    assert is_held_back(responses) is held_back


async def test_a_level_above_what_the_mesh_allows_is_refused(serve):
    limits = EdgeLimits(verification_max=Verification.NUMERIC)
    async with serve(limits=limits) as edge:
        with pytest.raises(errors.InvalidRequest, match="at most at level numeric"):
            await collect(edge.client, ask(verify=pb.VERIFICATION_LEVEL_SHADOW))


async def test_a_repeated_call_attaches_and_other_parameters_conflict(serve):
    request = ask(max_tokens=30, ignore_eos=True, request_id=str(uuid.uuid4()))
    async with serve() as edge:
        first, second = await asyncio.gather(
            collect(edge.client, request), collect(edge.client, request)
        )
        third = await collect(edge.client, request)
        assert ids_of(first) == ids_of(second) == ids_of(third)
        assert text_of(first) == text_of(second) == text_of(third)
        assert len(edge.driver.snapshot().generations) == 1
        request.max_tokens = 31
        with pytest.raises(errors.RequestConflict):
            await collect(edge.client, request)


async def test_a_client_that_leaves_while_decoding_frees_every_cache(serve):
    async with serve() as edge:
        request = ask(max_tokens=400, ignore_eos=True)
        async with aclosing(edge.client.generate(request)) as stream:
            async for response in stream:
                if response.position >= 3:
                    break
        await until(lambda: edge.driver.snapshot().running == 0)
        await until(lambda: edge.ports.kv_tokens() == 0)
        (view,) = edge.driver.snapshot().generations
        assert (view.phase, view.completion_tokens < 400) == ("cancelled", True)


async def test_a_client_that_leaves_in_prefill_frees_every_cache(serve):
    async with serve() as edge:
        edge.ports.pause()
        call = edge.client.generation.Generate(ask(max_tokens=5, ignore_eos=True))
        await until(lambda: edge.driver.snapshot().running == 1)
        call.cancel()
        await until(lambda: edge.driver.snapshot().generations[0].phase == "cancelled")
        edge.ports.go_on()
        await until(lambda: edge.ports.kv_tokens() == 0)


async def test_a_client_that_leaves_the_queue_is_never_computed(serve):
    policy = MeshPolicy(vocab_size=VOCAB_SIZE, requests_running_max=1, context_tokens_max=512)
    async with serve(policy=policy) as edge:
        edge.ports.pause()
        running = edge.client.generation.Generate(ask(max_tokens=5, ignore_eos=True))
        await until(lambda: edge.driver.snapshot().running == 1)
        queued = edge.client.generation.Generate(ask(max_tokens=6, ignore_eos=True))
        await until(lambda: edge.driver.snapshot().queued == 1)
        queued.cancel()
        await until(lambda: edge.driver.snapshot().queued == 0)
        edge.ports.go_on()
        answered = [response async for response in running]
        assert len(ids_of(answered)) == 5
        phases = [view.phase for view in edge.driver.snapshot().generations]
    assert phases == ["cancelled", "finished"]


async def test_a_full_queue_is_overloaded_with_a_retry_time(serve):
    policy = MeshPolicy(
        vocab_size=VOCAB_SIZE, requests_running_max=1, queue_length_max=1, context_tokens_max=512
    )
    async with serve(policy=policy) as edge:
        edge.ports.pause()
        request = ask(max_tokens=2, ignore_eos=True)
        calls = [edge.client.generation.Generate(request) for _ in range(2)]
        await until(lambda: edge.driver.snapshot().queued == 1)
        turned_away = ask(max_tokens=2, ignore_eos=True, request_id=str(uuid.uuid4()))
        with pytest.raises(errors.Overloaded) as caught:
            await collect(edge.client, turned_away)
        assert caught.value.retry_after_s > 0
        edge.ports.go_on()
        for call in calls:
            assert len(ids_of([response async for response in call])) == 2
        assert len(ids_of(await collect(edge.client, turned_away))) == 2


async def test_a_detached_generation_goes_on_and_can_be_resumed_from_any_position(serve):
    request = ask(max_tokens=60, ignore_eos=True, detach=True, request_id=str(uuid.uuid4()))
    expected = oracle(PROMPT, 60, layer_count=6)
    async with serve() as edge:
        async with aclosing(edge.client.generate(request)) as stream:
            await anext(stream)
        whole = edge.model.tokenizer.decode(expected)
        first = [r async for r in edge.client.resume(request.request_id)]
        assert (ids_of(first), text_of(first)) == (expected, whole)
        later = [r async for r in edge.client.resume(request.request_id, 20)]
        assert ids_of(later) == expected[20:]
        assert whole.endswith(text_of(later))
        assert later[0].position == 20
        with pytest.raises(errors.InvalidRequest):
            async for _ in edge.client.resume(request.request_id, 61):
                pass
        with pytest.raises(errors.RequestUnknown):
            async for _ in edge.client.resume(str(uuid.uuid4())):
                pass


async def test_two_readers_one_leaves_and_the_other_reads_on(serve):
    request = ask(max_tokens=200, ignore_eos=True, request_id=str(uuid.uuid4()))
    async with serve() as edge:
        reading = asyncio.ensure_future(collect(edge.client, request))
        await until(lambda: len(edge.book) == 1)
        async with aclosing(edge.client.generate(request)) as stream:
            await anext(stream)
        assert len(ids_of(await reading)) == 200


async def test_cancel_generation_ends_the_stream_with_cancelled_and_is_idempotent(serve):
    request = ask(max_tokens=500, ignore_eos=True, request_id=str(uuid.uuid4()))
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        reading = asyncio.ensure_future(collect(edge.client, request))
        await until(lambda: edge.ports.steps > 10)
        assert await edge.client.cancel(request.request_id)
        responses = await reading
        assert responses[-1].finish.reason == pb.FINISH_REASON_CANCELLED
        assert not await edge.client.cancel(request.request_id)
        await until(lambda: edge.ports.kv_tokens() == 0)
        with pytest.raises(errors.RequestUnknown):
            await edge.client.cancel(str(uuid.uuid4()))


async def test_a_deadline_ends_the_request_in_the_mesh(serve):
    async with serve() as edge:
        edge.ports.pause()
        with pytest.raises(errors.DeadlineExceeded):
            await collect(edge.client, ask(max_tokens=5), timeout_s=0.2)
        await until(lambda: edge.driver.snapshot().running == 0)


async def test_a_failure_that_is_asked_for_again_and_again_takes_no_more_memory(serve):
    async with serve(limits=EdgeLimits(request_s_max=0.05)) as edge:
        edge.ports.pause()
        request = ask(request_id=str(uuid.uuid4()))
        depths = set()
        for _ in range(4):
            with pytest.raises(errors.DeadlineExceeded):
                await collect(edge.client, request)
            trace, depth = edge.book.newest_first()[0].answer.end.error.__traceback__, 0
            while trace is not None:
                trace, depth = trace.tb_next, depth + 1
            depths.add(depth)
        assert len(depths) == 1


async def test_a_mesh_without_a_client_deadline_sets_its_own(serve):
    async with serve(limits=EdgeLimits(request_s_max=0.2)) as edge:
        edge.ports.pause()
        with pytest.raises(errors.DeadlineExceeded) as caught:
            await collect(edge.client, ask(max_tokens=5))
        assert caught.value.metadata["position"] == "0"
        assert "request_id" in caught.value.metadata


async def test_a_failed_generation_says_why_and_where_in_both_kinds_of_stream(serve):
    async with serve(limits=EdgeLimits(request_s_max=0.3)) as edge:
        request = ask(max_tokens=500, ignore_eos=True, detach=True, request_id=str(uuid.uuid4()))
        edge.ports.delay_s = 0.02
        call = edge.client.generation.Generate(request)
        last = [response async for response in call][-1]
        assert last.finish.reason == pb.FINISH_REASON_ERROR
        assert last.finish.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        with pytest.raises(errors.DeadlineExceeded):
            async for _ in edge.client.resume(request.request_id):
                pass


async def test_models_are_listed_with_what_a_client_needs(serve):
    async with serve() as edge:
        (model,) = await edge.client.models()
    assert (model.name, model.vocab_size, model.context_length) == ("echo", VOCAB_SIZE, 512)
    assert list(model.eos_token_ids) == [VOCAB_SIZE - 1]
    assert model.ready


async def test_operators_see_workers_routes_and_generations_in_pages(serve):
    async with serve() as edge:
        for _ in range(5):
            await collect(edge.client, ask(max_tokens=2, ignore_eos=True))
        mesh = await edge.client.mesh()
        assert sorted(one.worker.name for one in mesh.workers) == sorted(edge.ports.infos)
        assert (mesh.ready, mesh.finished, mesh.running) == (True, 5, 0)
        seen, token = [], ""
        while True:
            page = await edge.client.admin.ListGenerations(
                admin_service_pb2.ListGenerationsRequest(page_size=2, page_token=token)
            )
            seen += [one.request_id for one in page.generations]
            token = page.next_page_token
            if not token:
                break
        assert len(seen) == len(set(seen)) == 5
        one = await edge.client.admin.GetGeneration(
            admin_service_pb2.GetGenerationRequest(request_id=seen[0])
        )
        assert one.generation.finish.completion_tokens == 2
        assert one.generation.state == admin_service_pb2.GENERATION_STATE_FINISHED
        with pytest.raises(grpc.aio.AioRpcError, match="page token"):
            await edge.client.admin.ListGenerations(
                admin_service_pb2.ListGenerationsRequest(page_token="AAAA")
            )
        with pytest.raises(errors.WorkerUnknown):
            await edge.client.drain("nobody")
        diagnostics = await edge.client.diagnostics()
        assert {one.worker for one in diagnostics.workers} == set(edge.ports.infos)


async def test_answers_are_kept_within_a_limit(serve):
    async with serve(answers_kept_max=2) as edge:
        for _ in range(5):
            await collect(edge.client, ask(max_tokens=1, ignore_eos=True))
        assert len(edge.book) <= 3
