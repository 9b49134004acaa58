"""Every fault class over every stream: who noticed, and who cried wolf.

*Harmful* is a stream whose emitted tokens differ from the undisturbed ones, as far as it came: one
that a refusal cut short with every token right is not. Recall of a tier is its share of the harmful
streams of a class. A *false alarm* is a clean stream on which a tier fired.

The shadow's own verdict (``CorruptionDetector.check_scores``) decides at the tolerance that is set;
for the curve, other tolerances are applied afterwards to the gaps that were measured once, so that
all of it costs one run. Two counts are kept apart there: mismatches among clean tokens (what a
tolerance has to be above) and harmful streams without any gap above it (what it then misses).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.corruption_detector import CorruptionDetector, Tier
from coordinator.text_signals import TextSignals
from services.detect.streams import Company, Demand, Outcome, StreamRun, Trouble
from stage_worker.detect.faults import FAULTS, Fault
from stage_worker.detect.rig import Rig
from stagemesh.frame import Score
from stagemesh.sampling import SamplingSpec

TIER_NAMES = {
    Tier.TRANSPORT: "T0",
    Tier.PROTOCOL: "T1",
    Tier.ENVELOPE: "T2",
    Tier.SHADOW: "T3",
    Tier.TEXT: "T4",
}
TOLERANCES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5)
"""Points of the curve, logits."""
PROMPT_TOKENS = (3, 24)
RELABELLED_LATEST = 3
"""A fault begins at least so many tokens before the end, so that its effect can be seen."""


@dataclass(slots=True)
class Tally:
    """One fault class. ``recalled`` by tier; ``gaps``: of each harmful stream, its largest."""

    name: str
    streams: int = 0
    harmful: int = 0
    noticed: dict[Tier, int] = field(default_factory=dict)
    recalled: dict[Tier, int] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)

    def recall(self, tier: Tier) -> float | None:
        """Share of harmful streams on which ``tier`` fired; None without any."""
        return self.recalled.get(tier, 0) / self.harmful if self.harmful else None

    def as_json(self) -> dict[str, Any]:
        found = {name: self.recall(tier) for tier, name in TIER_NAMES.items()}
        return {
            "name": self.name,
            "streams": self.streams,
            "harmful": self.harmful,
            "recall": {n: None if r is None else round(r, 4) for n, r in found.items()},
            "noticed": {n: self.noticed.get(tier, 0) for tier, n in TIER_NAMES.items()},
        }


@dataclass(slots=True)
class Measurement:
    """Everything a run found out."""

    tolerance: float
    classes: list[Tally] = field(default_factory=list)
    clean_streams: int = 0
    clean_tokens: int = 0
    clean_gaps: list[float] = field(default_factory=list)
    """Gap of every clean token the reference would not have chosen."""
    false_alarms: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))

    @property
    def harmful(self) -> int:
        return sum(tally.harmful for tally in self.classes)

    def recall(self, tier: Tier) -> float | None:
        """Over all classes."""
        found = sum(tally.recalled.get(tier, 0) for tally in self.classes)
        return found / self.harmful if self.harmful else None

    def curve(self) -> list[dict[str, float]]:
        """Recall and false alarms of the shadow for each tolerance."""
        gaps = [gap for tally in self.classes for gap in tally.gaps]
        return [
            {
                "tolerance": tolerance,
                "recall": round(_share(sum(_is_over(g, tolerance) for g in gaps), len(gaps)), 4),
                "false_alarm_tokens": sum(_is_over(g, tolerance) for g in self.clean_gaps),
            }
            for tolerance in TOLERANCES
        ]

    def as_json(self) -> dict[str, Any]:
        overall = {name: self.recall(tier) for tier, name in TIER_NAMES.items()}
        return {
            "classes": [tally.as_json() for tally in self.classes],
            "harmful": self.harmful,
            "recall": {n: None if r is None else round(r, 4) for n, r in overall.items()},
            "clean_streams": self.clean_streams,
            "clean_tokens": self.clean_tokens,
            "clean_gap_max": max(self.clean_gaps, default=0.0),
            "false_alarms": {TIER_NAMES[tier]: n for tier, n in self.false_alarms.items()},
            "tolerance": self.tolerance,
            "curve": self.curve(),
        }


class Detection:
    """Runs the measurement. ``decode`` turns token ids into text, for the signals of tier 4.
    ``prompts``: streams begin with beginnings of these, without any with random tokens."""

    def __init__(
        self,
        rig: Rig,
        *,
        decode: Callable[[Sequence[int]], str],
        streams: int,
        tokens: int,
        tolerance: float,
        seed: int,
        prompts: Sequence[Sequence[int]] = (),
    ) -> None:
        self._rig, self._decode = rig, decode
        self._tolerance, self._seed, self._prompts = tolerance, seed, prompts
        self.demands = [self._demand(number, tokens) for number in range(1, streams + 1)]
        self._clean: list[Outcome] = []
        self.result = Measurement(tolerance)

    def _demand(self, number: int, tokens: int) -> Demand:
        draw = random.Random(self._seed * 1_000_003 + number)  # noqa: S311 - repeatable on purpose
        size = draw.randint(*PROMPT_TOKENS)
        if self._prompts:
            prompt = tuple(draw.choice(self._prompts)[:size])
        else:
            prompt = tuple(draw.randrange(self._rig.vocab_size) for _ in range(size))
        temperature = 0.7 if number % 2 else 0.0
        return Demand(number, prompt, SamplingSpec(temperature=temperature, seed=number), tokens)

    def run(
        self,
        faults: Sequence[Fault] = FAULTS,
        *,
        clean_tokens: int = 0,
        side_by_side: int = 1,
        progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ) -> Measurement:
        """Clean streams first, then more of them, ``side_by_side``, up to ``clean_tokens``; then
        each class."""
        for demand in self.demands:
            outcome = StreamRun(self._rig, demand).run()
            self._clean.append(outcome)
            self._count_clean(demand, outcome)
        count = self.demands[0].count
        while self.result.clean_tokens < clean_tokens:
            progress("clean", self.result.clean_tokens, clean_tokens)
            first = 1000 + self.result.clean_streams
            demands = [self._demand(first + index, count) for index in range(side_by_side)]
            for demand, outcome in zip(demands, Company(self._rig, demands).run(), strict=True):
                self._count_clean(demand, outcome)
        for index, fault in enumerate(faults):
            progress(fault.name, index, len(faults))
            self.result.classes.append(self._class(fault))
        return self.result

    def _class(self, fault: Fault) -> Tally:
        tally = Tally(fault.name)
        for index, demand in enumerate(self.demands):
            clean = self._clean[index]
            draw = random.Random(f"{self._seed} {fault.name} {index}")  # noqa: S311
            last_hop = len(self._rig.stages) - 1
            behind_hop = fault.wire or fault.sealed or fault.output
            trouble = Trouble(
                fault,
                at=draw.randrange(2, demand.count - RELABELLED_LATEST),
                stage=draw.randrange(last_hop if behind_hop else last_hop + 1),
                draw=draw,
                other=self._clean[index - 1],
            )
            if fault.name == "skipped stage":
                trouble.stage = min(1, last_hop - 1)  # the first has nothing to pass on
            outcome = StreamRun(self._rig, demand, trouble).run()
            self._judge(tally, demand, clean, outcome)
        return tally

    def _judge(self, tally: Tally, demand: Demand, clean: Outcome, outcome: Outcome) -> None:
        tally.streams += 1
        gaps = self._shadow(demand, outcome)
        if self._signals(outcome.tokens):
            outcome.fired.add(Tier.TEXT)
        for tier in outcome.fired:
            tally.noticed[tier] = tally.noticed.get(tier, 0) + 1
        if outcome.tokens == clean.tokens[: len(outcome.tokens)]:
            return
        tally.harmful += 1
        tally.gaps.append(self._in_logits(demand, max(gaps, default=-1.0)))
        for tier in outcome.fired:
            tally.recalled[tier] = tally.recalled.get(tier, 0) + 1

    def _count_clean(self, demand: Demand, outcome: Outcome) -> None:
        result = self.result
        result.clean_streams += 1
        result.clean_tokens += len(outcome.tokens)
        gaps = self._shadow(demand, outcome)
        result.clean_gaps += [self._in_logits(demand, gap) for gap in gaps]
        if self._signals(outcome.tokens):
            outcome.fired.add(Tier.TEXT)
        for tier in outcome.fired:
            result.false_alarms[tier] += 1

    def _shadow(self, demand: Demand, outcome: Outcome) -> list[float]:
        """Has the shadow judge a stream; returns the gaps of the emitted tokens that the full model
        would not have chosen."""
        if not outcome.tokens:
            return []
        scores: Sequence[Score] = self._rig.scores(
            demand.request, demand.prompt, demand.spec, outcome.tokens
        )
        verdict, _ = CorruptionDetector().check_scores(
            scores,
            outcome.tokens,
            first_position=len(demand.prompt),
            worker=self._rig.names[-1],
            request=demand.request,
            tolerance=self._tolerance_of(demand),
        )
        if not verdict.agrees or verdict.checked < len(outcome.tokens):
            outcome.fired.add(Tier.SHADOW)
        if len(scores) != len(outcome.tokens):
            return [math.inf]
        return [one.gap for one in scores if one.token_id != one.reference_token_id]

    def _tolerance_of(self, demand: Demand) -> float:
        """In the unit of the stream's scores."""
        temperature = demand.spec.temperature
        return self._tolerance / temperature if temperature else self._tolerance

    def _in_logits(self, demand: Demand, gap: float) -> float:
        return gap * (demand.spec.temperature or 1.0)

    def _signals(self, tokens: Sequence[int]) -> bool:
        signals = TextSignals()
        signals.observe(self._decode(tokens), tokens)
        return bool(signals.read().signals)


def _is_over(gap: float, tolerance: float) -> bool:
    """A gap of a token the reference did not choose. -1: it chose every token."""
    return gap >= 0.0 and (gap > tolerance or tolerance == 0.0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
