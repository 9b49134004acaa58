"""The reference as a child process: one JSON object a line in, one a line out.

A process of its own, because the matrix library is chosen when a process starts, and because the
reference must share nothing with what it judges. Answers: ``{"ok": …}`` or ``{"error": …}``. What a
model or a library prints goes to stderr.

Operations: ``encode``, ``compare``, ``bisect``. A free run is kept on disk under its key for as
long as the process lives, so that the same prompt is generated once and compared many times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from stage_worker.reference import Judged, Reference, Step, Trace, judge_step
from stagemesh.errors import MeshError
from stagemesh.sampling import SamplingSpec

_Free = tuple[list[int], list[Any]]


class ReferenceServer:
    """Answers requests about one model. ``folder`` holds the logits of free runs."""

    def __init__(self, reference: Reference, folder: Path) -> None:
        self._reference = reference
        self._folder = folder
        self._traces: dict[str, list[Any]] = {}

    def describe(self) -> dict[str, Any]:
        """What this reference is and what it computes with."""
        from stage_worker.machine import describe_environment

        return {
            "layers": self._reference.layer_count,
            "dtype": self._reference.dtype,
            "environment": describe_environment(),
        }

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One operation. Raises KeyError for one that does not exist."""
        operations = {"encode": self._encode, "compare": self._compare, "bisect": self._bisect}
        return operations[request["operation"]](request)

    def _encode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "messages" in request:
            return {"token_ids": self._reference.encode_chat(request["messages"])}
        return {"token_ids": self._reference.encode(request["text"])}

    def _compare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The free run, and a judgement of every delivered token in its own context."""
        trace = self._free_run(request)
        tokens: list[int] = request["tokens"]
        prefix = _common_prefix(trace.token_ids, tokens)
        steps = trace.steps
        if prefix + 1 < len(tokens):
            # From here on the two stand in different contexts: judge in the mesh's.
            steps = self._follow(request).steps
        return {
            "token_ids": trace.token_ids,
            "text": self._reference.decode(trace.token_ids),
            "delivered_text": self._reference.decode(tokens),
            "margins": [step.drawn.margin for step in trace.steps],
            "judgements": self._judged(request, steps),
        }

    def _bisect(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Judgements with digests, computed in the shapes a mesh computes in."""
        return {
            "delivered_text": self._reference.decode(request["tokens"]),
            "judgements": self._judged(request, self._follow(request).steps),
        }

    def _judged(self, request: Mapping[str, Any], steps: Sequence[Step]) -> list[dict[str, Any]]:
        prompt, tokens, spec = request["prompt"], request["tokens"], _spec(request)
        found: list[Judged] = []
        for index, (step, token_id) in enumerate(zip(steps, tokens, strict=False)):
            history = [*prompt, *tokens[:index]]
            reported = request["reported"][index]
            found.append(judge_step(step, spec, history, len(prompt), token_id, reported))
        return [asdict(one) for one in found]

    def _follow(self, request: Mapping[str, Any]) -> Trace:
        return self._reference.follow(
            request["prompt"],
            request["tokens"],
            _spec(request),
            boundaries=request["boundaries"],
            chunk=request["chunk"],
        )

    def _free_run(self, request: Mapping[str, Any]) -> Trace:
        wanted = request["boundaries"]
        every = request.get("every_boundary") or wanted
        key = json.dumps([request["prompt"], request["count"], request["sampling"], every])
        if key not in self._traces:
            trace = self._reference.free_run(
                request["prompt"],
                request["count"],
                _spec(request),
                boundaries=every,
                chunk=request["chunk"],
            )
            logits = np.stack([step.logits for step in trace.steps])
            np.save(self._file(len(self._traces)), logits, allow_pickle=False)
            self._traces[key] = [
                len(self._traces),
                [(step.drawn, step.digests) for step in trace.steps],
            ]
        number, light = self._traces[key]
        logits = np.load(self._file(number), mmap_mode="r", allow_pickle=False)
        columns = [every.index(one) for one in wanted]
        return Trace(
            [
                Step(np.asarray(row), drawn, tuple(digests[column] for column in columns))
                for row, (drawn, digests) in zip(logits, light, strict=True)
            ]
        )

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.npy"


def _spec(request: Mapping[str, Any]) -> SamplingSpec:
    return SamplingSpec(**request["sampling"])


def _common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return index
    return min(len(ours), len(theirs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve stdin until it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    chosen = parser.parse_args(arguments)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(document: Mapping[str, Any]) -> None:
        answers.write(json.dumps(document) + "\n")
        answers.flush()

    try:
        reference = Reference.load(chosen.model, dtype=chosen.dtype)
    except MeshError as error:
        say({"error": error.message})
        return 1
    with tempfile.TemporaryDirectory(prefix="stagemesh-reference-") as folder:
        server = ReferenceServer(reference, Path(folder))
        say({"ok": server.describe()})
        for line in sys.stdin:
            try:
                say({"ok": server.answer(json.loads(line))})
            except Exception as error:  # noqa: BLE001 - told to the parent, which ends the run
                say({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
