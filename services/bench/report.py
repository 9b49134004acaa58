"""A run as lines for a terminal, and as a page."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.bench import side_by_side
from services.bench.results import TARGETS

TITLES = {
    "decode_single": "One stream, decoding",
    "ttft_512": "First token, 512-token prompt",
    "ttft_1024": "First token, 1,024-token prompt",
    "prefill_1024": "Prefill, 1,024 tokens",
    "batch_16": "16 streams of mixed lengths",
    "batch_32": "32 streams of mixed lengths",
    "admission_gap": "Worst pause while a 1,000-token prompt is admitted",
    "overhead_switched": "All checks on and off in turn, whole step",
    "overhead_switched_apart": "All checks on and off in turn, step without its forwards",
    "decode_step_switched": "Decode step, checks on against checks off",
    "overhead_checks": "Integrity and numeric checks alone, together",
    "overhead_integrity": "Integrity checks alone",
    "overhead_numeric": "Numeric checks alone",
    "overhead_tracing": "Tracing, default sampling",
    "overhead_shadow": "Sampled shadow verification",
    "overhead_counted": "Checks, by the mesh's own counters",
    "overhead_shadow_asked": "Shadow verification, asked for",
    "codec_encode_decode_frame": "Encoding a frame, decode step",
    "codec_decode_decode_frame": "Decoding a frame, decode step",
    "codec_encode_prefill_frame": "Encoding a frame, prefill of 128",
    "codec_decode_prefill_frame": "Decoding a frame, prefill of 128",
    "checksum_2304_bytes": "CRC32C of one token's activation, 2,304 bytes",
    "checksum_1_mib": "CRC32C of 1 MiB",
    "coordinator_tokens": "Coordinator alone, 256 streams",
    "coordinator_tokens_per_cpu_s": "Coordinator alone, per second of its CPU time",
    "coordinator_linear": "Coordinator's tokens per CPU second, four times the streams",
    "coordinator_latency_p99": "Coordinator, added latency per token, p99",
    "coordinator_latency_p99_whole": "Coordinator, the same p99 with all begins and ends",
    "coordinator_latency_worst": "Coordinator, longest added latency of a token",
    "idle_streams_1000": "Active streams' p99 beside 1,000 idle ones",
    "memory_growth": "Memory that a thousand more requests add",
    "failover_gap_sigkill": "Longest pause when a stage is killed",
    "failover_notice_sigkill": "Until a killed stage is given up",
    "failover_gap_sigstop": "Longest pause when a stage is stopped",
    "failover_notice_sigstop": "Until a stopped stage is given up",
}
_SHOWN_FACTS = (
    "taken_on",
    "model",
    "dtype",
    "blas",
    "spans",
    "threads_per_stage",
    "threads_baseline",
    "cores",
    "cpu",
    "platform",
    "python",
    "python_build",
    "mlx",
    "mlx_lm",
    "grpcio",
    "load_before",
)


OTHERS_MAX = 0.05
"""Share of the machine that others may use before a figure is said to have been disturbed."""


def title_of(name: str) -> str:
    """A result's name for people."""
    return TITLES.get(name, name.replace("_", " "))


def base_environment() -> dict[str, Any]:
    """What is true of the machine whatever suite runs: versions, cores, and how busy it was."""
    from stage_worker import machine

    facts = machine.describe_environment()
    facts["machine"] = platform.machine()
    facts["cpu"] = _cpu()
    facts["load_before"] = round(os.getloadavg()[0], 2)
    facts["taken_on"] = time.strftime("%Y-%m-%d", time.gmtime())
    return facts


def _cpu() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def figure(value: float | None, unit: str = "") -> str:
    """A number as people read it."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def _ours(result: Mapping[str, Any]) -> str:
    """Our figure, and the interval it lies in where there is one."""
    text = figure(result["ours"], result["unit"])
    if not result.get("interval"):
        return text
    low, high = result["interval"]
    return f"{text} ({figure(low)} to {figure(high)})"


def line_of(result: Mapping[str, Any]) -> str:
    """One result for a terminal."""
    if result.get("error"):
        return f"{result['name']:<30} failed: {result['error']}"
    parts = [f"{result['name']:<30} {_ours(result):>22}"]
    if result["baseline"] is not None:
        parts.append(f"against {figure(result['baseline'])}: ratio {figure(result['ratio'])}")
    if result["spread"] is not None:
        parts.append(f"± {100 * result['spread']:.0f} %")
    if "met" in result:
        parts.append(f"[{result['target']}: {'met' if result['met'] else 'MISSED'}]")
    if result.get("others_cpu", 0.0) > OTHERS_MAX:
        parts.append(f"(others used {100 * result['others_cpu']:.0f} % of the machine)")
    return "  ".join(parts)


_PREFACE = """\
Written by `stagemesh bench --from RUN… --write docs/benchmarks.md` from saved runs, which are in
`docs/benchmarks/runs`; nothing here is typed by hand, and a test writes it again and compares. To
repeat it on an idle machine:

```
cd docs/benchmarks/runs
for suite in single,prefill batch overhead coordinator failover; do
  stagemesh bench --suite $suite --json > $suite.json
done
stagemesh bench --suite memory --model tiny --json > memory.json
python ../../../scripts/compare_llama_cpp.py --llama-server … --rpc-server … > llama.json
cd ../../..
stagemesh bench --from docs/benchmarks/runs/*.json --write docs/benchmarks.md --plot docs/benchmarks
```

Ratio is ours ÷ baseline, the median over neighbouring turns that were taken alternately in one run.
The baseline is bare mlx-lm in one process, with the same weights, dtype, BLAS and total number of
threads (for the active streams beside idle ones: the same streams without them). Spread is the
distance of the quartiles ÷ the median. Others is the share of the machine's CPU time that other
processes took meanwhile: what disturbed the figure. Goals were set before anything was measured.

What the checks cost is measured three times. *On and off in turn*: on live streams of a mesh in one
process of the benchmark, with and without them in neighbouring steps; the median difference, with
the interval it lies in with 95 %, all of which has to keep the goal. *Alone*: the CPU time of each
check by itself, repeated, against the shortest decode step of bare mlx-lm. There everything a check
touches is in the cache, so that is the work it is, and less than it costs behind a forward that has
read every weight. *By the mesh's own counters*: CPU time of what receivers and first stages check,
where they check it, over ordinary streams. The mesh itself cannot be told to leave a check out."""


def page(document: Mapping[str, Any], plots: Sequence[str] = ()) -> str:
    """``docs/benchmarks.md`` from a run; ``plots`` are links to its pictures."""
    results: Sequence[Mapping[str, Any]] = document["results"]
    promised = [one for one in results if "target" in one]
    others = [one for one in results if "target" not in one]
    lines = ["# Benchmarks", "", _PREFACE, "", *_environment(document["environment"])]
    lines += ["## Goals and figures", "", *_table(promised), ""]
    lines += _commentary(results, document)
    lines += ["## Also measured", "", *_table(others), ""] if others else []
    if document.get("side_by_side"):
        lines += side_by_side.section(document["side_by_side"])
    lines += ["## Pictures", "", *[f"![]({link})" for link in plots], ""] if plots else []
    lines += _notes(results)
    return "\n".join(lines).rstrip() + "\n"


def _table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    head = [
        "| what | ours | baseline | ratio | spread | others | goal | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return [*head, *[_row(result) for result in results]]


def _environment(facts: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {name.replace('_', ' ')} | {facts[name]} |" for name in _SHOWN_FACTS if name in facts
    ]
    return ["## Where", "", "| | |", "|---|---|", *rows, ""]


def _row(result: Mapping[str, Any]) -> str:
    spread = "–" if result["spread"] is None else f"{100 * result['spread']:.0f} %"
    others = "–" if result.get("others_cpu") is None else f"{100 * result['others_cpu']:.0f} %"
    cells = (
        title_of(result["name"]),
        _ours(result),
        figure(result["baseline"]),
        figure(result["ratio"]),
        spread,
        others,
        result.get("target", "–"),
        _verdict(result),
    )
    return f"| {' | '.join(cells)} |"


def _verdict(result: Mapping[str, Any]) -> str:
    if result.get("error"):
        return "failed"
    if "met" not in result:
        return ""
    if not result["met"]:
        return "**missed**"
    return {True: "met, aim too", False: "met, aim not"}.get(result.get("aim_met", None), "met")


def _commentary(results: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> list[str]:
    """What a reader should not have to work out."""
    judged = [result for result in results if "met" in result and not result.get("error")]
    missed = [result for result in judged if not result["met"]]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} goals are met.", ""]
    lines += [_missed(result) for result in missed]
    lines += [
        f"* **Failed:** {title_of(one['name'])}: {one['error']}"
        for one in results
        if one.get("error")
    ]
    there = {one["name"] for one in results}
    missing = [title_of(name) for name in TARGETS if name not in there]
    if missing:
        lines.append(
            f"* **Not measured** in these runs, though there is a goal: {'; '.join(missing)}."
        )
    noisy = [title_of(one["name"]) for one in results if abs(one["spread"] or 0.0) > 0.25]
    if noisy:
        lines.append(f"* Spread over 25 %, so to be read with care: {'; '.join(noisy)}.")
    busiest = max((one.get("others_cpu") or 0.0 for one in results), default=0.0)
    if busiest > OTHERS_MAX:
        lines.append(
            f"* **The machine was not quiet:** other processes used up to {100 * busiest:.0f} % of "
            "it while these figures were taken (column *others*). Absolute figures are too low by "
            "as much and more; ratios suffer less, as both sides were disturbed in turn."
        )
    if document.get("quick"):
        lines.append("* **Quick sizes:** this run shows that everything works, not how fast it is.")
    return [*lines, ""]


def _missed(result: Mapping[str, Any]) -> str:
    ratio = "" if result["ratio"] is None else f" (ratio {figure(result['ratio'])})"
    return (
        f"* **Missed:** {title_of(result['name'])} is {_ours(result)}"
        f"{ratio}; the goal is {result['target']}."
    )


def _notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [f"* {title_of(one['name'])}: {one['note']}" for one in results if one.get("note")]
    return ["## Notes", "", *notes] if notes else []
