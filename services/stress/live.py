"""What is shown while a run goes on: a table on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from services.stress.session import Run

LINE_S = 5.0
REFRESH_S = 0.5
WINDOW_S = 10.0
"""Tokens a second are those of this long."""
MARKS_SHOWN = 8


async def lines(run: Run, say: Callable[[str], None]) -> None:
    """For ever: one line at a time."""
    while True:
        await asyncio.sleep(LINE_S)
        if run.phase != "preparing":
            say(line(run))


def line(run: Run) -> str:
    """The run in one line."""
    facts = numbers(run)
    return f"{run.clock():6.1f} s {run.phase}: " + ", ".join(
        f"{value} {name}" for name, value in facts.items()
    )


def numbers(run: Run) -> dict[str, str]:
    """What is counted, as it is shown."""
    ended = sum(bool(answer.ends) for answer in run.answers)
    wrong = sum(_wrong(run, answer) for answer in run.answers[-64:])
    violations = len(run.tally.violations) + wrong
    return {
        "token/s": f"{_rate(run):.0f}",
        "answers": f"{ended}/{len(run.answers)}",
        "faults": f"{sum(mark.fired for mark in run.marks)}/{len(run.injections)}",
        "recoveries": str(sum(run.causes.values())),
        "violations": str(violations),
    }


def _wrong(run: Run, answer: Any) -> bool:
    """An answer that has already gone wrong."""
    got = answer.tokens
    return got != list(run.expected[answer.question][: len(got)]) or bool(answer.error)


def _rate(run: Run) -> float:
    now, samples = run.clock(), run.samples
    inside = [sample for sample in samples if sample.at >= now - WINDOW_S]
    if len(inside) < 2 or inside[-1].at <= inside[0].at:
        return 0.0
    return (inside[-1].tokens - inside[0].tokens) / (inside[-1].at - inside[0].at)


async def table(run: Run) -> None:
    """For ever: a table on the terminal's standard error."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, transient=True) as live:
        while True:
            live.update(render(run))
            await asyncio.sleep(REFRESH_S)


def render(run: Run) -> Any:
    """The table as it stands."""
    from rich.table import Table

    shown = Table(title=f"stress, seed {run.wanted.seed}: {run.phase}, {run.clock():.0f} s")
    for heading in ("fault", "fired", "last: where", "evidence", "the mesh's answer"):
        shown.add_column(heading)
    fired = Counter(mark.fault for mark in run.marks if mark.fired)
    last = {mark.fault: mark for mark in run.marks}
    recent = sorted(last.values(), key=lambda mark: mark.at)[-MARKS_SHOWN:]
    for mark in recent:
        shown.add_row(mark.fault, str(fired[mark.fault]), mark.place, mark.evidence, mark.path)
    shown.caption = ", ".join(f"{value} {name}" for name, value in numbers(run).items())
    return shown
