"""What one undisturbed process answers: mlx-lm in a child process, asked before anything breaks.

A matrix library that is not bit-exact gives logits that depend on how many rows are computed
together, by about 1e-4 in float32. Where two tokens are that close, either is an honest answer, and
a history could not be judged token by token. So no such question is asked: one whose answer comes
close to a tie is drawn anew, and what is left must come out exactly. Bit-exact libraries need none
of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from services.stress.workload import Question
from services.validate.cases import spec_fields
from services.validate.reference_side import ReferenceSide
from stage_worker.reference import CHUNK_TOKENS
from stagemesh.errors import InvalidConfiguration
from stagemesh.sampling import SamplingSpec

MARGIN_F32 = 0.005
"""Fifty times what batching changes in float32."""
MARGIN_HALF = 0.1
ATTEMPTS_MAX = 40


class Undisturbed(ReferenceSide):
    """The reference process, asked for answers only."""

    async def answer(self, question: Question) -> tuple[tuple[int, ...], float]:
        """The tokens of one question, and the narrowest margin by which any of them was chosen.
        Raises ReferenceFailed."""
        spec = SamplingSpec(temperature=question.temperature, seed=question.seed)
        found = await self._ask(
            "compare",
            prompt=list(question.prompt),
            count=question.count,
            sampling=spec_fields(spec),
            boundaries=[],
            chunk=CHUNK_TOKENS,
            tokens=[],
            reported=[],
        )
        return tuple(found["token_ids"]), min(found["margins"])


class Answers(Protocol):
    """Who is asked."""

    async def answer(self, question: Question) -> tuple[tuple[int, ...], float]:
        """Tokens, and the narrowest margin."""
        ...


def margin_least(dtype: str, *, exact: bool) -> float:
    """How far from a tie every choice of an answer has to be, in logits."""
    if exact:
        return 0.0
    return MARGIN_F32 if dtype == "f32" else MARGIN_HALF


async def expect(
    side: Answers,
    draw: Callable[[int, int], Question],
    count: int,
    progress: Callable[[str, int, int], None],
    *,
    margin: float = 0.0,
) -> dict[Question, tuple[int, ...]]:
    """``count`` questions with their answers. ``draw`` gives a question by number and attempt.

    Raises InvalidConfiguration for a model that is forever undecided.
    """
    found: dict[Question, tuple[int, ...]] = {}
    for number in range(count):
        progress("what mlx-lm answers", number, count)
        for attempt in range(ATTEMPTS_MAX):
            question = draw(number, attempt)
            tokens, narrowest = await side.answer(question)
            if narrowest >= margin:
                found[question] = tokens
                break
        else:
            raise InvalidConfiguration(
                f"{ATTEMPTS_MAX} questions in a row had answers with a near tie; "
                "ask for shorter answers, or stay with --deterministic",
                setting="deterministic",
            )
    progress("what mlx-lm answers", count, count)
    return found
