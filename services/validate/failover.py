"""Kills stages of a private mesh at chosen points of an answer; the answer must not notice.

Points: while the prompt is being computed, behind the first token, in the middle, before the last
token. After each the mesh is given the time to become whole again.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.validation.evidence import Observation, StagePlace
from services.client import ConnectionLost
from services.local_mesh import COORDINATOR
from services.up import LocalMesh, is_whole
from services.validate.cases import Case
from services.validate.mesh_side import observe
from services.validate.session import Session
from stagemesh.errors import RouteUnavailable

WHOLE_S_MAX = 120.0
"""Restart, reload and a new route; longer than this is a hang."""
POLL_S = 0.05
ATTEMPTS_MAX = 3
"""Of a kill that has to come while a short prompt is computed."""


@dataclass(frozen=True, slots=True)
class KillPoint:
    """Where to strike: ``index`` -1 is while the prompt is computed, else behind that token."""

    name: str
    index: int


def kill_points(count: int) -> tuple[KillPoint, ...]:
    """The points of an answer of ``count`` tokens."""
    return (
        KillPoint("prefill", -1),
        KillPoint("first-token", 0),
        KillPoint("middle", count // 2),
        KillPoint("last-token", max(0, count - 2)),
    )


async def play_failover(
    session: Session, mesh: LocalMesh, stages: Sequence[StagePlace], case: Case
) -> None:
    """Every stage killed at every point, one after another. A point at which no kill came in time
    has proved nothing: it is tried again, and fails in the end."""
    for place in stages:
        for point in kill_points(case.count):
            for attempt in range(1, ATTEMPTS_MAX + 1):
                began = time.monotonic()
                killer = _Killer(mesh, place.worker, point)
                seen, finish = await _ask_and_kill(mesh, killer, stages, case)
                if killer.pid or attempt == ATTEMPTS_MAX:
                    break
            await session.judge(
                mesh.client,
                case,
                seen,
                finish,
                situation=f"failover:{place.worker}@{point.name}",
                seconds=time.monotonic() - began,
                problem="" if killer.pid else f"{place.worker} was not killed in time",
            )
            if killer.pid:
                await until_whole(mesh, place.worker, killer.pid)


async def _ask_and_kill(
    mesh: LocalMesh, killer: _Killer, stages: Sequence[StagePlace], case: Case
) -> tuple[Observation, Any]:
    asking = asyncio.ensure_future(observe(mesh.client, case, stages, on_token=killer.on_token))
    if killer.point.index < 0:
        await killer.when_running(asking)
    return await asking


class _Killer:
    """Kills one worker's process, once."""

    def __init__(self, mesh: LocalMesh, worker: str, point: KillPoint) -> None:
        self._mesh = mesh
        self._worker = worker
        self.point = point
        self.pid = 0

    async def on_token(self, index: int) -> None:
        if index == self.point.index:
            self.strike()

    async def when_running(self, asking: asyncio.Future[Any]) -> None:
        """Strike as soon as the coordinator says that something is being computed."""
        while not asking.done():
            if (await self._mesh.status()).running:
                return self.strike()
        return None

    def strike(self) -> None:
        process = self._mesh.supervisor.children[self._worker].process
        if process is not None and not self.pid:
            self.pid = process.pid
            process.send_signal(signal.SIGKILL)


async def until_whole(mesh: LocalMesh, worker: str, killed_pid: int) -> None:
    """Return once ``worker`` runs as another process and the pipeline serves again.

    Raises RouteUnavailable when that takes too long.
    """
    stages = {spec.name for spec in mesh.specs if spec.name.startswith("stage-")}
    everyone = {spec.name for spec in mesh.specs} - {COORDINATOR}
    why = "the coordinator does not answer"
    try:
        async with asyncio.timeout(WHOLE_S_MAX):
            while True:
                try:
                    status = await mesh.status()
                    pids = {one.worker.name: one.worker.pid for one in status.workers}
                    why = status.not_ready_reason or f"{worker} is not back"
                    if pids.get(worker) != killed_pid and is_whole(status, stages, everyone):
                        return
                except ConnectionLost as error:
                    why = error.message
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise RouteUnavailable(
            f"the mesh was not whole {WHOLE_S_MAX:.0f} s after a kill: {why}", worker=worker
        ) from None
