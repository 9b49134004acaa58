"""A stage divided over two real processes: as good as a whole one, and typed and final when its
members are not of one mind."""

from __future__ import annotations

import base64
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from services import codec, device_stage
from services.device_stage import DeviceOptions, DeviceStage
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import bytes_per_position
from stage_worker.loading import DTypePolicy
from stage_worker.stage import Stage
from stage_worker.tiny_models import write_tiny_model
from stagemesh.checksum import CHAIN_BYTES
from stagemesh.errors import BarrierBroken, EpochFenced, ModelRefused, RouteRefused
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.topology import Span

OPTIONS = DeviceOptions(2, collective_s_max=10.0, threads=2)
PROMPT = (5, 9, 2, 41, 7)
FINGERPRINT = b"mesh-001"


def divided(model: Path, span: Span | None = None) -> DeviceStage:
    facts = {"name": "divided", "dtype": DTypePolicy.F32, "kv_budget_tokens": 500}
    return DeviceStage(model, span, OPTIONS, **facts)


def whole(model: Path, span: Span | None = None) -> Stage:
    hosted = SpanModel.load(model, span, dtype=DTypePolicy.F32)
    return Stage(hosted, name="divided", kv_budget_tokens=500, clock_ns=time.time_ns)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory, "llama", layers=4)
    return directory


@pytest.fixture(scope="module")
def stage(model: Path) -> Iterator[DeviceStage]:
    """One group for the tests that leave it whole."""
    one = divided(model)
    yield one
    one.close()


def frame(kind: FrameKind, *rows: StepRow, epoch: int, step: int) -> StepFrame:
    return StepFrame(kind, FINGERPRINT, epoch, step, -1, 0, rows).sealed()


def opening(request: bytes) -> StepRow:
    start = RowOpening(SamplingSpec(), len(PROMPT), bytes(CHAIN_BYTES), 40)
    return StepRow(request, 0, PROMPT, samples=True, opening=start)


def answer_of(stage: Stage | DeviceStage, epoch: int, count: int) -> list[list[int]]:
    """Two requests side by side, greedily; the second joins a step later."""
    stage.open(epoch, 0, 1)
    keys = [b"a" * 16, b"b" * 16]
    tokens: list[list[int]] = []
    for number, key in enumerate(keys, 1):
        output = stage.step(frame(FrameKind.PREFILL, opening(key), epoch=epoch, step=number))
        tokens.append([output.rows[0].token.token_id])
    for step in range(count):
        rows = [
            StepRow(key, len(PROMPT) + step, (said[-1],), samples=True)
            for key, said in zip(keys, tokens, strict=True)
        ]
        output = stage.step(frame(FrameKind.DECODE, *rows, epoch=epoch, step=3 + step))
        for row, said in zip(output.rows, tokens, strict=True):
            assert row.status is RowStatus.OK
            row.token.verify()
            said.append(row.token.token_id)
    return tokens


def test_a_divided_stage_says_of_itself_what_a_whole_one_says(
    stage: DeviceStage, model: Path
) -> None:
    other = whole(model)
    for fact in ("span", "layer_count", "fingerprint", "span_fingerprint"):
        assert getattr(stage.model, fact) == getattr(other.model, fact)
    assert stage.model.dtype == str(other.model.dtype)
    assert stage.capabilities == other.capabilities
    assert other.model.nbytes < stage.model.nbytes < 2 * other.model.nbytes
    assert stage.model.kv_bytes_per_position == bytes_per_position(other.model)
    assert len(stage.pids) == OPTIONS.size


def test_greedy_tokens_of_rows_side_by_side_are_those_of_a_whole_stage(
    stage: DeviceStage, model: Path
) -> None:
    assert answer_of(stage, 3, 12) == answer_of(whole(model), 3, 12)
    assert stage.kv_tokens == 2 * (len(PROMPT) + 12)
    assert stage.last_timings.batched == 2
    stage.fence(3)
    assert stage.kv_tokens == 0


def test_activations_differ_only_by_the_rounding_of_a_divided_sum(model: Path) -> None:
    span = Span(0, 2)
    one, other = divided(model, span), whole(model, span)
    try:
        outputs = []
        for each in (one, other):
            each.open(1, 0, 2)
            step = frame(FrameKind.PREFILL, opening(b"c" * 16), epoch=1, step=1)
            outputs.append(np.frombuffer(each.step(step).tensor.payload, np.float32))
    finally:
        one.close()
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_what_all_members_refuse_alike_is_refused_and_the_group_goes_on(stage: DeviceStage) -> None:
    stage.open(10, 0, 1)
    with pytest.raises(RouteRefused):
        stage.open(11, 0, 2)
    with pytest.raises(EpochFenced):
        stage.open(9, 0, 1)
    with pytest.raises(EpochFenced):
        stage.step(frame(FrameKind.PREFILL, opening(b"d" * 16), epoch=9, step=1))
    stage.open(12, 0, 1)
    lost = StepRow(b"e" * 16, 4, (1,), samples=True)
    output = stage.step(frame(FrameKind.DECODE, lost, epoch=12, step=1))
    assert output.rows[0].status is RowStatus.CACHE_LOST


def test_members_that_were_not_given_the_same_frame_refuse_it(model: Path) -> None:
    one = divided(model)
    one.open(1, 0, 1)
    commands = []
    for token in (6, 7):
        row = StepRow(b"f" * 16, 0, (token,), samples=True)
        bytes_of = codec.encode_whole(frame(FrameKind.PROBE, row, epoch=1, step=1))
        text = base64.b64encode(bytes_of).decode()
        commands.append({"do": "step", "frame": text, "now_unix_ns": 1})
    pids = one.group.pids
    with pytest.raises(BarrierBroken, match="state of member"):
        one.group.run_each(commands)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_members_that_come_to_different_outputs_give_none(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (sys.executable, str(Path(__file__).with_name("two_minded_member.py")))
    monkeypatch.setattr(device_stage, "MEMBER_PROGRAM", program)
    one = divided(model)
    one.open(1, 0, 1)
    with pytest.raises(BarrierBroken, match="state of member"):
        one.step(frame(FrameKind.PREFILL, opening(b"g" * 16), epoch=1, step=1))
    assert one.group.pids == ()
    with pytest.raises(BarrierBroken, match="has ended"):
        one.open(2, 0, 1)
    one.fence(2)  # There is nothing left to free.


def test_members_that_time_their_kernels_differently_still_compute_alike(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (sys.executable, str(Path(__file__).with_name("odd_kernels_member.py")))
    monkeypatch.setattr(device_stage, "MEMBER_PROGRAM", program)
    one = divided(model)
    try:
        one.open(1, 0, 1)
        output = one.step(frame(FrameKind.PREFILL, opening(b"h" * 16), epoch=1, step=1))
    finally:
        one.close()
    assert output.rows[0].status is RowStatus.OK


@pytest.mark.parametrize(
    ("kind", "said"), [("gpt2", "cannot divide this model type"), ("llama", "cannot be divided by")]
)
def test_a_model_that_cannot_be_divided_is_refused_and_no_process_stays(
    tmp_path: Path, kind: str, said: str
) -> None:
    write_tiny_model(tmp_path, kind, layers=2)
    options = DeviceOptions(3, collective_s_max=10.0, threads=1)
    before = set(psutil.Process().children())
    with pytest.raises(ModelRefused, match=said):
        DeviceStage(tmp_path, None, options, name="x", dtype=DTypePolicy.F32, kv_budget_tokens=100)
    assert not set(psutil.Process().children()) - before
