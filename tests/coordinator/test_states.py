"""The machine obeys the state tables that docs/protocol.md prints, whatever fails.

That everything in them happens is shown by ``test_state_moves``."""

from __future__ import annotations

import enum
from pathlib import Path

import pytest

from coordinator import states
from coordinator.events import CancelRequested, DrainRequested
from coordinator.scenario import Scenario
from coordinator.session import ENDED, SessionPhase
from coordinator.simulation.world import simulate
from coordinator.testing import MemoryMesh

SCENARIOS = sorted((Path(__file__).parents[1] / "scenarios").glob("*.txt"))
TABLES = (states.ROUTE_MOVES, states.WORKER_MOVES, states.REQUEST_MOVES)

Moves = set[tuple[enum.Enum, enum.Enum]]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_every_scenario_stays_inside_the_tables(path: Path, moves: Moves) -> None:
    Scenario().run(path.read_text(encoding="utf-8"))
    assert moves


@pytest.mark.parametrize("seed", [*range(12), 20])
def test_every_simulated_disaster_stays_inside_the_tables(seed: int, moves: Moves) -> None:
    simulate(seed)
    assert moves


@pytest.mark.parametrize("gone", ["cancelled", "killed", "drained", "never there"])
def test_ends_of_every_kind_stay_inside_the_tables(gone: str, moves: Moves) -> None:
    mesh = MemoryMesh()
    if gone != "never there":
        for name, span in (("stage-0", "0-3"), ("stage-1", "3-6"), ("full", "0-6")):
            mesh.join(name, span)
        assert mesh.run_until(lambda: len(mesh.open_routes()) == 2)
    clients = [mesh.request(number, (1, 2, 3), 40) for number in range(1, 4)]
    mesh.run(0.4)
    if gone == "cancelled":
        for key in list(mesh.clients):
            mesh.feed(CancelRequested(key))
    elif gone == "killed":
        mesh.kill("stage-0")
        mesh.run(0.2)
        mesh.kill("full")
    elif gone == "drained":
        mesh.feed(DrainRequested("stage-0", 0.2))
    assert mesh.run_to_end()
    assert all(client.ends for client in clients)
    assert moves


def test_final_states_have_no_way_out_and_every_other_state_has_one() -> None:
    for table in TABLES:
        sources, targets = ({move[side] for move in table} for side in (0, 1))
        final = targets - sources
        kinds = set(type(next(iter(targets))))
        assert sources | targets == kinds
        assert final <= {SessionPhase.FAILED, states.RoutePhase.CLOSED}


def test_an_end_becomes_nothing_but_the_failure_that_its_client_is_told_instead() -> None:
    for end in ENDED - {SessionPhase.FAILED}:
        assert [after for before, after in states.REQUEST_MOVES if before is end] == [
            SessionPhase.FAILED
        ]
