"""Which model types can be split: every type mlx-lm has, tried on tiny random weights.

For each type a tiny model is built and run unsplit: prefill of five tokens, prefill of three more,
three decode steps. The same model is then cut three ways (two cuts in two, one in three), every
boundary activation goes through encoded bytes, and the logits must be bit-identical at every step.
The outcome is *exact*, *refused* (with the reason a worker would give), *untestable* (no tiny
configuration could be built or the type's own forward fails on it), or *wrong*, which must never
happen.

Types run in child processes, one after another in each, so that one that hangs or crashes costs its
time limit and nothing else. Children speak JSON lines over their pipes.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SUPPORT_VERSION = 1
TYPE_S_MAX = 60.0
"""Time limit for one type; the slowest takes a few seconds."""
PREFILL_CHUNKS = (5, 3)
DECODE_STEPS = 3
LAYERS = 6
CUTS = ((0, 2, 6), (0, 4, 6), (0, 2, 4, 6))
"""Layer boundaries of each way to cut: two cuts in two stages, one in three."""

FAST_TYPES = (
    "cohere2",
    "deepseek_v3",
    "gemma3_text",
    "gemma3n",
    "gpt2",
    "jamba",
    "lfm2",
    "llama",
    "mamba2",
    "nemotron_h",
    "qwen3_next",
    "rwkv7",
)
"""One of each kind: plain, sliding window, mixture of experts, state space, hybrid, and two
refusals."""

Roundtrip = Callable[[Any], Any]
"""Encodes a boundary activation (mx.array) and decodes it again, as the wire would."""
Progress = Callable[[str, int, int], None]
"""``progress(model_type, done, total)``."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one type: ``verdict`` is exact, refused, untestable or wrong."""

    model_type: str
    verdict: str
    detail: str = ""


@dataclass(slots=True)
class SupportReport:
    """The outcomes of a sweep, in the order of their type's name."""

    outcomes: list[Outcome] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def of(self, verdict: str) -> list[Outcome]:
        """Outcomes with this verdict."""
        return [outcome for outcome in self.outcomes if outcome.verdict == verdict]

    @property
    def ok(self) -> bool:
        """True when no type computed something wrong."""
        return not self.of("wrong")

    def to_json(self) -> dict[str, Any]:
        """The object that ``stagemesh support --json`` prints."""
        return {
            "version": SUPPORT_VERSION,
            "exact": [outcome.model_type for outcome in self.of("exact")],
            "refused": [
                {"model_type": o.model_type, "reason": o.detail} for o in self.of("refused")
            ],
            "untestable": [
                {"model_type": o.model_type, "reason": o.detail} for o in self.of("untestable")
            ],
            "wrong": [{"model_type": o.model_type, "detail": o.detail} for o in self.of("wrong")],
            "environment": self.environment,
        }


def run_support(
    types: Iterable[str] | None = None,
    progress: Progress | None = None,
    *,
    processes: int = 1,
    seconds_per_type: float = TYPE_S_MAX,
    roundtrip: str = "",
) -> SupportReport:
    """Try ``types`` (None: all of mlx-lm's) in child processes and report what came of each.

    ``roundtrip`` is the ``module:function`` that stands for a hop in the children; empty is the
    array's bytes and back.
    """
    from stage_worker.machine import describe_environment
    from stage_worker.tiny_models import model_types

    wanted = sorted(model_types() if types is None else types)
    outcomes = _Sweep(wanted, progress, seconds_per_type, roundtrip).run(
        min(processes, len(wanted))
    )
    return SupportReport(
        sorted(outcomes, key=lambda outcome: outcome.model_type), describe_environment()
    )


# -- the parent -----------------------------------------------------------------------------------


class _Sweep:
    """Hands types to child processes and collects outcomes; replaces a child that dies or hangs."""

    def __init__(
        self,
        wanted: Sequence[str],
        progress: Progress | None,
        seconds_per_type: float,
        roundtrip: str = "",
    ) -> None:
        self._waiting = deque(wanted)
        self._total = len(wanted)
        self._progress = progress
        self._seconds = seconds_per_type
        self._roundtrip = roundtrip
        self._outcomes: list[Outcome] = []

    def run(self, processes: int) -> list[Outcome]:
        children = [_Child(self._roundtrip) for _ in range(processes)]
        try:
            busy = [child for child in children if self._assign(child)]
            while busy:
                with selectors.DefaultSelector() as selector:
                    for child in busy:
                        selector.register(child.stdout, selectors.EVENT_READ, child)
                    wait = max(0.0, min(child.deadline for child in busy) - time.monotonic())
                    ready = {key.data for key, _ in selector.select(wait)}
                now = time.monotonic()
                for child in [c for c in busy if c in ready or now >= c.deadline]:
                    self._note(child.outcome(timed_out=child not in ready))
                    if not self._assign(child):
                        busy.remove(child)
        finally:
            for child in children:
                child.stop()
        return self._outcomes

    def _assign(self, child: _Child) -> bool:
        if not self._waiting:
            return False
        child.start(self._waiting.popleft(), time.monotonic() + self._seconds)
        return True

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        if self._progress is not None:
            self._progress(outcome.model_type, len(self._outcomes), self._total)


def _command() -> list[str]:
    return [sys.executable, "-m", "stage_worker.support"]


class _Child:
    """One child process and the type it is trying."""

    def __init__(self, roundtrip: str = "") -> None:
        self._arguments = [roundtrip] if roundtrip else []
        self._process: subprocess.Popen[bytes] | None = None
        self._model_type = ""
        self.deadline = 0.0

    @property
    def stdout(self) -> Any:
        if self._process is None or self._process.stdout is None:
            raise RuntimeError("the child has not been started")
        return self._process.stdout

    def start(self, model_type: str, deadline: float) -> None:
        """Begin to try ``model_type``, in a new process if need be; ``deadline`` is monotonic."""
        self._model_type, self.deadline = model_type, deadline
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter
                [*_command(), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        if self._process.stdin is not None:
            self._process.stdin.write(f"{model_type}\n".encode())
            self._process.stdin.flush()

    def outcome(self, *, timed_out: bool) -> Outcome:
        """What came of the type; a child that hangs or has died is ended."""
        line = b"" if timed_out else self.stdout.readline()
        if line:
            return Outcome(**json.loads(line))
        code = None if timed_out else self._process.wait() if self._process else None
        self.stop()
        reason = "took too long" if code is None else f"the process ended with status {code}"
        return Outcome(self._model_type, "untestable", reason)

    def stop(self) -> None:
        """End the child, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# -- one type -------------------------------------------------------------------------------------


def check_type(model_type: str, roundtrip: Roundtrip | None = None) -> Outcome:
    """Try one type in this process. ``roundtrip`` defaults to the array's bytes and back."""
    from stage_worker import tiny_models
    from stage_worker.hosting import SpanModel
    from stagemesh.errors import ModelRefused
    from stagemesh.topology import Span

    try:
        config = tiny_models.tiny_config(model_type, layers=LAYERS)
        model = tiny_models.build(config)
        whole = SpanModel.from_model(model, config)
        expected = _reference(model, whole.vocab_size)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - one exits if its package is missing
        return Outcome(model_type, "untestable", _brief(error))
    try:
        difference = _disagreement([whole], expected, roundtrip or through_bytes)
        if difference:
            return Outcome(model_type, "wrong", f"as a whole: {difference}")
        for cuts in _cuts(whole.layer_count):
            spans = [Span(a, b) for a, b in itertools.pairwise(cuts)]
            stages = [SpanModel.from_model(model, config, span) for span in spans]
            difference = _disagreement(stages, expected, roundtrip or through_bytes)
            if difference:
                named = ",".join(map(str, spans))
                return Outcome(model_type, "wrong", f"cut {named}: {difference}")
    except ModelRefused as refusal:
        return Outcome(model_type, "refused", refusal.message)
    except Exception as error:  # noqa: BLE001 - anything but a refusal is our mistake
        return Outcome(model_type, "wrong", _brief(error))
    return Outcome(model_type, "exact")


def _cuts(layer_count: int) -> list[tuple[int, ...]]:
    """`CUTS` scaled to the layers the type really has."""
    return [tuple(layer_count * at // LAYERS for at in cuts) for cuts in CUTS]


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]


def _prompt(vocab_size: int) -> list[list[int]]:
    """Token ids of each step: two prefill chunks, then single tokens."""
    total = sum(PREFILL_CHUNKS) + DECODE_STEPS
    ids = [(37 * index + 11) % vocab_size for index in range(total)]
    steps, start = [], 0
    for length in (*PREFILL_CHUNKS, *[1] * DECODE_STEPS):
        steps.append(ids[start : start + length])
        start += length
    return steps


def _reference(model: Any, vocab_size: int) -> list[Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    outputs = []
    for ids in _prompt(vocab_size):
        outputs.append(model(mx.array([ids], mx.int32), cache=cache))
        mx.eval(outputs[-1])
    return outputs


def _disagreement(stages: Sequence[Any], expected: Sequence[Any], roundtrip: Roundtrip) -> str:
    """Empty when the stages give the expected logits bit for bit, else where and by how much
    not."""
    import mlx.core as mx

    caches = [stage.make_cache() for stage in stages]
    for step, ids in enumerate(_prompt(stages[-1].vocab_size)):
        tokens = mx.array([ids], mx.int32)
        hidden = None
        for stage, cache in zip(stages, caches, strict=True):
            hidden = stage.forward(tokens, hidden, cache)
            if not stage.is_last:
                hidden = roundtrip(hidden)
        if hidden is None or not bool(mx.array_equal(hidden, expected[step]).item()):
            return f"step {step} differs by {_largest(hidden, expected[step])}"
    return ""


def _largest(output: Any, expected: Any) -> str:
    import mlx.core as mx

    if output is None or output.shape != expected.shape:
        return "shape"
    distance = mx.abs(output.astype(mx.float32) - expected.astype(mx.float32))
    largest: Any = mx.max(distance).item()
    return f"{float(largest):.3g}"


def through_bytes(array: Any) -> Any:
    """``array`` as a frame's tensor, little-endian row-major bytes, and back."""
    from stage_worker.tensors import to_array, to_tensor

    return to_array(to_tensor(array))


def named_roundtrip(name: str) -> Roundtrip:
    """The function ``module:function``. Raises InvalidConfiguration if there is none."""
    from stagemesh.errors import InvalidConfiguration

    module, _, function = name.partition(":")
    try:
        found: Roundtrip = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidConfiguration(f"{name!r} names no function", setting="roundtrip") from error
    return found


def _serve(arguments: Sequence[str]) -> None:
    """A child: one type a line in, one outcome a line out. Whatever a model prints goes to
    stderr."""
    roundtrip = named_roundtrip(arguments[0]) if arguments else None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        outcome = check_type(line.strip(), roundtrip)
        fields = {name: getattr(outcome, name) for name in Outcome.__slots__}
        answers.write(json.dumps(fields) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1:])
