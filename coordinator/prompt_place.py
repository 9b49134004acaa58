"""A prompt that comes in beside running answers: how large its chunks are, and whether the answers
make room for it, with one decode step fewer on the way and more rows in each.

A step reads the weights of every layer, however few rows it has, and on most machines that is the
larger part of it. With a chunk beside the decode steps of a round, a stage reads them once more,
and a running stream waits half as long again for a token. If the answers go in one step fewer, the
chunk comes in the place of that step, and the round is hardly longer than it was.

It does not always pay. With many rows each row costs as much as the weights do; and other rows side
by side mean copied caches, which everybody waits for, before and behind the prompt. So it is
decided once for each prompt, from what steps of so many rows took on this route (`StepTimes`). A
size that nobody has seen yet is tried: then it has been seen.

Measured (SmolLM2 f32, OpenBLAS with AVX-512 kernels, one thread, 15 layers, ms): a step of 4 rows
takes 24, one of 8 rows 28, a chunk of 12 tokens 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.step_times import StepTimes

CHUNK_TOKENS_MIN = 12
"""Smaller chunks take hardly less time, and a prompt would never be through."""
CHUNK_ROUNDS = 0.5
"""What a chunk may take, in rounds of the decode steps beside it."""
ROUNDS_MIN = 4
"""A prompt that is through in fewer rounds is not worth the copies."""
COPY_SHARE = 0.01
"""What a stage takes to copy one position of a cache, as a share of what it takes to compute one.
Measured as above: 25 µs and 2.4 ms, with 60 to 1,000 positions a row."""
COPY_ROUNDS_MAX = 0.5
"""What all copies may add to one pause, in rounds."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who is on the route. ``decoding``: requests that do; ``held_tokens``: positions in their
    caches; ``rows_max``: most of them in one step; ``prompt_rounds``: chunks that the prompt still
    is."""

    decoding: int
    held_tokens: int
    rows_max: int
    prompt_rounds: float


class PromptPlace:
    """Whether a prompt has the place of a decode step now. ``is_open``: nobody has decided. The
    owner offers the place to the first of those who wait for a prompt, and takes it back when
    nobody waits beside others who decode."""

    def __init__(self, places: int, times: StepTimes) -> None:
        self.is_given = False
        self.is_open = True
        self._places = places
        self._times = times

    def offer(self, crowd: Crowd) -> None:
        """A prompt is first in line."""
        self.is_open, self.is_given = False, pays(crowd, self._places, self._times)

    def take_back(self) -> None:
        """No prompt waits."""
        self.is_open, self.is_given = True, False


def pays(crowd: Crowd, places: int, times: StepTimes) -> bool:
    """Whether to decode in ``places - 1`` steps while the prompt comes in."""
    if places < 2 or crowd.decoding < places or crowd.prompt_rounds < ROUNDS_MIN:
        return False  # or there is a place already
    rows, more_rows = _shared_out(crowd.decoding, places), _shared_out(crowd.decoding, places - 1)
    usual_s = times.decode_s(rows)
    if more_rows > crowd.rows_max or usual_s is None:
        return False
    round_s = places * usual_s
    # One row in ``places`` goes elsewhere, and that on as many stages, one behind the other.
    copying_s = crowd.held_tokens * COPY_SHARE * times.prefill_token.mean_s
    larger_s = times.decode_s(more_rows)
    return copying_s <= COPY_ROUNDS_MAX * round_s and (
        larger_s is None or (places - 1) * larger_s < round_s
    )


def _shared_out(rows: int, steps: int) -> int:
    return -(-rows // steps)


def chunk_tokens(times: StepTimes, steps: int, most: int) -> int:
    """How much of a prompt goes into one step beside a round of so many decode steps."""
    if not times.decode.samples or times.prefill_token.mean_s <= 0.0:
        return most
    fitting = int(CHUNK_ROUNDS * steps * times.decode.mean_s / times.prefill_token.mean_s)
    return min(most, max(fitting, CHUNK_TOKENS_MIN))
