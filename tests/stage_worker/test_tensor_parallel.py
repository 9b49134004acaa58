"""Checked collectives on a real ring: right sums, and every way of being out of step refused."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from stage_worker.device_group import DeviceGroup
from stage_worker.mx_barrier import Meeting, Operation
from stage_worker.tensor_parallel import CheckedCollectives, divide, result_digest
from stagemesh.errors import BarrierBroken, FrameMalformed, ModelRefused

PROGRAM = (sys.executable, str(Path(__file__).with_name("ring_member.py")), "7", "2.0")


@pytest.fixture
def pair() -> Iterator[DeviceGroup]:
    with DeviceGroup(PROGRAM, 2, answer_s_max=8.0) as group:
        yield group


def a_sum(*values: float, tag: str = "layer.0", dtype: str = "f32") -> dict[str, object]:
    return {"do": "all_sum", "values": list(values), "tag": tag, "dtype": dtype}


def test_sums_and_gathers_are_right_and_the_same_on_every_member(pair: DeviceGroup) -> None:
    for dtype in ("f32", "f16", "bf16", "i32"):
        one, two = pair.run_each([a_sum(1, 2, dtype=dtype), a_sum(3, 5, dtype=dtype)])
        assert one["values"] == two["values"] == [4.0, 7.0]
        assert one["digest"] == two["digest"]
    gathers = [{"do": "all_gather", "values": [n], "tag": "heads"} for n in (1.5, 2.5)]
    assert [answer["values"] for answer in pair.run_each(gathers)] == [[1.5, 2.5]] * 2


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (a_sum(1, 2), a_sum(1, 2, dtype="f16"), "dtype"),
        (a_sum(1, 2), a_sum(1, 2, 3), "shape"),
        (a_sum(1, 2, tag="layer.0"), a_sum(1, 2, tag="layer.1"), "tag"),
        (a_sum(1), {"do": "all_gather", "values": [1], "tag": "layer.0"}, "operation"),
    ],
    ids=["dtype", "shape", "tag", "operation"],
)
def test_members_about_to_do_different_things_refuse_before_they_do_it(
    pair: DeviceGroup, one: dict[str, object], two: dict[str, object], said: str
) -> None:
    with pytest.raises(BarrierBroken, match=rf"member 0: {said}.*member 1: {said}"):
        pair.run_each([one, two])


def test_a_member_that_is_one_raw_operation_ahead_is_found_out_and_no_sum_comes_back(
    pair: DeviceGroup,
) -> None:
    with pytest.raises(BarrierBroken):
        pair.run_each([a_sum(*range(8)), {"do": "ahead", "values": list(range(8))}])
    assert pair.pids == ()


@pytest.mark.parametrize("how", ["stopped", "dead", "absent"])
def test_a_peer_that_does_not_come_ends_the_collective_in_time(pair: DeviceGroup, how: str) -> None:
    second: dict[str, object] = {"do": "nothing"}
    if how == "stopped":
        os.kill(pair.pids[1], signal.SIGSTOP)
    if how == "dead":
        second = {"do": "die"}
    with pytest.raises(BarrierBroken, match="member 0"):
        pair.run_each([a_sum(1.0), second])
    pair.restart()
    assert pair.run(a_sum(2.0))[0]["values"] == [4.0]


def checked() -> CheckedCollectives:
    return CheckedCollectives(Meeting(mx.distributed.init(), epoch=1, timeout_s=5.0))


def test_a_result_that_differs_between_members_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    collectives = checked()
    exchange = collectives.meeting.exchange

    def another_saw_other_bytes(own: list[int]) -> list[list[int]]:
        other = list(own)
        if own[3] == Operation.RESULT:
            other = collectives.meeting._statement(Operation.RESULT, (own[5], own[6] ^ 1))
        exchange(own)
        return [list(own), other]

    monkeypatch.setattr(collectives.meeting, "exchange", another_saw_other_bytes)
    with pytest.raises(BarrierBroken, match="result of member 1"):
        collectives.all_sum(mx.ones(4), tag="layer.0")
    with pytest.raises(BarrierBroken, match="result of member 1"):
        collectives.all_sum(mx.ones(4), tag="layer.1")


def test_only_arrays_that_can_travel_are_taken() -> None:
    for value in (mx.ones((1, 1, 1, 1, 1)), mx.array([True]), mx.array(1.0)):
        with pytest.raises(FrameMalformed):
            checked().all_sum(value, tag="layer.0")


def test_a_digest_is_of_the_exact_bytes() -> None:
    assert result_digest(mx.array([1.0, 2.0])) == result_digest(mx.array([1.0, 2.0]))
    assert result_digest(mx.array([1.0, 2.0])) != result_digest(mx.array([2.0, 1.0]))
    assert result_digest(mx.array([0.0])) != result_digest(mx.array([-0.0]))


class TwoOfItself:
    """A group that claims two members, to see which collectives a model begins."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def test_every_collective_that_a_model_begins_is_a_checked_one_while_it_computes() -> None:
    raw = mx.distributed.all_sum
    collectives = checked()
    before = collectives.meeting.sequence
    with collectives.governing():
        total = mx.distributed.all_sum(mx.ones((2, 3)), group=None)
        whole = mx.distributed.all_gather(mx.ones((2, 3)), stream=mx.cpu)
        for name in ("send", "recv", "recv_like", "all_max"):
            with pytest.raises(ModelRefused, match=name):
                getattr(mx.distributed, name)(mx.ones(2))
    assert total.tolist() == whole.tolist() == [[1.0] * 3] * 2
    assert collectives.meeting.sequence == before + 6  # Each between a statement and a comparison.
    assert mx.distributed.all_sum is raw


def test_a_model_that_divides_itself_wrongly_is_refused_with_its_own_words() -> None:
    class Model:
        def shard(self, group: object) -> None:
            raise ValueError("cannot split 7 experts")

    with pytest.raises(ModelRefused, match="cannot split 7 experts"):
        divide(Model(), {"model_type": "odd"}, TwoOfItself())
    with pytest.raises(ModelRefused, match="num_key_value_heads 3"):
        divide(Model(), {"text_config": {"num_key_value_heads": 3}}, TwoOfItself())
    with pytest.raises(ModelRefused, match="cannot divide this model type"):
        divide(object(), {"model_type": "odd"}, TwoOfItself())
