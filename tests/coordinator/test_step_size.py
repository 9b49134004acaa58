"""Steps as large as they pay, and no larger."""

import random

import pytest

from coordinator.step_size import (
    GAIN_MIN,
    ROWS_MIN,
    SLOWER_MAX,
    STEPS_FIRST,
    STEPS_MOST,
    TOKEN_S_MAX,
    TRIAL_STEPS,
    StepSize,
)


def run(size, seconds_of, steps=4000, decoding=256):
    """So many steps over ``decoding`` requests; the sizes that were used, one after the other."""
    used = []
    for _ in range(steps):
        rows = min(size.rows, decoding)
        used.append(rows)
        size.add(rows, seconds_of(rows))
    return used


def test_where_every_row_costs_the_same_steps_become_small():
    size = StepSize(64)
    used = run(size, lambda rows: rows * 0.0004)
    assert size.usual == ROWS_MIN
    # Four halvings, each after so many steps, a trial, and as many steps behind it.
    assert used.index(ROWS_MIN) <= 4 * (STEPS_FIRST + 2 * TRIAL_STEPS)


def test_where_larger_steps_are_cheaper_they_stay_large_and_trials_become_rare():
    size = StepSize(64)
    used = run(size, lambda rows: 0.01 + rows * 0.0002, steps=20 * STEPS_MOST)
    assert size.usual == 64
    assert used.count(32) <= (20 + 8) * TRIAL_STEPS
    assert used[-2 * STEPS_MOST :].count(32) <= 2 * TRIAL_STEPS


@pytest.mark.parametrize("token_s", [TOKEN_S_MAX, 0.005])
def test_where_a_token_takes_long_nothing_is_tried(token_s):
    size = StepSize(64)
    assert set(run(size, lambda rows: rows * token_s)) == {64}


def test_what_a_token_costs_in_smaller_steps_decides():
    just, over = SLOWER_MAX - 0.01, SLOWER_MAX + 0.01
    for factor, expected in ((just, 32), (over, 64)):
        size = StepSize(64)
        costs = {64: 0.0004, 32: 0.0004 * factor, 16: 1.0}
        run(size, lambda rows, costs=costs: rows * costs[rows], steps=STEPS_FIRST + 2 * TRIAL_STEPS)
        assert size.usual == expected


def test_steps_grow_again_when_larger_ones_gain_and_not_when_they_hardly_do():
    for gain, expected in ((GAIN_MIN + 0.02, 64), (GAIN_MIN - 0.02, ROWS_MIN)):
        size = StepSize(64)
        run(size, lambda rows: rows * 0.0004)
        assert size.usual == ROWS_MIN

        def loaded(rows, gain=gain):
            return rows * 0.0004 / gain ** (rows // ROWS_MIN).bit_length()

        run(size, loaded, steps=20 * STEPS_MOST)
        assert size.usual == expected


def test_a_route_that_has_become_slow_gets_its_large_steps_back():
    size = StepSize(64)
    run(size, lambda rows: rows * 0.0004)
    run(size, lambda rows: 0.03 + rows * 0.002, steps=20 * STEPS_MOST)
    assert size.usual == 64


def test_a_trial_ends_when_there_are_not_enough_requests_for_it():
    size = StepSize(64)
    run(size, lambda rows: rows * 0.0004, steps=STEPS_FIRST + 1)
    assert size.rows == 32
    run(size, lambda rows: rows * 0.0004, steps=TRIAL_STEPS + 1, decoding=3)
    assert (size.rows, size.usual) == (64, 64)


def test_steps_that_are_not_full_teach_nothing():
    size = StepSize(64)
    assert set(run(size, lambda rows: rows * 0.0004, decoding=32)) == {32}
    assert size.rows == 64


def test_a_step_that_was_held_up_for_long_is_not_the_sizes_doing():
    size = StepSize(64)
    held_up = iter(range(10**6))
    run(size, lambda rows: rows * 0.0004 + (0.1 if next(held_up) % 12 == 0 else 0.0))
    assert size.usual == ROWS_MIN


@pytest.mark.parametrize(("change", "dearer", "expected"), [(0.7, 1.3, 64), (1.4, 1.0, 32)])
def test_what_changes_for_everybody_meanwhile_is_not_the_sizes_doing(change, dearer, expected):
    """Requests that come or go: each window is cheaper or dearer than the one before."""
    size = StepSize(64)
    made = iter(range(10**6))

    def drifting(rows):
        window = next(made) // TRIAL_STEPS
        return rows * 0.0001 * change ** min(window, 3) * (dearer if rows < 64 else 1.0)

    run(size, drifting, steps=STEPS_FIRST + 2 * TRIAL_STEPS)
    assert size.usual == expected


def test_late_steps_and_the_short_ones_behind_them_cancel_out():
    """Two of three come early and the third late: a median would call these cheaper by a tenth."""
    size = StepSize(64)
    turn = iter(range(10**6))

    def unsteady(rows):
        uneven = (0.9, 0.9, 1.2)[next(turn) % 3] if rows == 32 else 1.0
        return rows * 0.0004 * uneven * (1.15 if rows < 64 else 1.0)

    run(size, unsteady)
    assert size.usual == 64  # what 32 rows cost is 15 % more


@pytest.mark.parametrize("most", [1, 2, 4, 6, 7])
def test_a_route_of_small_steps_or_none_side_by_side_tries_nothing(most):
    size = StepSize(most)
    assert set(run(size, lambda rows: rows * 0.0001)) == {most}


@pytest.mark.parametrize("most", [8, 9, 15])
def test_a_route_of_eight_rows_tries_half_of_them_and_then_no_less(most):
    size = StepSize(most)
    used = run(size, lambda rows: rows * 0.0001)
    assert min(used) == size.usual == most // 2


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_measured_the_size_stays_within_its_bounds(seed):
    draw = random.Random(seed)
    size = StepSize(draw.choice((1, 7, 16, 33, 64, 100)))
    for _ in range(3000):
        rows = draw.randint(1, size.rows)
        size.add(rows, draw.uniform(0.0, 0.002) * rows)
        assert 1 <= size.rows <= size.most
        assert min(size.most, ROWS_MIN) <= size.usual <= size.most
