"""Plays cases through the mesh and the reference, and collects verdicts.

A run that fails in margin mode is asked again, alone: then both sides compute in the same shapes,
so that on equal machines the boundaries' digests agree up to the one that is wrong.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.validation.evidence import Culprit, Observation, RunScore, StagePlace, Tolerance
from coordinator.validation.scoring import overall_score, score_run
from services.client import MeshClient
from services.validate.cases import Case
from services.validate.mesh_side import observe
from services.validate.reference_side import ReferenceSide

_SHAPES = (
    "; the first boundary is the first that differs, so another matrix library than the "
    "reference's, or company on the mesh, would look the same: run with --deterministic to be "
    "certain"
)

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One answer and what came of it. ``situation``: alone, together, or the failover point."""

    case: Case
    stages: int
    situation: str
    prompt_tokens: int
    verdict: RunScore
    seconds: float
    recoveries: tuple[str, ...] = ()


@dataclass(slots=True)
class Session:
    """Everything of one validation. ``every_boundary``: the cuts of all routes that will be
    tried. ``chunk``: prompt tokens per step of a mesh that has nothing else to do. ``private``:
    nobody else asks the mesh anything."""

    reference: ReferenceSide
    tolerance: Tolerance
    every_boundary: tuple[int, ...]
    chunk: int
    note: Note
    private: bool = False
    runs: list[Run] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Something ran, and everything that ran is well."""
        return bool(self.runs) and all(run.verdict.ok for run in self.runs)

    @property
    def score(self) -> float:
        """See ``coordinator.validation.scoring``."""
        return overall_score([run.verdict for run in self.runs])

    async def play(
        self,
        client: MeshClient,
        stages: Sequence[StagePlace],
        cases: Sequence[Case],
        *,
        concurrency: int = 1,
    ) -> None:
        """Ask ``cases``, so many at a time; judged once all of these are answered."""
        gate = asyncio.Semaphore(concurrency)

        async def one(case: Case) -> tuple[Observation, Any, float]:
            async with gate:
                began = time.monotonic()
                seen, finish = await observe(client, case, stages)
                return seen, finish, time.monotonic() - began

        answers = await asyncio.gather(*(one(case) for case in cases))
        situation = "alone" if concurrency == 1 else f"together:{concurrency}"
        for case, (seen, finish, seconds) in zip(cases, answers, strict=True):
            await self.judge(client, case, seen, finish, situation=situation, seconds=seconds)

    async def judge(
        self,
        client: MeshClient,
        case: Case,
        seen: Observation,
        finish: Any,
        *,
        situation: str,
        seconds: float = 0.0,
        problem: str = "",
    ) -> Run:
        """Hold one answer against the reference; find the component to blame if it fails.
        ``problem``: why it fails whatever it says."""
        verdict = await self._verdict(client, case, seen)
        if problem:
            problems = (*verdict.problems, problem)
            verdict = replace(verdict, ok=False, score=0.0, problems=problems)
        recoveries = () if finish is None else tuple(one.cause for one in finish.recoveries)
        run = Run(case, len(seen.stages), situation, len(seen.prompt), verdict, seconds, recoveries)
        self.runs.append(run)
        self.note(_line(run))
        return run

    async def _verdict(self, client: MeshClient, case: Case, seen: Observation) -> RunScore:
        exact = self.tolerance.exact
        expected = await self.reference.expect(
            case, seen, every_boundary=self.every_boundary, digests=exact
        )
        verdict = score_run(seen, expected, self.tolerance, temperature=case.spec.temperature)
        if verdict.ok or exact or verdict.culprit is None or verdict.culprit.kind != "unknown":
            return verdict
        again, _finish = await observe(client, case, seen.stages)
        shaped = await self.reference.bisect(case, again, expected, chunk=self.chunk)
        second = score_run(
            again,
            shaped,
            self.tolerance,
            temperature=case.spec.temperature,
            digests_decide=True,
        )
        culprit = second.culprit
        if culprit is None:
            return verdict
        return replace(verdict, culprit=_weighed(culprit, private=self.private))


def _weighed(culprit: Culprit, *, private: bool) -> Culprit:
    """A culprit found by digests in margin mode. The first boundary has none before it that agreed
    in the same step, so it alone proves little: until one digest has agreed, the libraries may
    differ; and others may have had rows in the step."""
    doubtful = ("compute",) if private else ("compute", "state")
    if culprit.stage == 0 and culprit.kind in doubtful:
        return replace(culprit, certain=False, cause=culprit.cause + _SHAPES)
    return culprit


def _line(run: Run) -> str:
    verdict = run.verdict
    head = f"{'ok  ' if verdict.ok else 'FAIL'} {run.stages} stages, {run.situation}"
    what = f"{run.case.name} [{run.case.sampling}]"
    if verdict.ok:
        return (
            f"{head}: {what}: {verdict.tokens} tokens, agreement {verdict.agreement:.4f}, "
            f"max |Δlogit| {verdict.max_abs_dlogit:.2g}"
        )
    culprit = verdict.culprit
    blamed = f"; culprit {culprit.worker} ({culprit.boundary}): {culprit.cause}" if culprit else ""
    return f"{head}: {what}: {'; '.join(verdict.problems)}{blamed}"
