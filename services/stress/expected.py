"""What one undisturbed process answers: mlx-lm in a child process, asked before anything breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from services.stress.workload import Question
from services.validate.cases import spec_fields
from services.validate.reference_side import ReferenceSide
from stage_worker.reference import CHUNK_TOKENS
from stagemesh.sampling import SamplingSpec


class Undisturbed(ReferenceSide):
    """The reference process, asked for answers only."""

    async def answer(self, question: Question) -> tuple[int, ...]:
        """The tokens of one question. Raises ReferenceFailed."""
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
        return tuple(found["token_ids"])


async def expect(
    side: Undisturbed, pool: Sequence[Question], progress: Callable[[str, int, int], None]
) -> dict[int, tuple[int, ...]]:
    """The answers to the whole pool, by question."""
    found: dict[int, tuple[int, ...]] = {}
    for question in pool:
        progress("what mlx-lm answers", len(found), len(pool))
        found[question.number] = await side.answer(question)
    progress("what mlx-lm answers", len(found), len(pool))
    return found
