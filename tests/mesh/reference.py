"""What one machine answers, by mlx-lm itself: its model, its cache, its generation loop.

Run as a program: a specification comes in on standard input, the tokens go out. Nothing of the mesh
computes here. Greedy answers are mlx-lm's own ``generate_step``. For a sampled answer mlx-lm gives
the logits, and the token is drawn by the published rule: the largest of ``logit / temperature``
plus Gumbel noise from the Philox stream whose key is (seed, position). Penalties are mlx-lm's own
processors; those for frequency and presence are given the answer alone, as OpenAI means them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import (
    make_frequency_penalty,
    make_presence_penalty,
    make_repetition_penalty,
)
from mlx_lm.utils import load_model

UNIFORM_STEP = 2.0**-32
UNPENALISED = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, "forgets": 0}


def greedy(model, prompt: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def penalised(logits, prompt: list[int], answer: list[int], asked: dict) -> mx.array:
    """``logits`` [1, vocabulary] behind ``prompt`` and ``answer``; of the answer, the first
    ``forgets`` tokens are taken for part of the prompt."""
    counted = answer[asked["forgets"] :]
    if asked["repetition"] != 1.0:
        logits = make_repetition_penalty(asked["repetition"])(mx.array(prompt + answer), logits)
    if asked["presence"] and counted:
        processor = make_presence_penalty(asked["presence"], len(counted))
        logits = processor(mx.array(counted), logits)
    if asked["frequency"] and counted:
        processor = make_frequency_penalty(asked["frequency"], len(counted))
        logits = processor(mx.array(counted), logits)
    return logits


def noise(seed: int, position: int, size: int) -> np.ndarray:
    words = np.random.Philox(key=np.array([seed, position], np.uint64))
    words = words.random_raw((size + 1) // 2).view(np.uint32)[:size]
    return -np.log(-np.log((words + 0.5) * UNIFORM_STEP))


def drawn(model, asked: dict) -> list[int]:
    prompt, temperature = asked["prompt"], asked["temperature"]
    cache = make_prompt_cache(model)
    fed, tokens = list(prompt), []
    while len(tokens) < asked["count"]:
        logits = model(mx.array([fed]), cache=cache)[:, -1].astype(mx.float32)
        scores = np.array(penalised(logits, prompt, tokens, asked)[0]).astype(np.float64)
        if temperature:
            scores /= temperature
            scores += noise(asked["seed"], len(prompt) + len(tokens), scores.size)
        fed = [int(np.argmax(scores))]
        tokens += fed
    return tokens


def main() -> None:
    asked = json.load(sys.stdin)
    model, _ = load_model(Path(asked["model"]))
    answers = []
    for one in asked["requests"]:
        full = {**UNPENALISED, **one}
        is_plain = not one["temperature"] and {**full, **UNPENALISED} == full
        answers.append(
            greedy(model, one["prompt"], one["count"]) if is_plain else drawn(model, full)
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
