"""What a machine says of itself."""

from __future__ import annotations

import platform

import pytest

from stage_worker import machine


@pytest.mark.parametrize(
    ("configured", "prefix", "build"),
    [
        ("'--prefix=/opt/python' '--enable-shared'", "/opt/python", "plain"),
        ("'--enable-optimizations' '--with-lto'", "/usr/local", "optimized"),
        ("'--enable-shared' '--with-dtrace'", "/usr", "optimized"),
        (None, "C:\\Python", ""),
    ],
)
def test_how_python_was_compiled_is_told_from_its_options_or_its_place(configured, prefix, build):
    assert machine.build_of(configured, prefix) == build


def test_an_environment_says_which_python_a_figure_was_taken_with_and_how_that_was_compiled():
    found = machine.describe_environment()
    assert found["python"] == platform.python_version()
    assert found["python_build"] == machine.python_build()
