"""Devices that meet, or break typed and in time: real rings of two processes, and the watchdog."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import psutil
import pytest

from stage_worker.device_group import DeviceGroup
from stage_worker.mx_barrier import Meeting, Operation, Watchdog, canonical
from stagemesh.errors import BarrierBroken, InvalidConfiguration

PROGRAM = (sys.executable, str(Path(__file__).with_name("ring_member.py")), "7", "2.0")
BARRIER = {
    "do": "barrier",
    "name": "open",
    "generation": 3,
    "state": {"weights": "ab", "span": "0-3"},
}


@pytest.fixture
def pair() -> Iterator[DeviceGroup]:
    with DeviceGroup(PROGRAM, 2, answer_s_max=8.0) as group:
        yield group


def gone(pids: tuple[int, ...]) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_members_with_the_same_state_meet_again_and_again(pair: DeviceGroup) -> None:
    for generation in range(1, 4):
        met = pair.run({**BARRIER, "generation": generation})
        assert met == [{"met": "open"}, {"met": "open"}]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"generation": 4}, "generation"),
        ({"name": "close"}, "name"),
        ({"state": {"weights": "cd", "span": "0-3"}}, "state"),
        ({"do": "all_sum", "values": [1.0], "tag": "x"}, "operation"),
    ],
)
def test_members_that_believe_different_things_both_refuse_and_say_what_differs(
    pair: DeviceGroup, other: dict[str, object], said: str
) -> None:
    pids = pair.pids
    with pytest.raises(BarrierBroken, match=said) as broken:
        pair.run_each([BARRIER, {**BARRIER, **other}])
    assert broken.value.metadata["members"] == "0,1"
    assert gone(pids)


def test_a_member_that_is_stopped_breaks_the_barrier_in_time_and_everybody_is_ended(
    pair: DeviceGroup,
) -> None:
    pids = pair.pids
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(BarrierBroken, match=r"member 0: .*not over after 2 s.*member 1: no answer"):
        pair.run(BARRIER)
    assert gone(pids)


def test_a_member_that_dies_breaks_the_barrier_and_the_group_starts_anew_a_bounded_number_of_times(
    pair: DeviceGroup,
) -> None:
    for _ in range(3):
        before = pair.generation
        with pytest.raises(BarrierBroken, match="status 3"):
            pair.run_each([BARRIER, {"do": "die"}])
        with pytest.raises(BarrierBroken, match="has ended"):
            pair.run(BARRIER)
        pair.restart()
        assert pair.generation > before
        assert pair.run(BARRIER) == [{"met": "open"}] * 2
    with pytest.raises(BarrierBroken, match="status 3"):
        pair.run_each([BARRIER, {"do": "die"}])
    with pytest.raises(BarrierBroken, match="restarts_max"):
        pair.restart()


def test_a_member_that_cannot_join_breaks_the_start() -> None:
    program = (sys.executable, "-c", "import sys; sys.exit(9)")
    with pytest.raises(BarrierBroken, match="status 9"):
        DeviceGroup(program, 2).start()


def test_a_failed_meeting_never_issues_a_second_collective(pair: DeviceGroup) -> None:
    commands = [{**BARRIER, "do": "again"}, {**BARRIER, "do": "again", "generation": 9}]
    with pytest.raises(BarrierBroken, match="generation"):
        pair.run_each(commands)


def alone(**facts: object) -> Meeting:
    return Meeting(mx.distributed.init(), epoch=5, timeout_s=5.0, **facts)


def test_a_member_alone_meets_itself_and_counts_its_collectives() -> None:
    meeting = alone()
    meeting.barrier("open", 1)
    meeting.barrier("open", 2, {"a": "b"})
    assert meeting.sequence == 2


def test_bytes_of_another_collective_are_recognised_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meeting = alone()
    monkeypatch.setattr(meeting, "exchange", lambda own: [[1, 2, *own[2:]]])
    with pytest.raises(BarrierBroken, match="out of step"):
        meeting.barrier("open", 1)
    with pytest.raises(BarrierBroken, match="out of step"):
        meeting.barrier("open", 2)


def test_a_statement_has_room_for_so_much_and_a_meeting_needs_a_limit() -> None:
    with pytest.raises(InvalidConfiguration):
        alone().agree(Operation.BARRIER, range(11), "abcdefghijk")
    with pytest.raises(InvalidConfiguration):
        Meeting(mx.distributed.init(), epoch=-1, timeout_s=1.0)
    assert canonical({"b": "1", "a": "2"}) == canonical({"a": "2", "b": "1"})


def test_the_watchdog_speaks_once_for_what_is_late_and_not_for_what_is_in_time() -> None:
    said: list[str] = []
    spoke = threading.Event()

    def end(why: str) -> None:
        said.append(why)
        spoke.set()

    watchdog = Watchdog(end=end)
    with watchdog.limit(30.0, "in time"):
        pass
    with watchdog.limit(0.01, "the ring"):
        assert spoke.wait(10.0)
    watchdog.close()
    assert said == ["the ring not over after 0.01 s"]
