"""A process reports its own status, also where finalizing the interpreter would end it."""

import subprocess
import sys

import pytest

WORLD_ENDS = """
import atexit, os, sys
from services import cli

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

sys.stays = Aborts()  # finalization deletes it, as it unwinds the threads of C++ libraries
def command(words):
    atexit.register(lambda: print("hooks have run"))
    print("the command has run")
    {outcome}
cli._dispatch = command
sys.exit(cli.main())
"""


def end(outcome: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WORLD_ENDS.format(outcome=outcome)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("status", [0, 1, 2])
@pytest.mark.parametrize("way", ["return", "sys.exit"])
def test_the_status_is_the_commands_own_and_every_hook_has_run(way: str, status: int):
    done = end(f"{way}({status})")
    assert done.returncode == status, done.stderr
    assert done.stdout.split("\n") == ["the command has run", "hooks have run", ""]


def test_an_error_nobody_caught_is_a_failure_with_its_traceback():
    done = end("raise LookupError('what is this?')")
    assert done.returncode == 1
    assert "LookupError: what is this?" in done.stderr


def test_output_whose_reader_is_gone_changes_nothing():
    done = end("sys.stdout.close(); return 0")
    assert done.returncode == 0, done.stderr
