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
