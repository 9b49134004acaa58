"""The checks on and off in neighbouring steps: what is paired, what is refused, one tiny run."""

import ast
import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from services.bench import check_switch, on_off, switched
from services.bench.check_switch import CHECKS, Calls, CheckSwitch, SwitchFailed
from services.bench.on_off import SwitchedProcessFailed
from services.bench.one_process import one_process_mesh
from services.bench.results import median_interval
from services.bench.sides import Sizes, default_settings
from services.bench.switched import TAIL_STEPS, WARM_STEPS, Moment, Timing, pairs_of, plan_of
from stage_worker.model_source import resolve
from stagemesh.topology import Span

PROMPT = (40, 41, 42, 43, 44, 45)
ROOMS = ("stagemesh", "coordinator", "stage_worker", "services")
ROOT = Path(check_switch.__file__).parents[2]


def held():
    return [getattr(check.owner, check.attribute) for check in CHECKS]


async def measured(*, pairs=6, streams=1):
    spans = [Span(0, 2), Span(2, 4)]
    async with one_process_mesh(resolve("tiny:layers=4").directory, spans, dtype="auto") as mesh:
        return await switched.measure(mesh, PROMPT, streams=streams, pairs=pairs)


def moments_of(plan, *, checked_ns=50, bare_ns=40, forward_ns=30):
    """A stream of steps that take exactly so long."""
    found, clock, forward = [], 1000, 0
    for checked in (*plan, True):
        found.append(Moment(checked, clock, forward))
        clock, forward = clock + (checked_ns if checked else bare_ns), forward_ns
    return found


# -- arithmetic -----------------------------------------------------------------------------------


def test_a_plan_is_pairs_in_both_orders_between_checked_steps():
    plan = plan_of(40, random.Random(1))
    pairs = plan[WARM_STEPS:-TAIL_STEPS]
    assert all((*plan[:WARM_STEPS], *plan[-TAIL_STEPS:]))
    assert set(zip(pairs[::2], pairs[1::2], strict=True)) == {(True, False), (False, True)}


def test_a_pair_is_a_checked_step_and_the_bare_one_beside_it_whichever_came_first():
    pairs = pairs_of(moments_of(plan_of(20, random.Random(1))))
    assert len(pairs) == 20
    assert set(pairs) == {(Timing(True, 50, 20), Timing(False, 40, 10))}


def test_steps_that_are_not_one_of_each_are_no_pair():
    plan = (*[True] * WARM_STEPS, True, True, *[True] * TAIL_STEPS)
    with pytest.raises(SwitchFailed, match="one checked and one bare"):
        pairs_of(moments_of(plan))


def test_the_interval_of_a_median_is_of_values_that_were_seen_and_shrinks_with_their_number():
    few, many = list(range(25)), list(range(2500))
    assert median_interval(few) == (6, 18)
    assert median_interval([3.0, 1.0]) == (1.0, 3.0)
    low, high = median_interval(many)
    assert low < 1249.5 < high
    assert high - low == pytest.approx(98, abs=3)


def document(differences, *, bare_ns=50_000_000):
    pairs = [[bare_ns + ns, bare_ns, 2_000_000 + ns, 2_000_000] for ns in differences]
    counts = {"checksums": [9, 0], "steps": {"checked": 5, "bare": 5}, "blas": "b", "threads": 2}
    return counts | {"pairs": pairs}


def test_the_figure_is_a_median_difference_whose_whole_interval_must_keep_the_goal():
    whole, apart, step = on_off.figures(document([200_000] * 400))
    assert (whole.ours, apart.ours) == pytest.approx((0.4, 0.4))
    assert whole.interval == pytest.approx((0.4, 0.4))
    assert (step.ours, step.baseline, step.ratio) == pytest.approx((50.2, 50.0, 1.004))
    assert (whole.met, whole.as_json()["aim_met"]) == (True, False)
    noisy, _, _ = on_off.figures(document([-500_000, 400_000, 800_000] * 5))
    assert noisy.ours < 1.0 < noisy.interval[1]
    assert noisy.met is False


# -- the switch -----------------------------------------------------------------------------------


def test_everything_is_as_it_was_behind_the_block_even_when_it_raises():
    before = held()

    def within():
        with CheckSwitch().installed():
            assert not any(now is then for now, then in zip(held(), before, strict=True))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        within()
    assert held() == before


def imported_by(path):
    """Every module name that a file imports, and every name it imports from one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_but_the_process_of_the_benchmark_imports_the_switch():
    importers = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for name in imported_by(path)
        if {"check_switch", "switched"} & set(name.split(".")[2:3])
    }
    assert importers == {"services/bench/switched.py"}


async def test_every_check_runs_in_every_checked_step_and_in_no_bare_one_and_tokens_are_the_same():
    before = held()
    found = await measured(pairs=6, streams=2)
    assert held() == before
    assert len(found["pairs"]) == 12
    assert found["checksums"][0] > 0
    assert found["checksums"][1] == 0
    bare = found["steps"]["bare"]
    assert bare == 18
    for check in CHECKS:
        calls = found["calls"][check.name]
        least = (bare, bare) if check.every_step else (1, 0)
        assert calls[0] >= least[0], check.name
        assert calls[1] >= least[1], check.name


@pytest.mark.parametrize(("of_checked", "of_bare"), [(9, 0), (5, 4)])
def test_acknowledgements_that_each_stand_for_several_steps_may_all_fall_upon_checked_ones(
    of_checked, of_bare, monkeypatch
):
    seen_once = tuple(check for check in CHECKS if not check.every_step)
    monkeypatch.setattr(check_switch, "CHECKS", seen_once)
    switch = CheckSwitch(calls={"acknowledgement": Calls(of_checked, of_bare)})
    switch.require_honest(checked=36, bare=12)
    switch.calls["acknowledgement"] = Calls()
    with pytest.raises(SwitchFailed, match="'acknowledgement' was met 0 times"):
        switch.require_honest(checked=36, bare=12)


@pytest.mark.parametrize("name", ["frame sealed", "activation marked", "token sealed"])
async def test_a_bare_step_that_still_computes_a_checksum_is_no_figure(name, monkeypatch):
    """What the table has forgotten, the count of CRC32C itself finds."""
    kept = tuple(check for check in CHECKS if check.name != name)
    monkeypatch.setattr(check_switch, "CHECKS", kept)
    with pytest.raises(SwitchFailed, match="CRC32C was computed"):
        await measured()


async def test_a_check_that_is_not_on_the_path_of_a_step_is_no_figure(monkeypatch):
    aside = check_switch.Check("aside", check_switch.checksum, "chain_start", lambda *_: b"")
    monkeypatch.setattr(check_switch, "CHECKS", (*CHECKS, aside))
    with pytest.raises(SwitchFailed, match="'aside' was met"):
        await measured()


def in_the_place_of(name, bare):
    """The table with another stand-in for one check."""
    return tuple(replace(check, bare=bare) if check.name == name else check for check in CHECKS)


async def test_a_bare_step_that_changes_a_token_is_no_figure(monkeypatch):
    seven = in_the_place_of("logits", lambda _logits: [check_switch.Draw(7, 0.0)])
    monkeypatch.setattr(check_switch, "CHECKS", seven)
    with pytest.raises(SwitchFailed, match="other tokens"):
        await measured()


async def test_rows_that_the_coordinator_judged_in_bare_steps_are_no_figure(monkeypatch):
    """The mesh's own count, which no turnstile makes."""

    def judged_after_all(stream, _row, expected, _now):
        stream.validator.counters.count("tokens_checked")
        stream.confirmed = expected.end_position

    monkeypatch.setattr(check_switch, "CHECKS", in_the_place_of("row and token", judged_after_all))
    with pytest.raises(SwitchFailed, match="rows were judged"):
        await measured()


# -- the whole ------------------------------------------------------------------------------------


def test_one_tiny_run_in_a_process_of_its_own_gives_all_three_figures():
    settings = default_settings({"model": "tiny", "deterministic": True})
    found = asyncio.run(on_off.switched(settings, Sizes.quick(), lambda _line: None))
    assert [one.name for one in found] == [
        "overhead_switched",
        "overhead_switched_apart",
        "decode_step_switched",
    ]
    assert not any(one.error for one in found)
    assert len(found[2].samples["ours"]) == 24
    assert "24 pairs" in found[0].note
    assert "and 0 in bare steps" in found[0].note


def test_a_process_that_cannot_measure_says_why():
    settings = default_settings({"model": "tiny", "deterministic": True})
    nothing = Sizes(switched_streams=0, switched_pairs=0)
    with pytest.raises(SwitchedProcessFailed, match="SWITCH_FAILED: no pair of steps"):
        asyncio.run(on_off.switched(settings, nothing, lambda _line: None))
