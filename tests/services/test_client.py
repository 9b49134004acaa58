"""The client believes nothing it has not checked, and does not lose its place."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing

import grpc
import pytest

from coordinator import backoff
from coordinator.echo import oracle
from services.client import ConnectionLost, MeshClient
from services.stream_checker import StreamChecker
from stagemesh import errors
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc

PROMPT = (72, 101, 108, 108, 111)


def ask(**more: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        tokens=pb.TokenPrompt(token_ids=PROMPT),
        ignore_eos=True,
        request_id=str(uuid.uuid4()),
        **more,
    )


async def recorded(serve, request) -> list[pb.GenerateResponse]:
    async with serve() as edge, aclosing(edge.client.generate(request)) as stream:
        return [response async for response in stream]


def replay(responses, request, *, prompt=PROMPT) -> StreamChecker:
    checker = StreamChecker(uuid.UUID(request.request_id).bytes, prompt)
    for response in responses:
        checker.check(response)
    return checker


async def test_every_seal_and_every_link_from_the_prompt_on_is_checked(serve):
    request = ask(max_tokens=20)
    responses = await recorded(serve, request)
    checker = replay(responses, request)
    assert checker.token_ids == oracle(PROMPT, 20, layer_count=6)
    assert (checker.tokens_checked, checker.links_checked) == (20, 20)
    assert replay(responses, request, prompt=None).links_checked == 19


def tampered(name: str, responses: list[pb.GenerateResponse]) -> list[pb.GenerateResponse]:
    """The same stream with one thing wrong."""
    copies = []
    for response in responses:
        copy = pb.GenerateResponse()
        copy.CopyFrom(response)
        copies.append(copy)
    middle = copies[len(copies) // 2]
    if name == "another token id":
        middle.tokens[0].token_id ^= 1
    elif name == "another position":
        middle.tokens[0].position += 1
    elif name == "another request":
        middle.tokens[0].request = uuid.uuid4().bytes
    elif name == "a dropped response":
        copies.remove(middle)
    elif name == "swapped responses":
        at = copies.index(middle)
        copies[at - 1], copies[at] = copies[at], copies[at - 1]
    elif name == "a relabelled response":
        del copies[copies.index(middle) - 1]
        for later in copies[copies.index(middle) :]:
            later.position -= 1
    elif name == "a missing head":
        del copies[0]
    elif name == "a missing tail":
        del copies[-2]
    elif name == "another last link":
        copies[-1].finish.chain = bytes(16)
    return copies


@pytest.mark.parametrize(
    "name",
    [
        "another token id",
        "another position",
        "another request",
        "a dropped response",
        "swapped responses",
        "a relabelled response",
        "a missing head",
        "a missing tail",
        "another last link",
    ],
)
async def test_a_stream_that_was_tampered_with_is_an_error_and_never_text(serve, name):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        request = ask(max_tokens=20)
        async with aclosing(edge.client.generate(request)) as stream:
            responses = [response async for response in stream]
    replay(responses, request)
    with pytest.raises((errors.TokenRejected, errors.SequenceGap)):
        replay(tampered(name, responses), request)


async def test_an_end_that_counts_other_tokens_than_came_is_an_error_whatever_links_say(serve):
    request = ask(max_tokens=6)
    responses = await recorded(serve, request)
    tokens = [token for response in responses for token in response.tokens]
    for came, counted in ((5, 6), (6, 5), (0, 6)):
        checker = StreamChecker(uuid.UUID(request.request_id).bytes, PROMPT)
        checker.check(pb.GenerateResponse(tokens=tokens[:came]))
        end = pb.Finish(reason=pb.FINISH_REASON_LENGTH, completion_tokens=counted)
        with pytest.raises(errors.SequenceGap, match="not its end"):
            checker.check(pb.GenerateResponse(position=came, finish=end))


async def test_the_order_of_tokens_is_kept_account_of_over_streams_that_overlap(serve):
    request = ask(max_tokens=20)
    responses = await recorded(serve, request)
    checker = replay(responses[:-1], request)
    checker.attach(from_start=True)
    for response in responses:
        checker.check(response)
    order = checker.order
    assert (order.first, order.next_number, order.accepted, order.lost) == (0, 20, 20, 0)
    assert (order.duplicates > 0, order.gaps, order.finished) == (True, 0, True)
    late = pb.GenerateResponse(position=25, tokens=responses[0].tokens)
    with pytest.raises(errors.SequenceGap) as missing:
        checker.check(late)
    assert missing.value.metadata["missing"] == str(range(20, 25))


async def test_another_prompt_does_not_verify(serve):
    request = ask(max_tokens=5)
    responses = await recorded(serve, request)
    with pytest.raises(errors.TokenRejected):
        replay(responses, request, prompt=(1, 2, 3, 4, 5))


async def test_a_correction_takes_tokens_and_text_back(serve):
    request = ask(max_tokens=6)
    responses = await recorded(serve, request)
    tokens = [token for response in responses for token in response.tokens]
    checker = StreamChecker(uuid.UUID(request.request_id).bytes, PROMPT)
    checker.check(pb.GenerateResponse(position=0, tokens=tokens[:4], text="abcd"))
    correction = pb.Correction(from_position=2, from_character=2)
    checker.check(pb.GenerateResponse(position=2, correction=correction))
    assert (checker.position, checker.text) == (2, "ab")
    checker.check(pb.GenerateResponse(position=2, tokens=tokens[2:], text="cdef"))
    assert (checker.position, checker.text) == (6, "abcdef")
    checker.verified_through = 4
    with pytest.raises(errors.TokenRejected, match="verified"):
        checker.check(pb.GenerateResponse(position=2, correction=correction))


class Breaking(generation_service_pb2_grpc.GenerationServiceServicer):
    """A coordinator in between that ends streams without a word, and may forget generations."""

    def __init__(self, upstream: MeshClient, *, breaks: int, forgets: bool = False) -> None:
        self.upstream = upstream
        self.breaks = breaks
        self.forgets = forgets
        self.calls: list[str] = []
        self.links: dict[int, bytes] = {}

    async def Generate(self, request, context):  # noqa: N802
        self.calls.append("Generate")
        upstream = pb.GenerateRequest()
        upstream.CopyFrom(request)
        upstream.detach = True
        async for response in self._cut(self.upstream.generation.Generate(upstream), context):
            yield response

    async def ResumeGeneration(self, request, context):  # noqa: N802
        self.calls.append(f"Resume {request.from_position}")
        self.links[request.from_position] = request.chain
        if self.forgets:
            await context.abort(grpc.StatusCode.NOT_FOUND, "forgotten")
        async for response in self._cut(
            self.upstream.generation.ResumeGeneration(request), context
        ):
            yield response

    async def _cut(self, call, context):
        count = 0
        async for response in call:
            count += 1
            if self.breaks and count > 2:
                self.breaks -= 1
                call.cancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
            yield response


async def through(edge, middle, request, attempts=5, **options) -> tuple[list, MeshClient]:
    server = grpc.aio.server()
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(middle, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with MeshClient(f"127.0.0.1:{port}") as client:
            with backoff.no_waiting(attempts=attempts):
                async with aclosing(client.generate(request, **options)) as stream:
                    return [response async for response in stream], client
    finally:
        await server.stop(None)


async def test_a_broken_stream_is_attached_to_again_without_a_gap_or_a_repeat(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        middle = Breaking(edge.client, breaks=3)
        responses, client = await through(edge, middle, ask(max_tokens=30))
        expected = oracle(PROMPT, 30, layer_count=6)
        assert [t.token_id for r in responses for t in r.tokens] == expected
        assert "".join(r.text for r in responses) == edge.model.tokenizer.decode(expected)
    tokens = [token for response in responses for token in response.tokens]
    assert middle.links == {at: tokens[at - 1].chain for at in middle.links}
    assert client.resumes == 3
    assert middle.calls[0] == "Generate"
    assert all(call.startswith("Resume") for call in middle.calls[1:])


async def test_a_forgotten_generation_is_asked_for_again_and_must_repeat_itself(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        middle = Breaking(edge.client, breaks=1, forgets=True)
        responses, _ = await through(edge, middle, ask(max_tokens=30))
        expected = oracle(PROMPT, 30, layer_count=6)
        assert [t.token_id for r in responses for t in r.tokens] == expected
        assert "".join(r.text for r in responses) == edge.model.tokenizer.decode(expected)
        assert middle.calls.count("Generate") == 2


def garbling(upstream: MeshClient, ending) -> grpc.GenericRpcHandler:
    """A coordinator in between whose streams break in ways of the transport."""

    async def generate(request, context):
        count = 0
        own = pb.GenerateRequest.FromString(request)
        own.detach = True
        async for response in upstream.generation.Generate(own):
            count += 1
            if count > 2:
                await ending(context)
                yield b"\xff\xff\xff\xff"
            yield response.SerializeToString()

    async def resume(request, _context):
        message = pb.ResumeGenerationRequest.FromString(request)
        async for response in upstream.generation.ResumeGeneration(message):
            yield response.SerializeToString()

    as_they_are = {"request_deserializer": None, "response_serializer": None}
    methods = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate, **as_they_are),
        "ResumeGeneration": grpc.unary_stream_rpc_method_handler(resume, **as_they_are),
    }
    return grpc.method_handlers_generic_handler("stagemesh.v1.GenerationService", methods)


async def garbage(_context) -> None:
    """Go on, with bytes that are no message."""


async def internal(context) -> None:
    await context.abort(grpc.StatusCode.INTERNAL, "RST_STREAM with error code 1")


@pytest.mark.parametrize("ending", [garbage, internal])
async def test_what_the_transport_garbles_is_read_again(serve, ending):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((garbling(edge.client, ending),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with MeshClient(f"127.0.0.1:{port}") as client:
            with backoff.no_waiting(attempts=5):
                async with aclosing(client.generate(ask(max_tokens=30))) as stream:
                    tokens = [one.token_id async for each in stream for one in each.tokens]
        await server.stop(None)
    assert tokens == oracle(PROMPT, 30, layer_count=6)
    assert client.resumes == 1


class Interrupting(Breaking):
    """Takes readers back, and loses them again before it has a token for them."""

    def __init__(self, upstream: MeshClient, *, interruptions: int, takes: bool = True) -> None:
        super().__init__(upstream, breaks=1)
        self.interruptions = interruptions
        self.takes = takes

    async def ResumeGeneration(self, request, context):  # noqa: N802
        if self.interruptions:
            self.interruptions -= 1
            if self.takes:
                await context.send_initial_metadata(())
                for _turn in range(200):  # of the loop that both ends share
                    await asyncio.sleep(0.001)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection reset")
        async for response in super().ResumeGeneration(request, context):
            yield response


async def test_a_reader_that_was_taken_back_starts_over_with_its_patience(serve):
    """Soak: after a restart the next token took a minute, the connection broke once more, and
    that minute had been counted as one without a mesh."""
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        middle = Interrupting(edge.client, interruptions=3)
        responses, client = await through(edge, middle, ask(max_tokens=30), attempts=1)
    assert [t.token_id for r in responses for t in r.tokens] == oracle(PROMPT, 30, layer_count=6)
    assert client.resumes == 1


async def test_a_reader_that_is_never_taken_back_gives_up(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        middle = Interrupting(edge.client, interruptions=3, takes=False)
        with pytest.raises(ConnectionLost):
            await through(edge, middle, ask(max_tokens=30), attempts=2)
    assert middle.interruptions == 1


async def test_a_mesh_that_stays_away_is_not_waited_for_beyond_the_deadline(serve):
    async with serve() as edge, asyncio.timeout(20):
        edge.ports.delay_s = 0.01
        async with aclosing(edge.client.generate(ask(max_tokens=400), timeout_s=3.0)) as stream:
            await anext(stream)
            await edge.server.stop(None)
            with pytest.raises((ConnectionLost, errors.DeadlineExceeded)):
                async for _ in stream:
                    pass


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e12])
async def test_a_deadline_that_never_comes_is_none_that_has_passed(serve, timeout_s):
    async with serve() as edge:
        stream = edge.client.generate(ask(max_tokens=5), timeout_s=timeout_s)
        tokens = [token.token_id async for response in stream for token in response.tokens]
    assert tokens == oracle(PROMPT, 5, layer_count=6)


async def test_without_resuming_a_broken_stream_is_an_error(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        with pytest.raises(ConnectionLost):
            await through(edge, Breaking(edge.client, breaks=1), ask(max_tokens=30), resume=False)


async def test_a_mesh_that_is_not_there_is_given_up_within_bounds():
    async with MeshClient("127.0.0.1:1") as client:
        with (
            backoff.no_waiting(attempts=2),
            pytest.raises(ConnectionLost, match="cannot be reached"),
        ):
            async for _ in client.generate(ask(max_tokens=3)):
                pass
        with pytest.raises(ConnectionLost):
            await client.models()


async def test_a_failure_of_the_mesh_itself_is_not_asked_for_again(serve):
    async with serve() as edge:
        request = ask(max_tokens=5, model="other")
        with pytest.raises(errors.ModelUnknown):
            async for _ in edge.client.generate(request):
                pass
        assert edge.client.resumes == 0


async def test_leaving_a_stream_early_cancels_the_call(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        async with aclosing(edge.client.generate(ask(max_tokens=400))) as stream:
            await anext(stream)
        async with asyncio.timeout(5):
            while edge.driver.snapshot().running:
                await asyncio.sleep(0.001)


async def test_leaving_a_stream_behind_the_end_of_its_connection_is_no_error(serve):
    async with serve() as edge:
        edge.ports.delay_s = 0.001
        client = MeshClient(edge.address)
        stream = client.generate(ask(max_tokens=400))
        await anext(stream)
        await client.close()
        await stream.aclose()
        async with asyncio.timeout(5):
            while edge.driver.snapshot().running:
                await asyncio.sleep(0.001)
