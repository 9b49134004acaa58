"""Whatever dies, whenever: every client reads what one machine answers, once, to one end.

The cells are independent but a mesh is dear, so a few meshes run them side by side while the tests
wait for their own. A cell that fails says what it saw; its mesh is put right, or replaced.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from matrix import ALL_CELLS, Asked, Cell, Matrix, Outcome, requests, undisturbed
from wires import WiredMesh

MODEL = "tiny:layers=6"
SPANS = ("0-2", "2-4", "4-6")
FLAGS = ("--prefill-chunk-tokens", "32", "--failed-worker-s-max", "0.1")
PROMPT_TOKENS, COMPANION_TOKENS, ANSWER_TOKENS = 80, 20, 12
LANES = 2
CELL_S_MAX = 300.0
ALL_S_MAX = 900
FORESIGHT = 2
"""Cells whose needs are prepared while another runs."""


class Fleet:
    """Meshes in a thread of their own; each takes its part of the cells, in order."""

    def __init__(self, directory: Path, cells: Sequence[Cell], asked: dict[bool, list[Asked]]):
        self.outcomes: dict[Cell, Future[Outcome]] = {cell: Future() for cell in cells}
        self._directory = directory
        self._cells = cells
        self._asked = asked
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fleet")
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        lanes = (self._lane(number, self._cells[number::LANES]) for number in range(LANES))
        await asyncio.gather(*lanes)

    async def _lane(self, number: int, cells: Sequence[Cell]) -> None:
        attempt = 0
        left = list(cells)
        while left and not self._stopping.is_set():
            directory = self._directory / f"mesh-{number}-{attempt}"
            mesh, attempt = WiredMesh(directory, MODEL, SPANS, *FLAGS), attempt + 1
            try:
                await mesh.start()
                left = await self._on(mesh, left)
            except Exception as error:
                self.outcomes[left.pop(0)].set_exception(error)
            finally:
                await mesh.stop()

    async def _on(self, mesh: WiredMesh, cells: list[Cell]) -> list[Cell]:
        """Run cells until all are done or the mesh cannot be put right; returns those left."""
        matrix = Matrix(mesh, self._asked)
        while cells and not self._stopping.is_set():
            cell, *cells = cells
            try:
                async with asyncio.timeout(CELL_S_MAX):
                    outcome = await matrix.run(cell, cells[:FORESIGHT])
            except Exception as error:
                self.outcomes[cell].set_exception(error)
                return cells
            self.outcomes[cell].set_result(outcome)
        return cells


@pytest.fixture(scope="session")
def asked(model_home: Path) -> dict[bool, list[Asked]]:
    return undisturbed(MODEL, requests(PROMPT_TOKENS, COMPANION_TOKENS, ANSWER_TOKENS))


@pytest.fixture(scope="module")
def fleet(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    asked: dict[bool, list[Asked]],
) -> Iterator[Fleet]:
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    cells = [call.params["cell"] for call in calls if call and "cell" in call.params]
    one = Fleet(tmp_path_factory.mktemp("matrix"), cells, asked)
    yield one
    one.stop()


def test_the_matrix_is_whole():
    assert len(ALL_CELLS) == 9 * 7 * 3
    for fault in {cell.fault for cell in ALL_CELLS}:
        assert len({cell.mode for cell in ALL_CELLS if cell.fault is fault}) == 4


@pytest.mark.timeout(ALL_S_MAX)
@pytest.mark.parametrize("cell", ALL_CELLS, ids=str)
def test_no_fault_in_any_phase_costs_a_token(fleet: Fleet, cell: Cell, record_property):
    outcome = fleet.outcomes[cell].result(ALL_S_MAX)
    assert outcome.held
    assert outcome.evidence
    for name in ("held", "evidence", "causes", "blamed", "gap_s", "seconds", "tries"):
        record_property(name, str(getattr(outcome, name)))
