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
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from matrix import (
    ALL_CELLS,
    Asked,
    Cell,
    Fault,
    Matrix,
    Outcome,
    Phase,
    PhaseMissed,
    reference,
    requests,
    undisturbed,
)
from wires import WiredMesh

from stage_worker import model_source

USUAL_HOME = model_source.home_directory()
"""Where a model that was fetched once is found again."""

CELL_S_MAX = 300.0
ALL_S_MAX = 1200
FORESIGHT = 2
"""Cells whose needs are prepared while another runs."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A model, how it is split, and how much of it is asked."""

    model: str
    spans: tuple[str, str, str]
    flags: tuple[str, ...]
    prompt_tokens: int
    companion_tokens: int
    answer_tokens: int
    lanes: int = 1

    def asked(self) -> dict[bool, list[Asked]]:
        """Requests with what one machine answers."""
        sizes = (self.prompt_tokens, self.companion_tokens, self.answer_tokens)
        return undisturbed(self.model, requests(*sizes))


QUICK = ("--failed-worker-s-max", "0.1", "--prefill-chunk-tokens")
TINY = Kind("tiny:layers=6", ("0-2", "2-4", "4-6"), (*QUICK, "32"), 80, 20, 12, lanes=2)
SMOLLM2 = Kind("smollm2", ("0-10", "10-20", "20-30"), (*QUICK, "8"), 20, 6, 9)
SMOLLM2_CELLS = tuple(
    Cell(fault, phase, stage)
    for fault, phase, stage in (
        (Fault.KILL, Phase.HANDSHAKE, 0),
        (Fault.KILL, Phase.BEFORE_FIRST_TOKEN, 2),
        (Fault.KILL, Phase.MID_DECODE, 2),
        (Fault.KILL, Phase.LAST_TOKEN, 2),
        (Fault.OUT_OF_MEMORY, Phase.DRAIN, 0),
        (Fault.STOP, Phase.LATER_CHUNK, 1),
        (Fault.RESTART_OTHER, Phase.MID_DECODE, 1),
        (Fault.RESTART_EMPTY, Phase.MID_DECODE, 1),
        (Fault.BLACK_HOLE, Phase.MID_DECODE, 0),
        (Fault.HALF_OPEN, Phase.LATER_CHUNK, 2),
        (Fault.RESET, Phase.MID_DECODE, 1),
        (Fault.SLOW, Phase.FIRST_CHUNK, 2),
    )
)


class Fleet:
    """Meshes in a thread of their own; each takes its part of the cells, in order."""

    def __init__(
        self, directory: Path, kind: Kind, cells: Sequence[Cell], asked: dict[bool, list[Asked]]
    ) -> None:
        self.outcomes: dict[Cell, Future[Outcome]] = {cell: Future() for cell in cells}
        self._directory = directory
        self._kind = kind
        self._cells = cells
        self._asked = asked
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fleet")
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        lanes = self._kind.lanes
        parts = (self._lane(number, list(self._cells[number::lanes])) for number in range(lanes))
        await asyncio.gather(*parts)

    async def _lane(self, number: int, cells: list[Cell]) -> None:
        """A cell whose point was never reached has shown nothing: it comes again, last, once."""
        attempt, kind, missed = 0, self._kind, set[Cell]()
        while cells and not self._stopping.is_set():
            directory = self._directory / f"mesh-{number}-{attempt}"
            mesh, attempt = WiredMesh(directory, kind.model, kind.spans, *kind.flags), attempt + 1
            try:
                await mesh.start()
                await self._on(mesh, cells)
            except Exception as error:
                cell = cells.pop(0)
                if isinstance(error, PhaseMissed) and cell not in missed:
                    missed.add(cell)
                    cells.append(cell)
                else:
                    self.outcomes[cell].set_exception(error)
            finally:
                await mesh.stop()

    async def _on(self, mesh: WiredMesh, cells: list[Cell]) -> None:
        """Run cells, taking each from the list when it is done. Raises what the first one met that
        did not go well: this mesh may not be as it should."""
        matrix = Matrix(mesh, self._asked)
        while cells and not self._stopping.is_set():
            async with asyncio.timeout(CELL_S_MAX):
                outcome = await matrix.run(cells[0], cells[1 : 1 + FORESIGHT])
            self.outcomes[cells.pop(0)].set_result(outcome)


def fleet_of(
    request: pytest.FixtureRequest, directory: Path, kind: Kind, name: str
) -> Iterator[Fleet]:
    """A fleet for the cells of the selected tests that ask for the fixture ``name``."""
    items = [item for item in request.session.items if name in getattr(item, "fixturenames", ())]
    one = Fleet(directory, kind, [item.callspec.params["cell"] for item in items], kind.asked())
    yield one
    one.stop()


@pytest.fixture(scope="module")
def fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_home: Path
) -> Iterator[Fleet]:
    yield from fleet_of(request, tmp_path_factory.mktemp("matrix"), TINY, "fleet")


@pytest.fixture(scope="module")
def smollm2_fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_home: Path
) -> Iterator[Fleet]:
    fetched = model_source.resolve(SMOLLM2.model, home=USUAL_HOME)
    kind = replace(SMOLLM2, model=str(fetched.directory))
    yield from fleet_of(request, tmp_path_factory.mktemp("smollm2"), kind, "smollm2_fleet")


def proven(outcome: Outcome) -> None:
    """It did happen, and there; what was seen is in the report of a test that fails, or of -rP."""
    print(outcome)
    assert outcome.held
    assert outcome.evidence


def test_the_matrix_is_whole():
    assert len(ALL_CELLS) == 9 * 7 * 3
    for fault in Fault:
        assert len({cell.mode for cell in ALL_CELLS if cell.fault is fault}) == 4
    for cells in (ALL_CELLS, SMOLLM2_CELLS):
        assert {cell.fault for cell in cells} == set(Fault)
        assert {cell.phase for cell in cells} == set(Phase)
        assert {cell.stage for cell in cells if cell.is_slow_for_long} in ({0, 1, 2}, set())
        killed = {cell.mode for cell in cells if cell.fault is Fault.KILL}
        assert killed >= {(False, 8), (True, 8)}


def test_what_is_drawn_hangs_on_the_whole_answer_so_far(model_home: Path):
    """So a route that took over and forgot some of it, or took it for the prompt, would be seen."""
    asked = requests(TINY.prompt_tokens, TINY.companion_tokens, TINY.answer_tokens)
    penalised = [one for some in asked.values() for one in some if one.is_penalised]
    as_asked = [one.specification() for one in penalised]
    cut = [{**one, "forgets": one["count"] // 3} for one in as_asked]
    plain = [{**one, "repetition": 1.0, "presence": 0.0, "frequency": 0.0} for one in as_asked]
    answers = reference(TINY.model, [*as_asked, *cut, *plain])
    right, forgetful, free = (answers[start : start + 8] for start in (0, 8, 16))
    differing = [a not in (b, c) for a, b, c in zip(right, forgetful, free, strict=True)]
    assert len(differing) == 8
    assert sum(differing) >= 7
    assert differing[penalised.index(asked[True][0])], "the one that the faults are timed by"


@pytest.mark.timeout(ALL_S_MAX)
@pytest.mark.parametrize("cell", ALL_CELLS, ids=str)
def test_no_fault_in_any_phase_costs_a_token(fleet: Fleet, cell: Cell):
    proven(fleet.outcomes[cell].result(ALL_S_MAX))


@pytest.mark.smollm2
@pytest.mark.timeout(ALL_S_MAX)
@pytest.mark.parametrize("cell", SMOLLM2_CELLS, ids=str)
def test_nor_with_smollm2(smollm2_fleet: Fleet, cell: Cell):
    proven(smollm2_fleet.outcomes[cell].result(ALL_S_MAX))
