"""The clients: each asks one question after the other, over real gRPC, and notes what it sees.

They are the product's own clients; a recorder in front of their checker notes every message as it
comes off the wire, before anything is smoothed over.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from services.client import ConnectionLost, MeshClient
from services.credentials import TlsFiles
from services.stream_checker import StreamChecker
from services.stress.history import Answer, End, Line, Repair
from services.stress.workload import Question, question_of, request_id
from stagemesh.errors import MeshError, Overloaded
from stagemesh.v1 import generation_service_pb2 as pb

ASK_AGAIN_S = 0.25
"""Pause before a question is asked again that the mesh could not take."""
ATTEMPTS_MAX = 400
"""Times one question is asked before giving up on ever being admitted."""

Clock = Callable[[], float]


class Recorder(StreamChecker):
    """A client's checker that notes what it is given first."""

    def __init__(
        self, answer: Answer, question: Question, clock: Clock, on_tokens: Callable[[int], None]
    ) -> None:
        super().__init__(uuid.UUID(answer.request_id).bytes, question.prompt)
        self._on_tokens = on_tokens
        self._answer = answer
        self._clock = clock

    def attach(self, *, from_start: bool) -> None:
        super().attach(from_start=from_start)
        self._answer.attached.append(0 if from_start else self.position)

    def check(self, response: pb.GenerateResponse) -> pb.GenerateResponse | None:
        answer, now = self._answer, self._clock()
        correction = response.HasField("correction")
        answer.lines.append(
            Line(
                at=now,
                position=response.position,
                token_ids=tuple(one.token_id for one in response.tokens),
                epoch=response.epoch,
                stream=len(answer.attached) - 1,
                withdrawn_from=response.correction.from_position if correction else -1,
                verified_through=response.verified_through,
            )
        )
        self._on_tokens(len(response.tokens))
        if response.HasField("finish"):
            answer.ends.append(_end(response.finish, now))
        return super().check(response)


def _end(finish: Any, now: float) -> End:
    repairs = tuple(
        Repair(
            cause=one.cause,
            action=one.action,
            worker=one.worker,
            from_route=tuple(one.from_route),
            to_route=tuple(one.to_route),
            epoch=one.epoch,
            kept=one.kept,
            replayed=one.replayed,
            seconds=one.seconds,
        )
        for one in finish.recoveries
    )
    reason = pb.FinishReason.Name(finish.reason).removeprefix("FINISH_REASON_").lower()
    return End(now, reason, finish.completion_tokens, finish.prompt_tokens, repairs)


def request_for(question: Question, identity: str) -> pb.GenerateRequest:
    """The question as it is sent."""
    shadow = pb.VERIFICATION_LEVEL_SHADOW
    return pb.GenerateRequest(
        request_id=identity,
        tokens=pb.TokenPrompt(token_ids=question.prompt),
        max_tokens=question.count,
        temperature=question.temperature,
        seed=question.seed,
        ignore_eos=True,
        verify=shadow if question.shadow else pb.VERIFICATION_LEVEL_UNSPECIFIED,
    )


@dataclass(slots=True)
class Readers:
    """``streams`` of them. Belongs to one event loop; ``run`` ends once ``stop`` was set and every
    question that was asked has its answer."""

    address: str
    seed: int
    pool: Sequence[Question]
    expected: Mapping[int, Sequence[int]]
    clock: Clock
    answers: list[Answer] = field(default_factory=list)
    tokens: int = 0
    """Delivered so far."""
    tls: TlsFiles | None = None
    asked_again: int = 0
    """Questions that could not be taken at once."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _resumes: int = 0
    _clients: list[MeshClient] = field(default_factory=list)
    _next: int = 0

    async def run(self, streams: int) -> None:
        """Until stopped."""
        await asyncio.gather(*(self._reader() for _ in range(streams)))

    @property
    def resumes(self) -> int:
        """Times a broken stream was attached to again."""
        return self._resumes + sum(client.resumes for client in self._clients)

    def _count(self, tokens: int) -> None:
        self.tokens += tokens

    async def _reader(self) -> None:
        async with MeshClient(self.address, tls=self.tls) as client:
            self._clients.append(client)
            try:
                while not self.stop.is_set():
                    number, self._next = self._next, self._next + 1
                    await self._ask(client, number)
            finally:
                self._clients.remove(client)
                self._resumes += client.resumes

    async def _ask(self, client: MeshClient, number: int) -> None:
        question = self.pool[question_of(self.seed, number, len(self.pool))]
        for attempt in range(ATTEMPTS_MAX):
            identity = request_id(self.seed, number, attempt)
            answer = Answer(number, question.number, identity, self.clock())
            self.answers.append(answer)
            error = await self._read(client, question, answer)
            if error is None:
                return
            is_refused = isinstance(error, Overloaded | ConnectionLost) and not answer.lines
            if not is_refused or attempt + 1 == ATTEMPTS_MAX:
                answer.error, answer.detail = error.reason, error.message[:200]
                return
            self.answers.remove(answer)
            self.asked_again += 1
            if self.stop.is_set():
                return
            await asyncio.sleep(ASK_AGAIN_S)

    async def _read(
        self, client: MeshClient, question: Question, answer: Answer
    ) -> MeshError | None:
        recorder = Recorder(answer, question, self.clock, self._count)
        request = request_for(question, answer.request_id)
        try:
            async with aclosing(client.generate(request, checker=recorder)) as stream:
                async for _response in stream:
                    continue
        except MeshError as error:
            return error
        finally:
            answer.ended_at = self.clock()
        return None


async def read_again(client: MeshClient, answer: Answer) -> None:
    """The whole answer once more, as a client that lost everything would. Raises MeshError."""
    found: list[int] = []
    async with aclosing(client.resume(answer.request_id, 0)) as stream:
        async for response in stream:
            found += [one.token_id for one in response.tokens]
    answer.again = tuple(found)
