"""A run as JSON, as a page, and as pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "decode_single": "One stream, decoding",
    "ttft_512": "First token, 512-token prompt",
    "ttft_1024": "First token, 1,024-token prompt",
    "prefill_1024": "Prefill, 1,024 tokens",
    "batch_16": "16 streams of mixed lengths",
    "batch_32": "32 streams of mixed lengths",
    "admission_gap": "Worst pause while a 1,000-token prompt is admitted",
    "overhead_integrity": "Integrity checks",
    "overhead_numeric": "Numeric checks",
    "overhead_tracing": "Tracing, default sampling",
    "overhead_shadow": "Shadow verification, asked for",
    "coordinator_tokens": "Coordinator alone, 256 streams",
    "coordinator_tokens_per_cpu_s": "Coordinator alone, per second of its CPU time",
    "coordinator_latency_p99": "Coordinator, added latency per token, p99",
    "idle_streams_1000": "Active streams' p99 beside 1,000 idle ones",
    "failover_gap_sigkill": "Pause when a stage is killed",
    "failover_gap_sigstop": "Pause when a stage is stopped",
}
_SHOWN_FACTS = (
    "model",
    "dtype",
    "blas",
    "spans",
    "threads_per_stage",
    "threads_baseline",
    "cores",
    "platform",
    "python",
    "mlx",
    "mlx_lm",
    "grpcio",
    "load_before",
)


def title_of(name: str) -> str:
    """A result's name for people."""
    return TITLES.get(name, name.replace("_", " "))


def base_environment() -> dict[str, Any]:
    """What is true of the machine whatever suite runs: versions, cores, and how busy it was."""
    from stage_worker import machine

    facts = machine.describe_environment()
    facts["machine"] = platform.machine()
    facts["load_before"] = round(os.getloadavg()[0], 2)
    return facts


def figure(value: float | None, unit: str = "") -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def line_of(result: Mapping[str, Any]) -> str:
    """One result for a terminal."""
    if result.get("error"):
        return f"{result['name']:<30} failed: {result['error']}"
    parts = [f"{result['name']:<30} {figure(result['ours'], result['unit']):>22}"]
    if result["baseline"] is not None:
        parts.append(f"against {figure(result['baseline'])}: ratio {figure(result['ratio'])}")
    if result["spread"] is not None:
        parts.append(f"± {100 * result['spread']:.0f} %")
    if "met" in result:
        parts.append(f"[{result['target']}: {'met' if result['met'] else 'MISSED'}]")
    return "  ".join(parts)


_PREFACE = """\
Written by `stagemesh bench --write docs/benchmarks.md` from one run. Ratio is ours ÷ bare mlx-lm,
the median over neighbouring turns taken alternately in the same run, with the same weights, dtype,
BLAS and total number of threads; spread is the distance of the quartiles ÷ the median. Overheads
are upper bounds: every check's whole CPU time, against the shortest decode step seen."""


def page(document: Mapping[str, Any]) -> str:
    """``docs/benchmarks.md`` from a run."""
    results: Sequence[Mapping[str, Any]] = document["results"]
    lines = [
        "# Benchmarks",
        "",
        _PREFACE,
        "",
        *_environment(document["environment"]),
        "",
        "| what | ours | mlx-lm | ratio | spread | target | |",
        "|---|---|---|---|---|---|---|",
        *[_row(result) for result in results],
        "",
        *_commentary(results, document["environment"]),
        *_notes(results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _environment(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name.replace('_', ' ')} | {facts[name]} |" for name in _SHOWN_FACTS if name in facts
    ]
    return ["## Where", "", "| | |", "|---|---|", *rows, "", "## What"]


def _row(result: Mapping[str, Any]) -> str:
    spread = "–" if result["spread"] is None else f"{100 * result['spread']:.0f} %"
    verdict = ""
    if result.get("error"):
        verdict = "failed"
    elif "met" in result:
        verdict = "met" if result["met"] else "**missed**"
    cells = (
        title_of(result["name"]),
        figure(result["ours"], result["unit"]),
        figure(result["baseline"]),
        figure(result["ratio"]),
        spread,
        result.get("target", "–"),
        verdict,
    )
    return f"| {' | '.join(cells)} |"


def _commentary(results: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """What a reader should not have to work out."""
    judged = [result for result in results if "met" in result and not result.get("error")]
    missed = [result for result in judged if not result["met"]]
    failed = [result for result in results if result.get("error")]
    lines = ["## In words", "", f"{len(judged) - len(missed)} of {len(judged)} targets are met."]
    lines += [_missed(result) for result in missed]
    lines += [f"* **Failed:** {title_of(one['name'])}: {one['error']}" for one in failed]
    noisy = [title_of(one["name"]) for one in results if (one["spread"] or 0.0) > 0.25]
    if noisy:
        lines.append(f"* Spread over 25 %, so to be read with care: {'; '.join(noisy)}.")
    if facts.get("load_before", 0.0) > 0.5:
        lines.append(
            f"* The machine was not idle when this run began (load {facts['load_before']}): "
            "absolute figures are too low, ratios less so."
        )
    return [*lines, ""]


def _missed(result: Mapping[str, Any]) -> str:
    ratio = "" if result["ratio"] is None else f" (ratio {figure(result['ratio'])})"
    return (
        f"* **Missed:** {title_of(result['name'])} is {figure(result['ours'], result['unit'])}"
        f"{ratio}; the target is {result['target']}."
    )


def _notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [f"* {title_of(one['name'])}: {one['note']}" for one in results if one.get("note")]
    return ["## Notes", "", *notes] if notes else []


def plot(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """SVG bars of every ratio and every target, written into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    shown = [one for one in document["results"] if one["ratio"] is not None]
    path = directory / "ratios.svg"
    path.write_text(_bars(shown), encoding="utf-8")
    samples = [one for one in document["results"] if one.get("samples")]
    other = directory / "samples.svg"
    other.write_text(_dots(samples), encoding="utf-8")
    return [path, other]


_WIDTH, _LABEL, _ROW_HEIGHT = 860, 360, 26


def _svg(rows: int, body: Sequence[str]) -> str:
    height = rows * _ROW_HEIGHT + 50
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">'
    )
    paper = f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, paper, *body, "</svg>"]) + "\n"


def _bars(results: Sequence[Mapping[str, Any]]) -> str:
    """One bar per ratio; the line is equality with mlx-lm."""
    top = max([1.5, *(one["ratio"] for one in results)])
    scale = (_WIDTH - _LABEL - 70) / top
    body = ['<text x="10" y="24">ours ÷ mlx-lm (line: equal)</text>']
    for index, one in enumerate(results):
        y = 40 + index * _ROW_HEIGHT
        better = (one["ratio"] >= 1) is one["higher_is_better"]
        colour = "#3a7d44" if better else "#b8562f"
        width = one["ratio"] * scale
        body += [
            f'<text x="10" y="{y + 14}">{title_of(one["name"])}</text>',
            f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>',
            f'<text x="{_LABEL + width + 6:.1f}" y="{y + 14}">{figure(one["ratio"])}</text>',
        ]
    equal = _LABEL + scale
    bottom = 40 + len(results) * _ROW_HEIGHT
    body.append(f'<path d="M{equal:.1f} 34V{bottom}" stroke="black" stroke-dasharray="4 3"/>')
    return _svg(len(results), body)


def _dots(results: Sequence[Mapping[str, Any]]) -> str:
    """Every sample, relative to the median of ours: how much a figure moved within the run."""
    body = ['<text x="10" y="24">samples ÷ median of ours (hollow: mlx-lm)</text>']
    scale = (_WIDTH - _LABEL - 40) / 2.0
    for index, one in enumerate(results):
        y = 40 + index * _ROW_HEIGHT + 9
        body.append(f'<text x="10" y="{y + 5}">{title_of(one["name"])}</text>')
        for side, fill in (("ours", "#24527a"), ("baseline", "none")):
            for value in one["samples"].get(side, ()):
                share = min(2.0, value / one["ours"]) if one["ours"] else 0.0
                body.append(
                    f'<circle cx="{_LABEL + max(0.0, share) * scale:.1f}" cy="{y}" r="4" '
                    f'fill="{fill}" stroke="#24527a"/>'
                )
    return _svg(len(results), body)
