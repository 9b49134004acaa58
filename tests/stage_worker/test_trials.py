"""Ways to compute the same, timed in turns, and what others on the machine do to that: nothing."""

import inspect
import random
import time

import pytest

from stage_worker import trials


class Machine:
    """A clock, and ways that move it. ``slower``: by what everybody is slowed down, from moment to
    moment."""

    def __init__(self, slower):
        self.now = 0.0
        self.computed = []
        self._slower = slower

    def way(self, name, seconds):
        def compute():
            self.computed.append(name)
            self.now += seconds * self._slower(self.now)

        return compute

    def costs(self, **seconds):
        ways = {name: self.way(name, each) for name, each in seconds.items()}
        return trials.costs(ways, lambda: self.now)


def test_costs_are_multiples_of_the_first_ways():
    machine = Machine(lambda _now: 1.0)
    assert machine.costs(a=2.0, b=1.0, c=5.0) == pytest.approx({"a": 1.0, "b": 0.5, "c": 2.5})


def test_ways_take_turns_and_each_is_computed_once_before():
    machine = Machine(lambda _now: 1.0)
    machine.costs(a=1.0, b=1.0)
    assert machine.computed == ["a", "b"] * (1 + trials.TURNS)


@pytest.mark.parametrize("rests_until", [5.0, 14.0, 30.0])
def test_a_neighbour_that_comes_for_good_does_not_decide(rests_until):
    """As it did when all turns of one way came before those of the next."""
    machine = Machine(lambda now: 1.0 if now < rests_until else 1.6)
    assert machine.costs(stored=1.0, tiles=0.7)["tiles"] == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_a_neighbour_that_comes_and_goes_does_not_decide(seed):
    draw = random.Random(seed)
    busy = [draw.random() < 0.5 for _ in range(40)]
    machine = Machine(lambda now: 1.6 if busy[int(now / 5.0)] else 1.0)
    assert machine.costs(stored=1.0, tiles=0.6)["tiles"] < 0.75


def test_a_turn_in_which_one_way_was_held_up_is_not_the_ways_doing():
    turns = iter(range(10**6))
    machine = Machine(lambda _now: 50.0 if next(turns) % 9 == 4 else 1.0)
    assert machine.costs(stored=1.0, tiles=0.7)["tiles"] == pytest.approx(0.7)


def test_what_takes_no_time_at_all_costs_the_same():
    machine = Machine(lambda _now: 1.0)
    assert machine.costs(a=0.0, b=0.0) == {"a": 1.0, "b": 1.0}


def test_the_clock_is_the_processs_own():
    assert inspect.signature(trials.costs).parameters["clock"].default is time.process_time
