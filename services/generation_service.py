"""GenerationService: what clients use.

A call is checked completely, then handed to the mesh with an `Answer` as its sink, then followed.
A client that goes away, in the queue, in prefill or between two tokens, cancels its generation and
so frees its caches on every stage, unless it asked to detach, somebody else still reads the same
answer, or it is back within ``resume_grace_s``. A repeated call with the same id and parameters
attaches to the same answer from its beginning.

A generation that failed through no fault of its client, for want of a route say, is gone on with
when somebody asks for it again: what was told stands, and the mesh is asked for the rest.

With a journal, generations outlive the coordinator: ``revive`` takes up what was running (a client
that was cut off by the coordinator's end could not cancel, so it is finished, read or not), and
ended ones are read back when somebody asks for them.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

from coordinator.events import CancelRequested, Event, GenerationRequested
from services.answer import Answer, Piece
from services.answer_book import AnswerBook, Record
from services.answer_codec import piece_to_proto
from services.generation_ports import (
    GenerationDriver,
    GenerationObserver,
    SilentObserver,
    StoredAnswers,
)
from services.grpc_types import ServicerContext
from services.journal_codec import demand_of
from services.journal_rows import StoredGeneration
from services.request_ids import request_key, show_id
from services.request_reader import (
    EdgeLimits,
    Parameters,
    Rendered,
    check_model,
    check_prompt,
    digest_of,
    encode,
    read_parameters,
    render,
)
from services.restored import Restored, edge_context, restore
from services.tokenizer import ServedModel
from stagemesh.errors import (
    InvalidRequest,
    JournalError,
    MeshError,
    RequestConflict,
    RequestUnknown,
)
from stagemesh.guards import Counters
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import generation_service_pb2_grpc

TOKENIZE_INLINE_CHARACTERS_MAX = 16_384
"""Longer texts are tokenized on a thread, so that the event loop goes on; these take some 2 ms."""
CANCEL_WAIT_S_MAX = 5.0
"""CancelGeneration answers once the mesh has ended the request, or after this long."""
LEFT_LOOK_S, LEFT_LOOKS_MAX = 0.02, 25
"""How a leaving client's own stream is waited for."""


class GenerationService(generation_service_pb2_grpc.GenerationServiceServicer):
    """The servicer. ``clock`` is the driver's monotonic clock, seconds."""

    def __init__(
        self,
        *,
        driver: GenerationDriver,
        model: ServedModel,
        book: AnswerBook,
        limits: EdgeLimits,
        clock: Callable[[], float] = time.monotonic,
        wall_clock_ns: Callable[[], int] = time.time_ns,
        fingerprint: Callable[[], str] = lambda: "",
        ready: Callable[[], bool] = lambda: True,
        observer: GenerationObserver | None = None,
        stored: StoredAnswers | None = None,
        counters: Counters | None = None,
    ) -> None:
        self._driver = driver
        self._stored = stored
        self._model = model
        self._book = book
        self._limits = limits
        self._clock = clock
        self._wall_clock_ns = wall_clock_ns
        self._fingerprint = fingerprint
        self._ready = ready
        self._observer = observer or SilentObserver()
        self._counters = Counters() if counters is None else counters
        self._tokenizing = asyncio.Lock()

    async def Generate(  # noqa: N802 (the name is the protocol's)
        self, request: pb.GenerateRequest, context: ServicerContext
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Start, go on with, or attach to a generation and stream it from its first token."""
        key = request_key(request.request_id) if request.request_id else uuid.uuid4().bytes
        await self._find(key)
        record = self._known(key, request)
        if record is None:
            record = await self._start(key, request, context)
        self._take_up(record, context)
        record.detach = record.detach or request.detach
        async with self._following(record, 0, context) as pieces:
            async for piece in pieces:
                if piece.end is not None and piece.end.error is not None and not request.detach:
                    # One error for every reader: each raising would lengthen its traceback.
                    raise _told(piece.end.error, record).with_traceback(None)
                yield self._response(record, piece)

    async def ResumeGeneration(  # noqa: N802
        self, request: pb.ResumeGenerationRequest, context: ServicerContext
    ) -> AsyncGenerator[pb.ResumeGenerationResponse, None]:
        """Stream a known generation again from a position, then live; one that failed goes on."""
        key = request_key(request.request_id)
        await self._find(key)
        record = self._book.get(key)
        answer, position = record.answer, request.from_position
        if position <= len(answer.tokens) or answer.has_missed(position, request.chain):
            self._take_up(record, context)
        async with self._following(record, position, context, request.chain) as pieces:
            async for piece in pieces:
                yield pb.ResumeGenerationResponse(response=self._response(record, piece))

    async def CancelGeneration(  # noqa: N802
        self, request: pb.CancelGenerationRequest, context: ServicerContext
    ) -> pb.CancelGenerationResponse:
        """Stop a generation and free its caches."""
        key = request_key(request.request_id)
        await self._find(key)
        record = self._book.get(key)
        answer = record.answer
        if request.unless_read and not await _is_left(record):
            return pb.CancelGenerationResponse(cancelled=False)
        if answer.end is not None:
            return pb.CancelGenerationResponse(cancelled=False)
        self._driver.feed(CancelRequested(answer.request, reason="CancelGeneration"))
        try:
            async with asyncio.timeout(CANCEL_WAIT_S_MAX):
                end = await answer.ended()
        except TimeoutError:
            return pb.CancelGenerationResponse(cancelled=True)
        return pb.CancelGenerationResponse(cancelled=end.reason == "cancelled")

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: ServicerContext
    ) -> pb.ListModelsResponse:
        """The one model of this mesh."""
        model = self._model
        listed = pb.Model(
            name=model.name,
            model_type=model.model_type,
            context_length=model.context_length,
            vocab_size=model.vocab_size,
            eos_token_ids=sorted(model.eos_token_ids),
            fingerprint=self._fingerprint(),
            layer_count=model.layer_count,
            ready=self._ready(),
        )
        return pb.ListModelsResponse(models=[listed])

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: ServicerContext
    ) -> pb.TokenizeResponse:
        """Text or messages to token ids, exactly as Generate does it."""
        check_model(request.model, self._model)
        if request.WhichOneof("prompt") is None:
            raise InvalidRequest("there is no prompt", field="prompt")
        rendered = render(request, self._model)
        token_ids = await self._encode(rendered)
        return pb.TokenizeResponse(token_ids=token_ids, rendered=rendered.text)

    # -- what the journal knows ----------------------------------------------------------------

    async def _find(self, key: bytes) -> None:
        """Bring an ended generation that is no longer in memory back. Raises JournalError."""
        if self._stored is None or self._book.find(key) is not None:
            return
        stored = await self._stored.read(key)
        if stored is None or self._book.find(key) is not None:
            return
        if not stored.ended:
            raise JournalError(
                "the journal failed in the middle of this generation; it goes on when the"
                " coordinator is started again",
                request_id=show_id(key),
            )
        restored = await asyncio.to_thread(self._restore, stored)
        if self._book.find(key) is None:
            self._book.add(restored.record)

    def revive(self, stored: StoredGeneration) -> None:
        """Go on with a generation that a coordinator's end has interrupted. Raises JournalError."""
        restored = self._restore(stored)
        demand = demand_of(stored, now=self._clock(), wall_ns=self._wall_clock_ns())
        self._book.add(restored.record)
        self._go_on(restored.record, demand, restored.events)

    def _restore(self, stored: StoredGeneration) -> Restored:
        return restore(
            stored,
            self._model,
            feed=self._driver.feed,
            now=self._clock(),
            wall_clock_ns=self._wall_clock_ns,
            counters=self._counters,
        )

    def _go_on(
        self, record: Record, demand: GenerationRequested, events: Iterable[Event] = ()
    ) -> None:
        """Ask the mesh for the rest of an answer, below the span that asked for its beginning."""
        key, metadata = demand.request, {"traceparent": demand.traceparent}
        traceparent = self._observer.request_received(key, metadata, self._model.name)
        verified = record.answer.verified_through
        record.demand = replace(demand, traceparent=traceparent, verified=verified)
        before = len(demand.recoveries)
        sink = self._observer.watch(key, record.answer, recoveries_before=before)
        self._driver.submit(record.demand, sink)
        for event in events:
            self._driver.feed(event)

    def _take_up(self, record: Record, context: ServicerContext) -> None:
        """Go on with a generation that has failed, if that was not its client's doing.

        Raises RequestUnknown if the journal has retired it: what it would add could not be kept.
        """
        answer, failure, asked = record.answer, record.failure, record.demand
        end = answer.end
        if failure is None or asked is None or end is None:
            return
        is_kept = self._stored is None or self._stored.holds(answer.request)
        if answer.tokens and not is_kept:
            raise RequestUnknown(
                "the generation failed and was retired", request_id=show_id(answer.request)
            )
        demand = replace(asked, deadline=self._deadline(context))
        if is_kept:
            demand = replace(
                demand,
                accepted=tuple(chunk.token_id for chunk in answer.tokens),
                recovered=True,
                fingerprint=(asked.fingerprint or end.summary.weights) if answer.tokens else "",
                resumed_after=failure.reason,
                recoveries=end.summary.recoveries,
            )
        events = answer.reopen()
        try:
            # In a context of its own: the span is the generation's, not this call's.
            contextvars.Context().run(self._go_on, record, demand, events)
        except MeshError:
            answer.end = end
            raise

    # -- starting ----------------------------------------------------------------------------------

    def _known(self, key: bytes, request: pb.GenerateRequest) -> Record | None:
        record = self._book.find(key)
        if record is not None and record.parameters != digest_of(request):
            raise RequestConflict(
                "this request id belongs to a generation with other parameters",
                request_id=show_id(key),
            )
        return record

    async def _start(
        self, key: bytes, request: pb.GenerateRequest, context: ServicerContext
    ) -> Record:
        check_model(request.model, self._model)
        parameters = read_parameters(request, self._model, self._limits)
        deadline = self._deadline(context)
        metadata = _text_metadata(context)
        began = self._clock()
        traceparent = self._observer.request_received(
            key,
            metadata,
            self._model.name,
            "chat" if request.WhichOneof("prompt") == "chat" else "text_completion",
            parameters.attributes,
        )
        prompt = await self._prompt(request)
        tokenize_s = self._clock() - began
        self._observer.request_tokenized(key, len(prompt), tokenize_s)
        attached = self._known(key, request)  # the same call may have come in meanwhile
        if attached is not None:
            return attached
        record = Record(
            answer=self._answer(key, parameters),
            parameters=digest_of(request),
            prompt_tokens=len(prompt),
            created_at_unix_ns=self._wall_clock_ns(),
            detach=request.detach,
            tokenize_s=tokenize_s,
            trace_id=_trace_id(traceparent),
        )
        self._book.add(record)
        record.demand = self._demand(record, prompt, parameters, deadline, traceparent)
        try:
            self._driver.submit(record.demand, self._observer.watch(key, record.answer))
        except MeshError:
            self._book.remove(key)
            raise
        return record

    def _answer(self, key: bytes, parameters: Parameters) -> Answer:
        return Answer(
            key,
            make_detokenizer=self._model.tokenizer.detokenizer,
            stops=parameters.stops,
            silent=parameters.stop_token_ids,
            feed=self._driver.feed,
            wall_clock_ns=self._wall_clock_ns,
            counters=self._counters,
        )

    def _demand(
        self,
        record: Record,
        prompt: tuple[int, ...],
        parameters: Parameters,
        deadline: float,
        traceparent: str,
    ) -> GenerationRequested:
        return GenerationRequested(
            request=record.answer.request,
            prompt=prompt,
            sampling=parameters.sampling,
            max_tokens=min(parameters.max_tokens, self._model.context_length - len(prompt)),
            stop_token_ids=parameters.stop_token_ids,
            deadline=deadline,
            verification=parameters.verification,
            delivery=parameters.delivery,
            traceparent=traceparent,
            context=edge_context(record, parameters),
        )

    def _deadline(self, context: ServicerContext) -> float:
        remaining: float | None = context.time_remaining()  # None: the client set no deadline
        allowed = self._limits.request_s_max
        return self._clock() + (allowed if remaining is None else min(remaining, allowed))

    async def _prompt(self, request: pb.GenerateRequest) -> tuple[int, ...]:
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("there is no prompt", field="prompt")
        if kind == "tokens":
            token_ids = list(request.tokens.token_ids)
        else:
            token_ids = await self._encode(render(request, self._model))
        return check_prompt(token_ids, self._model, self._limits)

    async def _encode(self, rendered: Rendered) -> list[int]:
        if len(rendered.text) <= TOKENIZE_INLINE_CHARACTERS_MAX and not self._tokenizing.locked():
            return encode(rendered, self._model)
        async with self._tokenizing:  # a tokenizer must not be used by two threads at once
            return await asyncio.to_thread(encode, rendered, self._model)

    # -- following ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _following(
        self, record: Record, from_index: int, context: ServicerContext, link: bytes = b""
    ) -> AsyncGenerator[AsyncGenerator[Piece, None], None]:
        """An answer's pieces; whoever leaves an unfinished one last, and stays away, cancels it."""
        record.readers += 1
        record.visits += 1
        answer = record.answer
        try:
            await context.send_initial_metadata(())  # From here on the client can resume it.
            async with aclosing(answer.read(from_index, link)) as pieces:
                yield pieces
        finally:
            record.readers -= 1
            grace_s = self._limits.resume_grace_s
            if grace_s > 0 and answer.end is None and record.readers == 0:
                asyncio.get_running_loop().call_later(
                    grace_s, self._abandoned, record, record.visits
                )
            else:
                self._abandoned(record, record.visits)

    def _abandoned(self, record: Record, visits: int) -> None:
        """Cancel what nobody reads, unless somebody came since the ``visits``-th reader left."""
        unread = record.readers == 0 and record.visits == visits and not record.detach
        if unread and record.answer.end is None:
            request = record.answer.request
            self._driver.feed(CancelRequested(request, reason="the client went away"))

    def _response(self, record: Record, piece: Piece) -> pb.GenerateResponse:
        if piece.end is not None and piece.end.error is not None:
            _told(piece.end.error, record)
        return piece_to_proto(record.answer.request_id, piece, tokenize_s=record.tokenize_s)


def _told(error: MeshError, record: Record) -> MeshError:
    """The failure with what a client needs to go on later."""
    error.metadata.setdefault("request_id", show_id(record.answer.request))
    error.metadata.setdefault("position", str(len(record.answer.tokens)))
    error.metadata.setdefault("resumable", "yes" if error.is_resumable else "no")
    return error


async def _is_left(record: Record) -> bool:
    """Whether nobody reads it; the stream of who says so may still be on its way out."""
    for _ in range(LEFT_LOOKS_MAX):
        if record.readers == 0:
            return True
        await asyncio.sleep(LEFT_LOOK_S)
    return record.readers == 0


def _text_metadata(context: ServicerContext) -> dict[str, str]:
    pairs: Any = context.invocation_metadata() or ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def _trace_id(traceparent: str) -> str:
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 and len(parts[1]) == 32 else ""
