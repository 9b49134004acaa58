"""The reference's side: a child process that runs mlx-lm, asked over pipes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from coordinator.validation.evidence import Expectation, Judgement, Observation
from services.validate.cases import Case, spec_fields
from stage_worker import blas
from stage_worker.reference import CHUNK_TOKENS
from stagemesh.errors import StageError

ANSWER_BYTES_MAX = 256 << 20
"""One line of the child: judgements with digests of a long prompt are large."""
END_S_MAX = 10.0


class ReferenceFailed(StageError):
    """The reference process could not do what it was asked."""

    reason = "REFERENCE_FAILED"


class ReferenceSide:
    """One reference process; an asynchronous context manager. One question at a time.

    ``deterministic`` and ``threads`` choose the matrix library exactly as for a stage worker.
    """

    def __init__(
        self, directory: Path, *, dtype: str, deterministic: bool, threads: int = 1
    ) -> None:
        self._directory = directory
        self._dtype = dtype
        self._deterministic = deterministic
        self._threads = threads
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self.facts: dict[str, Any] = {}
        """Layers, element type and environment, once it runs."""

    async def __aenter__(self) -> Self:
        chosen = await asyncio.to_thread(
            blas.preload_environment, self._threads, deterministic=self._deterministic
        )
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "stage_worker.reference_process"),
            *("--model", str(self._directory), "--dtype", self._dtype),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **chosen},
            limit=ANSWER_BYTES_MAX,
            process_group=0,
        )
        try:
            self.facts = await self._read()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_S_MAX)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _read(self) -> dict[str, Any]:
        if self._process is None or self._process.stdout is None:
            raise ReferenceFailed("the reference process has not been started")
        line = await self._process.stdout.readline()
        if not line:
            raise ReferenceFailed("the reference process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise ReferenceFailed(f"the reference cannot answer: {answer['error']}")
        found: dict[str, Any] = answer["ok"]
        return found

    async def _ask(self, operation: str, **fields: Any) -> dict[str, Any]:
        async with self._turn:
            if self._process is None or self._process.stdin is None:
                raise ReferenceFailed("the reference process has not been started")
            line = json.dumps({"operation": operation, **fields}) + "\n"
            try:
                self._process.stdin.write(line.encode())
                await self._process.stdin.drain()
            except ConnectionError as error:
                raise ReferenceFailed("the reference process ended") from error
            return await self._read()

    # -- questions --------------------------------------------------------------------------------

    async def encode(self, entry: Mapping[str, Any]) -> tuple[int, ...]:
        """The prompt as mlx-lm's tokenizer cuts it."""
        if "token_ids" in entry:
            return tuple(entry["token_ids"])
        if "messages" in entry:
            found = await self._ask("encode", messages=entry["messages"])
        else:
            found = await self._ask("encode", text=str(entry["prompt"]))
        return tuple(found["token_ids"])

    async def expect(
        self, case: Case, seen: Observation, *, every_boundary: Sequence[int], digests: bool
    ) -> Expectation:
        """The free run of ``case`` and a judgement of what was ``seen``.

        ``every_boundary``: the cuts of all routes that will be asked about with the same case, so
        that it is generated only once.
        """
        fields = request_fields(case, seen, digests=digests)
        every = sorted({*every_boundary, *fields["boundaries"]}) if digests else []
        found = await self._ask("compare", **fields, every_boundary=every)
        return expectation_of(await self.encode(case.entry), found)

    async def bisect(
        self, case: Case, seen: Observation, known: Expectation, *, chunk: int
    ) -> Expectation:
        """``known`` with judgements that were computed in the shapes of a mesh that cuts prompts
        into ``chunk`` tokens, with digests."""
        fields = request_fields(case, seen, digests=True, chunk=chunk)
        found = await self._ask("bisect", **fields)
        return replace(
            known, delivered_text=found["delivered_text"], judgements=judgements_of(found)
        )


def request_fields(
    case: Case, seen: Observation, *, digests: bool, chunk: int = CHUNK_TOKENS
) -> dict[str, Any]:
    """What the reference process is told about one answer."""
    return {
        "prompt": list(seen.prompt),
        "count": case.count,
        "sampling": spec_fields(case.spec),
        "boundaries": [place.span.last for place in seen.stages[:-1]] if digests else [],
        "chunk": chunk,
        "tokens": list(seen.token_ids),
        "reported": [[token_id for token_id, _ in one.logprobs] for one in seen.tokens],
    }


def judgements_of(answer: Mapping[str, Any]) -> tuple[Judgement, ...]:
    """The judgements of an answer of the reference process."""
    return tuple(
        Judgement(
            token_id=one["token_id"],
            margin=one["margin"],
            gap=one["gap"],
            rank=one["rank"],
            logits=(one["logits"][0], one["logits"][1]),
            logprobs=tuple(one["logprobs"]),
            digests=tuple(tuple(allowed) for allowed in one["digests"]),
        )
        for one in answer["judgements"]
    )


def expectation_of(prompt: tuple[int, ...], answer: Mapping[str, Any]) -> Expectation:
    """What the reference expects, from an answer to ``compare``."""
    return Expectation(
        prompt,
        tuple(answer["token_ids"]),
        answer["text"],
        answer["delivered_text"],
        judgements_of(answer),
    )
