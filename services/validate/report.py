"""What came of a validation, for programs, for people, and as files to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coordinator.validation.evidence import RunScore
from services.validate.session import Run, Session

_COLUMNS = (
    "prompt",
    "stages",
    "sampling",
    "situation",
    "prompt tokens",
    "tokens",
    "agreement",
    "max abs Δlogit",
    "mean KL",
    "verdict",
)


@dataclass(frozen=True, slots=True)
class Report:
    """A finished validation. ``problems``: what is wrong beside the runs, such as a worker with
    other weights."""

    session: Session
    environment: Mapping[str, Any]
    problems: tuple[Mapping[str, str], ...] = ()
    calibration: Mapping[str, Any] | None = None
    tau_source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every run is well and nothing else is wrong."""
        return self.session.ok and not self.problems

    def to_json(self) -> dict[str, Any]:
        """The object that ``stagemesh validate --json`` prints."""
        session = self.session
        return {
            "ok": self.ok,
            "mode": "exact" if session.tolerance.exact else "margin",
            "score": round(session.score, 6),
            "tau": session.tolerance.tau,
            "tau_source": self.tau_source,
            "runs": [run_json(run) for run in session.runs],
            "problems": [dict(one) for one in self.problems],
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            "environment": dict(self.environment),
            **self.extra,
        }


def run_json(run: Run) -> dict[str, Any]:
    """One run."""
    verdict = run.verdict
    divergence = verdict.first_divergence
    return {
        "prompt": run.case.name,
        "stages": run.stages,
        "sampling": run.case.sampling,
        "situation": run.situation,
        "ok": verdict.ok,
        "score": round(verdict.score, 6),
        "prompt_tokens": run.prompt_tokens,
        "tokens": verdict.tokens,
        "agreement": verdict.agreement,
        "common_prefix": verdict.common_prefix,
        "first_divergence": None if divergence is None else asdict(divergence),
        "max_abs_dlogit": verdict.max_abs_dlogit,
        "mean_abs_dlogit": verdict.mean_abs_dlogit,
        "mean_kl": verdict.mean_kl,
        "text_agrees": verdict.text_agrees,
        "cache_lengths_agree": verdict.cache_lengths_agree,
        "boundaries_compared": verdict.boundaries_compared,
        "recoveries": list(run.recoveries),
        "problems": list(verdict.problems),
        "culprit": None if verdict.culprit is None else asdict(verdict.culprit),
        "seconds": round(run.seconds, 3),
    }


def markdown(report: Report) -> str:
    """The report as a page."""
    session = report.session
    mode = "exact" if session.tolerance.exact else f"margin (tau {session.tolerance.tau:.3g})"
    failed = [run for run in session.runs if not run.verdict.ok]
    lines = [
        f"# Validation: {'passed' if report.ok else 'FAILED'}",
        "",
        f"Mode {mode}; score {session.score:.6f}; {len(session.runs)} runs, {len(failed)} failed.",
        "",
        *(f"* **{one['component']}**: {one['problem']}" for one in report.problems),
        *(_blame(run) for run in failed),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "|---" * len(_COLUMNS) + "|",
        *(_row(run) for run in session.runs),
        "",
        "## Environment",
        "",
        *(f"* {name}: {value}" for name, value in sorted(report.environment.items())),
    ]
    return "\n".join(lines) + "\n"


def _row(run: Run) -> str:
    verdict = run.verdict
    cells = (
        run.case.name.replace("|", "\\|").replace("\n", " "),
        str(run.stages),
        run.case.sampling,
        run.situation,
        str(run.prompt_tokens),
        str(verdict.tokens),
        f"{verdict.agreement:.4f}",
        f"{verdict.max_abs_dlogit:.3g}",
        f"{verdict.mean_kl:.3g}",
        "ok" if verdict.ok else "**failed**",
    )
    return f"| {' | '.join(cells)} |"


def _blame(run: Run) -> str:
    verdict = run.verdict
    return f"* **{run.case.name}**, {run.situation}: {_reason(verdict)}"


def _reason(verdict: RunScore) -> str:
    text = "; ".join(verdict.problems)
    culprit = verdict.culprit
    if culprit is None:
        return text
    sure = "" if culprit.certain else " (not certain)"
    return (
        f"{text}. Culprit: {culprit.worker or 'unknown'} {culprit.boundary}: {culprit.cause}{sure}"
    )


def summary_lines(report: Report) -> list[str]:
    """A few lines for a terminal."""
    session = report.session
    runs = session.runs
    worst = max((run.verdict.max_abs_dlogit for run in runs), default=0.0)
    tokens = sum(run.verdict.tokens for run in runs)
    agreed = sum(run.verdict.agreement * run.verdict.tokens for run in runs)
    mode = "exact" if session.tolerance.exact else "margin"
    tau = "" if session.tolerance.exact else f", tau {session.tolerance.tau:.3g}"
    agreement = agreed / max(1, tokens)
    lines = [
        f"{'PASSED' if report.ok else 'FAILED'}: {mode} mode{tau}; score {session.score:.6f}",
        f"  {len(runs)} runs, {tokens} tokens; agreement {agreement:.6f}, |Δlogit| ≤ {worst:.3g}",
    ]
    lines += [f"  {one['component']}: {one['problem']}" for one in report.problems]
    lines += [
        f"  {run.case.name} [{run.case.sampling}] {run.stages} stages, {run.situation}: "
        f"{_reason(run.verdict)}"
        for run in runs
        if not run.verdict.ok
    ]
    if report.calibration:
        lines.append(f"  calibrated tau {report.calibration['tau']:.4g}")
    return lines


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """``validate.md`` and ``validate.json`` in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "validate.md", folder / "validate.json"
    page.write_text(markdown(report), encoding="utf-8")
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    data.write_text(text + "\n", encoding="utf-8")
    return page, data
