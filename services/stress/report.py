"""What a run came to: JSON for programs, a page with charts for people, the history for judges."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.stress.charts import Flag, Series, distribution, over_time
from services.stress.history import to_lines
from services.stress.plan import DISRUPTIVE
from services.stress.session import Run
from services.stress.verdict import Life, early_and_late
from stagemesh import __version__

BIN_S = 1.0
"""Width of a bin of throughput and latency."""
VIOLATIONS_SHOWN_MAX = 20
_LOUD = frozenset(name.value for name in DISRUPTIVE)


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """Nearest rank; None of nothing."""
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def to_json(run: Run) -> dict[str, Any]:
    """What ``stress --json`` prints, without the version."""
    seconds = run.recovery_seconds()
    fired = Counter(mark.fault for mark in run.marks if mark.fired)
    ended = [answer for answer in run.answers if answer.ends]
    return {
        "ok": run.ok,
        "seed": run.wanted.seed,
        "duration_s": round(run.faults_ended_at, 3),
        "streams": run.wanted.streams,
        "tokens": sum(len(answer.tokens) for answer in run.answers),
        "answers": {
            "asked": len(run.answers),
            "ended": len(ended),
            "read_again": sum(answer.again is not None for answer in run.answers),
        },
        "faults": {name.value: fired[name.value] for name in run.wanted.plan.faults},
        "faults_planned": dict(Counter(one.fault.value for one in run.injections)),
        "paths": {mark.fault: mark.path for mark in run.marks if mark.path},
        "recoveries": dict(run.causes),
        "recoveries_told": sum(len(end.repairs) for one in run.answers for end in one.ends),
        "lost": run.tally.lost,
        "duplicated": run.tally.duplicated,
        "wrong": run.tally.wrong,
        "hung": run.tally.hung,
        "violations": [str(one) for one in run.tally.violations],
        "replay": run.wanted.command,
        "recovery_seconds": {
            "p50": quantile(seconds, 0.5),
            "p99": quantile(seconds, 0.99),
            "max": seconds[-1] if seconds else None,
        },
        "rss_mib": _held(run, lambda life: life.readings),
        "descriptors": _held(run, lambda life: life.descriptors),
        "threads": _held(run, lambda life: life.threads),
        "client": {"resumes": run.resumes, "asked_again": run.asked_again},
        "counters": dict(sorted(run.counters.items())),
        "network": run.network,
        "model": run.wanted.model.name,
        "stages": run.wanted.stages,
        "environment": run.environment,
    }


def _held(run: Run, of: Callable[[Life], Sequence[float]]) -> dict[str, dict[str, float]]:
    """By the longest life of each process; start and end are medians of a quarter of it."""
    found: dict[str, dict[str, float]] = {}
    for life in sorted(run.lives, key=lambda one: len(one.readings)):
        if of(life):
            start, end = early_and_late(of(life))
            lives = found.get(life.process, {}).get("lives", 0) + 1
            found[life.process] = {"start": round(start, 1), "end": round(end, 1), "lives": lives}
    return dict(sorted(found.items()))


def summary_lines(run: Run) -> list[str]:
    """A few lines for people."""
    facts = to_json(run)
    seconds = facts["recovery_seconds"]
    fired, causes = sum(facts["faults"].values()), run.causes.most_common()
    verdict = "ok" if run.ok else "FAILED"
    head = f"{verdict}: seed {run.wanted.seed}, {facts['model']} over {facts['stages']} stages, "
    asked, ended = facts["answers"]["asked"], facts["answers"]["ended"]
    rate = facts["tokens"] / max(run.ended_at, 1e-9)
    tally = run.tally
    spoilt = f"{tally.lost} lost, {tally.duplicated} duplicated, {tally.wrong} wrong"
    lines = [
        f"{head}{run.wanted.streams} streams, {run.faults_ended_at:.0f} s",
        f"  answers     {ended} of {asked}, {facts['tokens']} tokens, {rate:.1f} a second",
        f"  faults      {fired} fired: {_listed(facts['faults'].items())}",
        f"  recoveries  {_listed(causes) or 'none'}",
        f"  tokens      {spoilt}; {tally.hung} answers hung",
    ]
    if seconds["max"] is not None:
        lines.append(
            f"  recovery    p50 {seconds['p50']:.2f} s, p99 {seconds['p99']:.2f} s, "
            f"longest {seconds['max']:.2f} s"
        )
    if run.network:
        lines.append(f"  packets     {_listed(run.network.items())}")
    shown = run.tally.violations[:VIOLATIONS_SHOWN_MAX]
    lines += [f"  ! {one}" for one in shown]
    if len(run.tally.violations) > len(shown):
        lines.append(f"  ! and {len(run.tally.violations) - len(shown)} more")
    if not run.ok:
        lines.append(f"  seed {run.wanted.seed}; to see it again: {run.wanted.command}")
    return lines


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts)


def write_report(run: Run, folder: Path) -> Path:
    """``stress.md`` with its charts, ``stress.json``, ``history.jsonl``; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"version": __version__, **to_json(run)}
    (folder / "stress.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    history = "\n".join(to_lines(run.answers, run.marks))
    (folder / "history.jsonl").write_text(history + "\n", encoding="utf-8")
    for name, chart in _charts(run).items():
        (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
    page = folder / "stress.md"
    page.write_text(_page(run), encoding="utf-8")
    return page


def _charts(run: Run) -> dict[str, str]:
    flags = [Flag(one.at, f"{one.fault} {one.place}", one.fault in _LOUD) for one in run.marks]
    names = sorted({name for sample in run.samples for name in sample.rss_mib})
    memory = [
        Series(name, [(one.at, one.rss_mib[name]) for one in run.samples if name in one.rss_mib])
        for name in names
    ]
    return {
        "throughput": over_time("tokens a second", "token/s", [_throughput(run)], flags),
        "latency": over_time(
            "time between tokens, median and longest of each second", "s", _gaps(run), flags
        ),
        "recovery": distribution("recovery time", "s", run.recovery_seconds()),
        "memory": over_time("resident memory", "MiB", memory, flags),
    }


def _throughput(run: Run) -> Series:
    bins: Counter[int] = Counter()
    for answer in run.answers:
        for at, count in answer.arrivals():
            bins[int(at / BIN_S)] += count
    last = int(run.ended_at / BIN_S)
    return Series("tokens", [(at * BIN_S, bins[at] / BIN_S) for at in range(last + 1)])


def _gaps(run: Run) -> list[Series]:
    bins: dict[int, list[float]] = {}
    for answer in run.answers:
        times = [at for at, _count in answer.arrivals()]
        for before, after in pairwise(times):
            bins.setdefault(int(after / BIN_S), []).append(after - before)
    middle = [(at * BIN_S, sorted(found)[len(found) // 2]) for at, found in sorted(bins.items())]
    longest = [(at * BIN_S, max(found)) for at, found in sorted(bins.items())]
    return [Series("median", middle), Series("longest", longest)]


def _page(run: Run) -> str:
    lines = ["# Stress run", "", "```", *summary_lines(run), "```", ""]
    lines += [f"Replay: `{run.wanted.command}`", ""]
    if run.tally.violations:
        lines += ["## Violations", "", *(f"- {one}" for one in run.tally.violations), ""]
    lines += ["## Over time", "", "Thick marks: faults that may close a route.", ""]
    charts = ("throughput", "latency", "recovery", "memory")
    lines += [f"![{name}]({name}.svg)\n" for name in charts]
    lines += [
        "## Faults",
        "",
        "| s | fault | where | fired | the mesh's answer |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(run.marks, key=lambda mark: mark.at):
        fired = one.evidence if one.fired else f"**no**: {one.evidence}"
        lines.append(f"| {one.at:.1f} | {one.fault} | {one.place} | {fired} | {one.path} |")
    lines += _lives(run)
    lines += ["", "## Environment", ""]
    lines += [f"- {name}: {value}" for name, value in sorted(run.environment.items())]
    return "\n".join([*lines, ""])


def _lives(run: Run) -> list[str]:
    lines = ["", "## What processes held", "", "At the start → at the end of the longest life.", ""]
    lines += ["| process | lives | MiB | descriptors | threads |", "|---|---|---|---|---|"]
    facts = to_json(run)
    for name, memory in facts["rss_mib"].items():
        cells = [f"{name}", f"{memory['lives']}"]
        for kind in ("rss_mib", "descriptors", "threads"):
            one = facts[kind].get(name, {"start": 0, "end": 0})
            cells.append(f"{one['start']:g} → {one['end']:g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
