"""Stages that compute together share the cores; one whose turn it is has them all."""

import pytest

from stage_worker.core_use import CONTENDED_HOLD_S, CoreUse
from stage_worker.core_wait import CoreTimes
from stagemesh.frame import FrameKind, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec


def frame(kind=FrameKind.DECODE, first=5, samples=True, hop_to=1):
    opening = RowOpening(SamplingSpec(), 3, bytes(16), 10) if first == 0 else None
    row = StepRow(b"r" * 16, first, (1, 2, 3), samples, opening)
    return StepFrame(kind, b"12345678", 1, 1, hop_to - 1, hop_to, (row,))


class Stage:
    """Computes steps of one second each, on a clock of its own."""

    def __init__(self, share=1, most=2, stages=2):
        self.applied = []
        self.use = CoreUse(share, most, self.applied.append)
        self.now, self.stages = 100.0, stages

    def step(self, idle_s, one=None):
        self.now += idle_s
        self.use.begin(one or frame(), self.stages, self.now)
        self.now += 1.0
        self.use.end(self.now)
        return self.use.threads


def test_a_single_stream_lets_the_stage_whose_turn_it_is_have_every_core():
    stage = Stage()
    assert stage.step(50.0) == 1  # nothing is known yet
    assert [stage.step(1.1) for _ in range(6)][-3:] == [2, 2, 2]
    assert stage.applied == [2]


def test_a_full_pipe_shares_the_cores_from_its_first_busy_step_on():
    stage = Stage()
    for _ in range(6):
        stage.step(1.1)
    assert stage.use.threads == 2
    assert [stage.step(0.02) for _ in range(3)] == [1, 1, 1]
    assert stage.applied == [2, 1]


@pytest.mark.parametrize(
    ("share", "most", "idle_s", "threads"),
    [(1, 4, 3.0, 4), (1, 4, 1.0, 2), (4, 16, 3.0, 16), (8, 16, 1.0, 16), (2, 16, 7.0, 16)],
)
def test_the_more_stages_take_turns_the_more_cores_each_gets(share, most, idle_s, threads):
    stage = Stage(share, most, stages=4)
    for _ in range(12):
        stage.step(idle_s)
    assert stage.use.threads == threads


def test_chunks_of_a_long_prompt_flow_through_all_stages_and_share():
    stage = Stage()
    for _ in range(6):
        stage.step(1.1)
    first, later = frame(FrameKind.PREFILL, 0, samples=False), frame(FrameKind.PREFILL, 5)
    assert stage.step(1.1, first) == 1
    assert stage.step(1.1, later) == 1


def test_the_first_chunk_of_a_long_prompt_has_every_core_of_an_idle_first_stage():
    stage = Stage()
    for _ in range(4):
        stage.step(0.0)
    first = frame(FrameKind.PREFILL, 0, samples=False, hop_to=0)
    later = frame(FrameKind.PREFILL, 5, samples=False, hop_to=0)
    assert stage.step(60.0, first) == 2
    assert stage.step(0.0, later) == 1
    assert stage.step(0.0, first) == 1  # others keep the pipe full


def test_a_prompt_of_one_chunk_takes_turns_like_a_decode_step():
    stage = Stage()
    for _ in range(6):
        stage.step(1.1)
    assert stage.step(9.0, frame(FrameKind.PREFILL, 0)) == 2


def test_where_one_stage_is_the_whole_route_only_decoding_has_every_core():
    stage = Stage(stages=1)
    assert stage.step(0.0) == 2
    assert stage.step(0.0) == 2
    assert stage.step(0.0, frame(FrameKind.SCORE)) == 1  # an audit, beside others' streams


def test_most_is_never_below_the_share():
    assert CoreUse(4, 0, print).most == 4
    assert CoreUse(0, 0, print).share == 1


def test_threads_that_would_wait_for_a_core_are_not_asked_for():
    stage = Stage()
    for _ in range(6):
        stage.step(1.1)
    assert stage.use.threads == 2
    assert stage.applied == [2]
    stage.use.notice(CoreTimes(ran_s=0.5, waited_s=0.5), 0.5, stage.now)
    assert stage.applied == [2, 1]  # at once: a step under way may take long
    assert stage.step(1.1) == 1  # somebody else wants the cores
    stage.now += CONTENDED_HOLD_S
    assert stage.step(1.1) == 2  # tried again


def test_usual_waits_and_those_of_an_idle_process_change_nothing():
    stage = Stage()
    for _ in range(6):
        stage.step(1.1)
    stage.use.notice(CoreTimes(ran_s=0.6, waited_s=0.3), 0.5, stage.now)
    stage.use.notice(CoreTimes(ran_s=0.01, waited_s=0.09), 0.5, stage.now)  # its event loop
    assert stage.step(1.1) == 2
