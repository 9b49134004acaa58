"""How long a step of a route may honestly take."""

from coordinator.step_times import StepTimes
from stagemesh.frame import FrameKind


def test_an_unmeasured_route_is_expected_to_be_slow_and_prefill_scales_with_its_tokens():
    times = StepTimes(1.0)
    assert times.expected_s(FrameKind.DECODE, 1) == 1.0
    assert times.expected_s(FrameKind.PREFILL, 256) == 1.0
    times.add(FrameKind.PREFILL, 100, 1.0)
    times.add(FrameKind.DECODE, 1, 0.05)
    assert times.expected_s(FrameKind.PREFILL, 200) > 2.0
    assert times.expected_s(FrameKind.DECODE, 1) < 0.2


def test_decode_steps_are_known_by_their_size_to_the_power_of_two():
    times = StepTimes(1.0)
    assert times.decode_s(8) is None
    times.add(FrameKind.DECODE, 8, 0.05)
    times.add(FrameKind.DECODE, 3, 0.02)
    times.add(FrameKind.PREFILL, 8, 9.0)
    assert times.decode_s(8) == times.decode_s(15) == 0.05
    assert times.decode_s(2) == 0.02
    assert times.decode_s(4) is None
