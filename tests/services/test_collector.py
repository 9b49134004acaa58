"""The cycle collector leaves old objects alone while there is work, and looks at them when it is
quiet."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from services import collector
from services.collector import calm_collector, collect_when_quiet

KEPT_OBJECTS = 1_200_000
"""More than the survivors of 2,000 looks at 500 new objects: what 40,000 tokens leave behind."""
TURN_S = 0.001


class Node:
    """Something that may be part of a cycle."""

    def __init__(self) -> None:
        self.peer: Node | None = None


def cycle() -> Node:
    """One of two objects that keep each other alive."""
    one, other = Node(), Node()
    one.peer, other.peer = other, one
    return one


@pytest.fixture(autouse=True)
def _collector_restored() -> Iterator[None]:
    thresholds = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """Generations that were looked at."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield seen
    finally:
        gc.callbacks.remove(note)


def test_what_is_kept_is_not_looked_at_again_while_there_is_work(passes: list[int]) -> None:
    calm_collector()
    del passes[:]
    kept = [[index] for index in range(KEPT_OBJECTS)]
    assert len(kept) == KEPT_OBJECTS
    assert len(passes) > 2_000  # it was at work
    assert set(passes) == {0}


def test_a_new_cycle_is_found_while_there_is_work() -> None:
    calm_collector()
    dead = weakref.ref(cycle())
    kept = [[index] for index in range(2 * collector.COLLECT_OBJECTS)]
    assert kept
    assert dead() is None


async def test_an_old_cycle_is_found_when_it_is_quiet(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm_collector()
    monkeypatch.setattr(collector, "LOOKS_BEFORE_OLDER", 3)
    one = cycle()
    dead, quiet = weakref.ref(one), False
    for _ in range(3):
        gc.collect(0)  # what survives a look is old behind it
    del one
    del passes[:]
    collecting = asyncio.create_task(collect_when_quiet(lambda: quiet, quiet_s=TURN_S))
    try:
        await asyncio.sleep(20 * TURN_S)
        assert 2 not in passes  # there was work
        assert dead() is not None
        quiet = True
        async with asyncio.timeout(5.0):
            while dead() is not None:
                await asyncio.sleep(TURN_S)
        assert passes.count(2) == 1
        await asyncio.sleep(20 * TURN_S)
        assert passes.count(2) == 1  # once is enough: little is new
    finally:
        collecting.cancel()


async def test_a_moment_without_work_is_not_quiet(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calm_collector()
    monkeypatch.setattr(collector, "LOOKS_BEFORE_OLDER", 0)
    del passes[:]
    looks = 0

    def every_other_time() -> bool:
        nonlocal looks
        looks += 1
        return looks % 2 == 0

    collecting = asyncio.create_task(collect_when_quiet(every_other_time, quiet_s=TURN_S))
    try:
        async with asyncio.timeout(5.0):
            while looks < 10:
                await asyncio.sleep(TURN_S)
        assert 2 not in passes
    finally:
        collecting.cancel()
