"""What two accounts of the same tokens say of who computed wrongly."""

from dataclasses import replace

import pytest

from coordinator.examiner import Examination
from coordinator.memory_worker import worker_info
from stagemesh.frame import BoundaryDigest


def digest(layer):
    return BoundaryDigest(layer, 3, 1, 1.0, 1.0)


def examination():
    workers = tuple(worker_info(n, s) for n, s in zip("abc", ("0-2", "2-4", "4-6"), strict=True))
    return Examination((1, 2, 3, 4), workers, (1, 2), 0.02, bytes(16), 4)


def test_an_examination_that_finds_nothing_blames_nobody():
    one = examination()
    one.answers = {1: ((digest(2), digest(4)), 7), 2: ((digest(2), digest(4)), 7)}
    assert one.culprit() == ""


@pytest.mark.parametrize(
    ("ours", "token", "culprit"),
    [
        ((2, 1.3), 7, "a"),
        ((4, 1.3), 7, "b"),
        ((2, 1.005), 7, ""),
        ((4, float("nan")), 7, "b"),
        (None, 8, "c"),
    ],
)
def test_an_examination_names_the_first_stage_beyond_the_tolerance(ours, token, culprit):
    one = examination()
    assert one.culprit() is None
    answers = {2: digest(2), 4: digest(4)}
    if ours is not None:
        answers[ours[0]] = replace(answers[ours[0]], crc32c=9, projection=ours[1])
    one.answers = {1: (tuple(answers.values()), token), 2: ((digest(2), digest(4)), 7)}
    assert one.culprit() == culprit
