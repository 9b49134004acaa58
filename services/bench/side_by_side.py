"""Several ways to run one model, measured in turns: the arithmetic and the table. No I/O.

Every *side* (one process or several of one system) does the same work in every round, one side
after the other, A B C A B C …, so that what else the machine does hits all of them. A figure is the
median of a side's rounds. What splitting a model costs is the median, over the rounds, of the ratio
of a system's split side to its whole one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.bench.results import spread_of


@dataclass(frozen=True, slots=True)
class Task:
    """What every side is asked to do. More per second is better, whatever it is."""

    name: str
    title: str
    unit: str = "tokens/s"


@dataclass(slots=True)
class Rounds:
    """Samples of one comparison: ``samples[task][side]``, one a round, same length everywhere."""

    sides: tuple[str, ...]
    pairs: Mapping[str, tuple[str, str]]
    """For each system its side over several processes and its side in one."""
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, task: Task, side: str, value: float) -> None:
        """One side has done one task once."""
        self.samples.setdefault(task.name, {}).setdefault(side, []).append(value)

    def document(
        self, label: str, tasks: Sequence[Task], facts: Mapping[str, Any], notes: Sequence[str] = ()
    ) -> dict[str, Any]:
        """As it is saved in a run, under ``side_by_side``."""
        return {
            "label": label,
            "sides": list(self.sides),
            "rows": [self._row(task) for task in tasks if task.name in self.samples],
            "split_over_whole": [
                {"system": system, **self._ratios(split, whole)}
                for system, (split, whole) in self.pairs.items()
            ],
            "facts": dict(facts),
            "notes": list(notes),
        }

    def _row(self, task: Task) -> dict[str, Any]:
        seen = self.samples[task.name]
        return {
            "name": task.name,
            "title": task.title,
            "unit": task.unit,
            "values": {side: round(statistics.median(seen[side]), 3) for side in self.sides},
            "spread": {side: _rounded(spread_of(seen[side])) for side in self.sides},
            "samples": {side: [round(value, 3) for value in seen[side]] for side in self.sides},
        }

    def _ratios(self, split: str, whole: str) -> dict[str, float]:
        return {
            name: round(
                statistics.median(
                    a / b for a, b in zip(seen[split], seen[whole], strict=True) if b > 0
                ),
                3,
            )
            for name, seen in self.samples.items()
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def section(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """The part of the page that shows them, as Markdown lines."""
    lines = ["## Beside llama.cpp", "", _PREFACE, ""]
    for one in comparisons:
        lines += [f"### {one['label']}", "", *_figures(one), "", *_splitting(one), ""]
        lines += [f"* {name}: {value}" for name, value in one["facts"].items()]
        lines += [f"* {note}" for note in one["notes"]]
        lines.append("")
    return lines


_PREFACE = """\
Written by `scripts/compare_llama_cpp.py`: the same weights, the same prompts as token ids and the
same number of cores, every system through its own server and a client on the same machine, in
turns. Two things to keep in mind. llama.cpp computes on the weights as the file stores them;
mlx-lm and stagemesh unpack them to f32 on a CPU, so where the file is quantized they read several
times the memory for every token. And a split model has as many threads as a whole one: two
processes with one each, or one process with two."""


def _figures(one: Mapping[str, Any]) -> list[str]:
    sides = one["sides"]
    lines = [f"| | {' | '.join(sides)} |", f"|---|{'---|' * len(sides)}"]
    for row in one["rows"]:
        cells = [_cell(row["values"][side], row["spread"][side]) for side in sides]
        lines.append(f"| {row['title']}, {row['unit']} | {' | '.join(cells)} |")
    return lines


def _cell(value: float, spread: float | None) -> str:
    text = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return text if spread is None else f"{text} ± {100 * spread:.0f} %"


def _splitting(one: Mapping[str, Any]) -> list[str]:
    rows = one["rows"]
    lines = [
        f"| split ÷ whole | {' | '.join(row['title'] for row in rows)} |",
        f"|---|{'---|' * len(rows)}",
    ]
    for ratios in one["split_over_whole"]:
        cells = [f"{ratios[row['name']]:.2f}" for row in rows]
        lines.append(f"| {ratios['system']} | {' | '.join(cells)} |")
    return lines
