"""What is asked of both sides: the prompt set, how tokens are drawn, and the needle ladder.

A *needle* prompt hides one fact in many numbered sentences and asks for it at the end. Its lengths
climb in steps that fall just before, on and behind the cuts between prefill chunks, where systems
like this one were seen to go wrong while short prompts were fine.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from stagemesh.sampling import LOGPROBS_MAX, SamplingSpec
from stagemesh.v1 import generation_service_pb2 as pb

NEEDLE_TOKENS_DEFAULT = 4000
NEEDLE_RUNGS = (255, 256, 257, 513, 1025, 2049)
"""Prompt lengths on the way up, tokens: before, on and behind multiples of the default chunks, 128
of a mesh and 256 of the reference."""
SAMPLED_TEMPERATURE = 0.8
SAMPLED_TOP_P = 0.95
Encode = Callable[[str], Awaitable[list[int]]]
"""A text as token ids."""
QUICK_NAMES = ("prose-en", "code-python", "json", "script-chinese", "emoji", "long")
NAME_CHARACTERS_MAX = 48


@dataclass(frozen=True, slots=True)
class Case:
    """One question: a prompt entry (``{"prompt"}``, ``{"messages"}`` or ``{"token_ids"}``) and how
    ``count`` tokens are drawn."""

    name: str
    entry: Mapping[str, Any]
    spec: SamplingSpec
    count: int

    @property
    def sampling(self) -> str:
        """How tokens are drawn, in words."""
        if self.spec.temperature == 0.0:
            return "greedy"
        spec = self.spec
        return f"temperature={spec.temperature:g} top_p={spec.top_p:g} seed={spec.seed}"

    def request(self, token_ids: Sequence[int]) -> pb.GenerateRequest:
        """The request for these prompt tokens, reporting as many log-probabilities as allowed."""
        return pb.GenerateRequest(
            tokens=pb.TokenPrompt(token_ids=token_ids),
            max_tokens=self.count,
            temperature=self.spec.temperature,
            top_p=self.spec.top_p,
            seed=self.spec.seed,
            logprobs=self.spec.logprobs,
            ignore_eos=True,
        )

    def prompt_request(self) -> pb.GenerateRequest:
        """The prompt alone, for the mesh's own tokenizer."""
        request = pb.GenerateRequest()
        if "token_ids" in self.entry:
            request.tokens.token_ids.extend(self.entry["token_ids"])
        elif "messages" in self.entry:
            for one in self.entry["messages"]:
                request.chat.messages.add(role=str(one["role"]), content=str(one["content"]))
        else:
            request.text = str(self.entry["prompt"])
        return request


def spec_fields(spec: SamplingSpec) -> dict[str, Any]:
    """A specification as JSON."""
    return asdict(spec)


def _specs(seeds: Sequence[int]) -> list[SamplingSpec]:
    greedy = SamplingSpec(logprobs=LOGPROBS_MAX)
    # The values travel as 32-bit floats: both sides must draw with what arrives.
    sampled = [
        SamplingSpec(
            temperature=_f32(SAMPLED_TEMPERATURE),
            top_p=_f32(SAMPLED_TOP_P),
            seed=seed,
            logprobs=LOGPROBS_MAX,
        )
        for seed in seeds
    ]
    return [greedy, *sampled]


def _f32(value: float) -> float:
    return pb.GenerateRequest(temperature=value).temperature


def shipped_prompts(*, quick: bool = False) -> list[dict[str, Any]]:
    """The prompt set that comes with the package."""
    text = resources.files("services.validate").joinpath("prompts.json").read_text("utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return [one for one in found if not quick or one["name"] in QUICK_NAMES]


def cases_of(entries: Iterable[Mapping[str, Any]], seeds: Sequence[int], count: int) -> list[Case]:
    """Every entry greedily and with every seed."""
    found = []
    for entry in entries:
        shown = str(entry.get("prompt") or entry.get("messages") or "")
        name = str(entry.get("name") or shown[:NAME_CHARACTERS_MAX])
        found += [Case(name, entry, spec, count) for spec in _specs(seeds)]
    return found


# -- needles --------------------------------------------------------------------------------------


def rungs(longest: int, room: int) -> list[int]:
    """Prompt lengths of the ladder, at most ``longest`` and at most ``room`` tokens."""
    top = min(longest, room)
    return [*(one for one in NEEDLE_RUNGS if one < top), top] if top > 0 else []


def needle_text(sentences: int, *, secret: int) -> str:
    """``sentences`` numbered sentences, the secret behind three quarters of them, the question."""
    lines = [
        f"Note {index}: crate {index * 37 % 101} went to bay {index * 13 % 17 + 1} at noon."
        for index in range(sentences)
    ]
    lines.insert(sentences * 3 // 4, f"The secret number is {secret}.")
    return "\n".join([*lines, "Question: what is the secret number? The secret number is"])


async def needle_tokens(length: int, encode: Encode) -> list[int]:
    """A needle prompt of exactly ``length`` tokens: filler is cut from its beginning."""
    secret = 10_000 + length * 7 % 89_999
    sentences = 4
    ids = await encode(needle_text(sentences, secret=secret))
    while len(ids) < length:
        sentences *= 2
        ids = await encode(needle_text(sentences, secret=secret))
    return ids[len(ids) - length :]


async def needle_cases(longest: int, room: int, count: int, encode: Encode) -> list[Case]:
    """The ladder, greedy, ``count`` tokens each. ``room``: the model's context."""
    spec = SamplingSpec(logprobs=LOGPROBS_MAX)
    return [
        Case(f"needle-{length}", {"token_ids": await needle_tokens(length, encode)}, spec, count)
        for length in rungs(longest, room - count)
    ]
