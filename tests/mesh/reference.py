"""What one machine answers, by mlx-lm itself: its model, its cache, its generation loop.

Run as a program: a specification comes in on standard input, the tokens go out. Nothing of the mesh
computes here. Greedy answers are mlx-lm's own ``generate_step``. For a sampled answer mlx-lm gives
the logits, and the token is drawn by the published rule: the largest of ``logit / temperature``
plus Gumbel noise from the Philox stream whose key is (seed, position).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

UNIFORM_STEP = 2.0**-32


def greedy(model, prompt: list[int], count: int) -> list[int]:
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def sampled(model, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    cache = make_prompt_cache(model)
    fed, tokens = list(prompt), []
    while len(tokens) < count:
        logits = np.array(model(mx.array([fed]), cache=cache)[0, -1].astype(mx.float32))
        position = len(prompt) + len(tokens)
        words = np.random.Philox(key=np.array([seed, position], np.uint64))
        words = words.random_raw((logits.size + 1) // 2).view(np.uint32)[: logits.size]
        noise = -np.log(-np.log((words + 0.5) * UNIFORM_STEP))
        fed = [int(np.argmax(logits.astype(np.float64) / temperature + noise))]
        tokens += fed
    return tokens


def main() -> None:
    asked = json.load(sys.stdin)
    model, _ = load_model(Path(asked["model"]))
    answers = []
    for one in asked["requests"]:
        prompt, count = one["prompt"], one["count"]
        if one["temperature"]:
            answers.append(sampled(model, prompt, count, one["temperature"], one["seed"]))
        else:
            answers.append(greedy(model, prompt, count))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
