"""The stress command's usage."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess


def test_a_plan_that_does_not_exist_is_bad_usage(stress: Callable[..., CompletedProcess[str]]):
    done = stress("--faults", "flood")
    assert done.returncode == 2
    assert "flood" in done.stderr
    assert "black-hole" in done.stderr, "it says which faults there are"
