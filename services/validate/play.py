"""The order of a validation: the reference, the mesh or meshes, the passes, the tolerance.

Passes on every mesh: each case alone; all cases at a time, so that they share microbatches; the
needle ladder; and on private meshes, if wanted, each stage killed at each point of a long prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from coordinator.validation.evidence import StagePlace
from coordinator.validation.scoring import calibrated_tau
from services.client import MeshClient
from services.local_mesh import layer_costs, plan_spans
from services.mesh_report import environment_json
from services.settings import Settings
from services.up import Wishes, local_mesh
from services.validate import calibration
from services.validate.cases import Case, cases_of, needle_cases
from services.validate.failover import play_failover
from services.validate.mesh_side import chunk_of, route_under_test
from services.validate.reference_side import ReferenceSide
from services.validate.report import Report
from services.validate.session import Note, Session
from stage_worker.model_source import ResolvedModel
from stage_worker.weights import home_directory, manifest
from stagemesh.errors import InvalidConfiguration
from stagemesh.v1 import admin_service_pb2

CALIBRATION_TAU = 1e9
"""While measuring, nothing is too large."""


@dataclass(frozen=True, slots=True)
class Validation:
    """What is to be validated and how; `of_running` and `of_private` do it."""

    model: ResolvedModel
    settings: Settings
    entries: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    count: int
    needle: int
    needle_count: int
    concurrency: int
    failover: bool
    calibrate: bool
    tau: float | None
    note: Note

    # -- on what ----------------------------------------------------------------------------------

    async def of_running(self, client: MeshClient) -> Report:
        """A mesh that somebody else started. Raises InvalidConfiguration when this machine's model
        cannot stand for the mesh's."""
        status = await client.mesh()
        stages = await route_under_test(client)
        deterministic = _is_deterministic(status)
        boundaries = tuple(place.span.last for place in stages[:-1])
        async with self._reference(deterministic=deterministic) as reference:
            self._check_dtype(status, reference)
            session, source = self._session(reference, status, boundaries, deterministic)
            await self._passes(session, client, stages)
            return self._report(session, status, source)

    async def of_private(
        self, stage_counts: Sequence[int], *, skip_impossible: bool = False
    ) -> Report:
        """Private meshes of so many stages, one after another."""
        layers = len(layer_costs(self.model.directory).layers)
        possible = [one for one in stage_counts if one <= layers or not skip_impossible]
        boundaries = {
            span.last
            for count in possible
            for span in plan_spans(self.model.directory, self._mesh_settings(count))[:-1]
        }
        deterministic = self.settings.mesh.deterministic
        session: Session | None = None
        status = admin_service_pb2.GetMeshResponse()
        source = ""
        async with self._reference(deterministic=deterministic) as reference:
            for count in possible:
                async with AsyncExitStack() as stack:
                    mesh = await stack.enter_async_context(self._mesh(count))
                    status = await mesh.status()
                    if session is None:
                        session, source = self._session(
                            reference, status, tuple(sorted(boundaries)), deterministic
                        )
                        session.private = True
                    stages = await route_under_test(mesh.client)
                    await self._passes(session, mesh.client, stages)
                    if self.failover:
                        await play_failover(session, mesh, stages, self._failover_case())
            if session is None:
                raise InvalidConfiguration("no number of stages was given", setting="stages")
            return self._report(session, status, source)

    def _mesh_settings(self, stages: int) -> Any:
        return replace(self.settings.mesh, stages=stages, spans=())

    def _mesh(self, stages: int) -> Any:
        settings = replace(self.settings, mesh=self._mesh_settings(stages))
        wishes = Wishes(settings, full_worker=self.failover, listen="127.0.0.1:0")
        return local_mesh(wishes, report=self.note)

    def _reference(self, *, deterministic: bool) -> ReferenceSide:
        return ReferenceSide(
            self.model.directory,
            dtype=self.settings.mesh.dtype,
            deterministic=deterministic,
            threads=self.settings.process.threads or 1,
        )

    # -- passes -----------------------------------------------------------------------------------

    async def _passes(
        self, session: Session, client: MeshClient, stages: Sequence[StagePlace]
    ) -> None:
        cases = cases_of(self.entries, self.seeds, self.count)
        await session.play(client, stages, cases)
        if self.concurrency > 1:
            await session.play(client, stages, cases, concurrency=self.concurrency)
        if self.needle > 0:
            await session.play(client, stages, await self._needles(session, client))

    async def _needles(self, session: Session, client: MeshClient) -> list[Case]:
        models = await client.models()
        room = int(models[0].context_length) if models else self.needle

        async def encode(text: str) -> list[int]:
            return list(await session.reference.encode({"prompt": text}))

        return await needle_cases(self.needle, room, self.needle_count, encode)

    def _failover_case(self) -> Case:
        """The longest prompt, greedy: several chunks, so that a kill can come between them."""
        longest = max(self.entries, key=lambda entry: len(str(entry.get("prompt", ""))))
        return cases_of([longest], (), self.count)[0]

    # -- tolerance --------------------------------------------------------------------------------

    def _session(
        self,
        reference: ReferenceSide,
        status: admin_service_pb2.GetMeshResponse,
        boundaries: tuple[int, ...],
        deterministic: bool,
    ) -> tuple[Session, str]:
        tau, source = self._tau(reference, status, deterministic)
        tolerance = calibration.tolerance_of(tau, reference.facts["dtype"])
        return Session(reference, tolerance, boundaries, chunk_of(status), self.note), source

    def _tau(
        self,
        reference: ReferenceSide,
        status: admin_service_pb2.GetMeshResponse,
        deterministic: bool,
    ) -> tuple[float, str]:
        if self.calibrate:
            return CALIBRATION_TAU, "calibration"
        if self.tau is not None:
            return self.tau, "given"
        if deterministic and reference.facts["environment"].get("deterministic"):
            return 0.0, "exact"
        stored = calibration.stored_tau(home_directory(), self._key(reference, status))
        if stored is not None:
            return max(stored, calibration.TAU_MIN), "calibrated"
        return calibration.TAU_DEFAULT.get(reference.facts["dtype"], 0.5), "default"

    def _key(self, reference: ReferenceSide, status: admin_service_pb2.GetMeshResponse) -> str:
        return calibration.pair_key(
            self.model.name,
            reference.facts["dtype"],
            environment_json(status),
            reference.facts["environment"],
        )

    def _check_dtype(
        self, status: admin_service_pb2.GetMeshResponse, reference: ReferenceSide
    ) -> None:
        theirs = {one.worker.dtype for one in status.workers}
        if theirs - {reference.facts["dtype"]}:
            raise InvalidConfiguration(
                f"the mesh computes in {', '.join(sorted(theirs))}, the reference in "
                f"{reference.facts['dtype']}; give --dtype",
                setting="dtype",
            )

    # -- the end ----------------------------------------------------------------------------------

    def _report(
        self, session: Session, status: admin_service_pb2.GetMeshResponse, source: str
    ) -> Report:
        measured = None
        if self.calibrate:
            measured = self._calibrated(session, status)
            tau = max(measured["tau"], calibration.TAU_MIN)
            session = replace(session, tolerance=replace(session.tolerance, tau=tau))
        environment = {
            **environment_json(status),
            "model": self.model.name,
            "dtype": session.reference.facts["dtype"],
            **{
                f"reference_{name}": value
                for name, value in session.reference.facts["environment"].items()
            },
        }
        problems = foreign_weights(status, manifest(self.model.directory).fingerprint)
        return Report(session, environment, problems, measured, source)

    def _calibrated(
        self, session: Session, status: admin_service_pb2.GetMeshResponse
    ) -> dict[str, Any]:
        differences = [value for run in session.runs for value in run.verdict.differences]
        tau = calibrated_tau(differences)
        path = calibration.store_tau(home_directory(), self._key(session.reference, status), tau)
        return {
            "tau": tau,
            "samples": len(differences),
            "largest": max(differences, default=0.0),
            "file": path.name,
        }


def _is_deterministic(status: admin_service_pb2.GetMeshResponse) -> bool:
    """Every worker multiplies with the reference BLAS."""
    facts = [dict(one.worker.environment) for one in status.workers]
    return bool(facts) and all(one.get("deterministic") == "True" for one in facts)


def foreign_weights(
    status: admin_service_pb2.GetMeshResponse, fingerprint: str
) -> tuple[dict[str, str], ...]:
    """Workers whose model is not the one that the reference loaded."""
    return tuple(
        {
            "component": one.worker.name,
            "problem": f"has other weights: {one.worker.fingerprint[:16]}, not {fingerprint[:16]}",
        }
        for one in status.workers
        if one.worker.fingerprint != fingerprint
    )
