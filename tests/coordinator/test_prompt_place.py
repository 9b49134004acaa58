"""Whether those who decode make room for a prompt."""

import pytest

from coordinator.prompt_place import Crowd, PromptPlace, pays
from coordinator.step_times import StepTimes
from stagemesh.frame import FrameKind

EIGHT = Crowd(decoding=8, held_tokens=800, rows_max=64, prompt_rounds=80)


def measured(steps, token_s=0.0024):
    """Decode steps of so many rows took so long, and a token of a prompt ``token_s``."""
    times = StepTimes(1.0)
    for rows, seconds in steps.items():
        times.add(FrameKind.DECODE, rows, seconds)
    times.add(FrameKind.PREFILL, 1, token_s)
    return times


def test_a_step_of_more_rows_that_hardly_takes_longer_makes_room():
    assert pays(EIGHT, 2, measured({4: 0.024, 8: 0.028}))


def test_one_that_takes_as_long_as_both_does_not():
    assert not pays(EIGHT, 2, measured({4: 0.024, 8: 0.050}))


def test_what_nobody_has_seen_is_tried_and_then_it_has_been_seen():
    times = measured({4: 0.024})
    assert pays(EIGHT, 2, times)
    times.add(FrameKind.DECODE, 8, 0.050)
    assert not pays(EIGHT, 2, times)


@pytest.mark.parametrize(
    ("crowd", "places"),
    [
        (EIGHT, 1),  # there is nothing to give
        (Crowd(1, 100, 64, 80), 2),  # a place is free
        (Crowd(8, 800, 6, 80), 2),  # more rows than a step may have
        (Crowd(8, 16_000, 64, 80), 2),  # 400 ms of copies
    ],
)
def test_there_are_cases_in_which_it_never_pays(crowd, places):
    assert not pays(crowd, places, measured({4: 0.024, 8: 0.028}))


def test_nothing_is_decided_on_a_route_that_has_not_been_measured():
    assert not pays(EIGHT, 2, StepTimes(1.0))


def test_four_stages_go_from_four_steps_to_three():
    crowd = Crowd(decoding=12, held_tokens=800, rows_max=64, prompt_rounds=80)
    assert pays(crowd, 4, measured({3: 0.020, 4: 0.026}))
    assert not pays(crowd, 4, measured({3: 0.020, 4: 0.027}))


def test_a_place_is_offered_to_the_first_prompt_and_kept_until_nobody_waits():
    place = PromptPlace(2, measured({4: 0.024, 8: 0.028}))
    assert (place.is_open, place.is_given) == (True, False)
    place.offer(EIGHT)
    assert (place.is_open, place.is_given) == (False, True)
    place.take_back()
    assert (place.is_open, place.is_given) == (True, False)


def test_a_prompt_that_is_soon_through_gets_no_place_and_is_not_asked_again():
    place = PromptPlace(2, measured({4: 0.024, 8: 0.028}))
    place.offer(Crowd(decoding=8, held_tokens=800, rows_max=64, prompt_rounds=3.9))
    assert (place.is_open, place.is_given) == (False, False)
