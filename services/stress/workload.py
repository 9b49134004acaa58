"""What is asked: a pure function of plan, seed and vocabulary.

There is a pool of different questions, so that mlx-lm needs to answer each only once; request ``n``
of a run asks one of them. Ids are drawn too: the same run asks with the same ids.
"""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass

from services.stress.plan import Workload
from services.stress.schedule import Draws

TEMPERATURE = 0.8
RESERVED_IDS = 3
"""Token ids below this are special in most vocabularies; prompts do without."""


@dataclass(frozen=True, slots=True)
class Question:
    """One entry of the pool. ``count`` tokens are wanted, whatever they are."""

    number: int
    prompt: tuple[int, ...]
    count: int
    temperature: float
    seed: int
    shadow: bool


def draw_question(
    workload: Workload, seed: int, vocabulary: int, number: int, attempt: int = 0
) -> Question:
    """Entry ``number`` of the pool: the first has the longest prompt, the second the shortest.
    Another ``attempt`` is another question in its place."""
    again = (attempt,) if attempt else ()
    draws = Draws(seed, "question", number, *again)
    shortest, longest = workload.prompt_tokens
    length = shortest + draws.integer("length", longest - shortest + 1)
    length = {0: longest, 1: shortest}.get(number, length)
    fewest, most = workload.answer_tokens
    span = max(1, vocabulary - RESERVED_IDS)
    return Question(
        number=number,
        prompt=tuple(
            min(vocabulary - 1, RESERVED_IDS + draws.integer(f"token/{at}", span))
            for at in range(length)
        ),
        count=fewest + draws.integer("count", most - fewest + 1),
        temperature=TEMPERATURE if draws.share("sampled") < workload.sampled else 0.0,
        seed=draws.integer("seed", 1 << 31),
        shadow=draws.share("shadow") < workload.shadow,
    )


def question_of(seed: int, number: int, pool: int) -> int:
    """Which question request ``number`` asks: every one once, then drawn."""
    return number if number < pool else Draws(seed, "ask").integer(number, pool)


def request_id(seed: int, number: int, attempt: int = 0) -> str:
    """The id of request ``number``; another one each time it has to be asked again."""
    digest = hashlib.sha256(f"{seed}/request/{number}/{attempt}".encode()).digest()
    return str(uuid.UUID(bytes=digest[:16], version=4))
