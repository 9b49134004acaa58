"""Bare mlx-lm in a process of its own: what every benchmark is compared with.

``python -m stage_worker.baseline DIRECTORY DTYPE`` loads the model the way a full worker does (same
files, same unpacking, same dtype) and then leaves everything to mlx-lm: `stream_generate` for one
stream, `BatchGenerator` for many. Commands come as JSON lines on stdin, answers leave as JSON lines
on stdout. Nothing of the mesh is imported beyond the loader, and nothing is tuned away: these are
mlx-lm's defaults. Only its end-of-sequence ids are taken from it, so that both sides make the same
number of tokens. The BLAS and its threads come from the environment the process is started with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from stage_worker import machine
from stage_worker.loading import DTypePolicy, evaluate, load_module
from stagemesh.errors import InvalidConfiguration

NO_TOKEN = -1
"""An end-of-sequence id that no model makes."""


class Baseline:
    """One loaded model and mlx-lm's two ways to generate with it."""

    def __init__(self, directory: Path, dtype: DTypePolicy) -> None:
        self.model = load_module(directory, dtype).model
        evaluate([self.model])
        found = load_tokenizer(directory)
        inner = getattr(found, "_tokenizer", found)
        self.tokenizer = TokenizerWrapper(inner)
        # Given to the constructor it would only be added to the tokenizer's own.
        self.tokenizer.eos_token_ids = {NO_TOKEN}

    def single(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """One stream. ``ttft_s`` to the first token, ``decode_s`` from the first to the last;
        ``fastest_s`` is its shortest step."""
        began = time.perf_counter()
        times: list[float] = []
        tokens: list[int] = []
        responses = stream_generate(self.model, self.tokenizer, list(prompt), max_tokens=max_tokens)
        for response in responses:
            times.append(time.perf_counter())
            tokens.append(int(response.token))
        return {
            "ttft_s": times[0] - began,
            "decode_s": times[-1] - times[0],
            "fastest_s": min((b - a for a, b in pairwise(times)), default=0.0),
            "steps": len(times) - 1,
            "tokens": tokens,
        }

    def batch(self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> dict[str, Any]:
        """Many streams at once, from the call to the last token of all."""
        began = time.perf_counter()
        generator = BatchGenerator(self.model, completion_batch_size=max(32, len(prompts)))
        generator.insert([list(prompt) for prompt in prompts], list(max_tokens))
        made, first = 0, 0.0
        while responses := generator.next_generated():
            first = first or time.perf_counter()
            made += len(responses)
        ended = time.perf_counter()
        generator.close()
        mx.clear_cache()
        return {"seconds": ended - began, "first_s": first - began, "tokens": made}

    def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command. Raises InvalidConfiguration for one that there is not."""
        match command:
            case {"do": "single", "prompt": prompt, "max_tokens": max_tokens}:
                return self.single(prompt, max_tokens)
            case {"do": "batch", "prompts": prompts, "max_tokens": max_tokens}:
                return self.batch(prompts, max_tokens)
            case {"do": "describe"}:
                return machine.describe_environment()
        raise InvalidConfiguration("no such command", setting=str(command.get("do")))


def main(arguments: Sequence[str]) -> int:
    """Serve commands until stdin ends."""
    directory, dtype = arguments
    baseline = Baseline(Path(directory), DTypePolicy(dtype))
    answer(machine.describe_environment())
    for line in sys.stdin:
        command = json.loads(line)
        answer({**baseline.handle(command), "id": command["id"]})
    return 0


def answer(document: dict[str, Any]) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
