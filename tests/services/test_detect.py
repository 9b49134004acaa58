"""The detector measurement in small: damage is seen by its tier, clean streams by none, and the
classes are what they say."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from coordinator.corruption_detector import CorruptionDetector, ShadowResult, Tier
from coordinator.route import PROBE_PROMPTS
from coordinator.settings import SHADOW_TOLERANCE_FAST
from services import cli
from services.detect.measure import Detection, Measurement, Tally
from services.detect.streams import Company, Demand, StreamRun
from stage_worker.detect.faults import FAULTS, Fault, Recorded
from stage_worker.detect.rig import Rig
from stage_worker.envelope import Band, Envelope
from stage_worker.tiny_models import write_tiny_model
from stagemesh.sampling import SamplingSpec

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Rig:
    directory = tmp_path_factory.mktemp("detect")
    write_tiny_model(directory, "llama", layers=6)
    return Rig(directory, (0, 2, 4, 6), PROBE_PROMPTS)


def measured(rig: Rig, *names: str, streams: int = 4) -> Measurement:
    detection = Detection(
        rig,
        decode=lambda ids: "".join(chr(97 + token % 26) for token in ids),
        streams=streams,
        tokens=12,
        tolerance=0.0,
        seed=3,
    )
    return detection.run([BY_NAME[name] for name in names])


def test_there_are_enough_classes_and_each_has_one_place() -> None:
    assert len(FAULTS) >= 35
    assert len(BY_NAME) == len(FAULTS)
    places = ("wire", "sealed", "output", "cache", "weights", "sampler", "answer")
    for fault in FAULTS:
        assert sum(getattr(fault, place) is not None for place in places) == 1


def test_clean_streams_raise_no_alarm_in_any_tier(rig: Rig) -> None:
    result = measured(rig, streams=6)
    assert result.clean_tokens == 72
    assert set(result.false_alarms.values()) == {0}
    assert result.clean_gaps == []


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("wire zeroed", Tier.TRANSPORT),
        ("sealed zeroed", Tier.TRANSPORT),
        ("token dropped", Tier.PROTOCOL),
        ("one NaN", Tier.ENVELOPE),
        ("KV rewound", Tier.PROTOCOL),
    ],
)
def test_each_kind_of_damage_is_seen_by_its_tier(rig: Rig, name: str, tier: Tier) -> None:
    (tally,) = measured(rig, name).classes
    assert tally.noticed[tier] == tally.streams == 4


@pytest.mark.parametrize(
    "name", ["layers swapped", "KV lost", "skipped stage", "token altered", "KV of another request"]
)
def test_only_the_shadow_sees_what_computes_wrongly_and_plausibly(rig: Rig, name: str) -> None:
    (tally,) = measured(rig, name).classes
    assert tally.harmful > 0
    assert tally.recall(Tier.SHADOW) == 1.0
    assert tally.recall(Tier.TRANSPORT) == tally.recall(Tier.PROTOCOL) == 0.0


def test_clean_streams_side_by_side_are_those_alone_and_each_is_looked_at(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = SamplingSpec(temperature=0.7, seed=5)
    demands = [
        Demand(n, tuple(range(n, 2 * n + 2)), sampled if n % 2 else SamplingSpec(), 10)
        for n in range(1, 6)
    ]
    before = [stage.stage_counters["rows_batched"] for stage in rig.stages]
    together = Company(rig, demands).run()
    batched = [stage.stage_counters["rows_batched"] for stage in rig.stages]
    assert all(now - then == 5 * 9 for now, then in zip(batched, before, strict=True))
    assert [one.tokens for one in together] == [StreamRun(rig, d).run().tokens for d in demands]
    assert [one.fired for one in together] == [set()] * 5
    narrow = Envelope()
    narrow.set_band(Band(1e3, 1e3, 1e3), rig.stages[0].model.hidden_size)
    monkeypatch.setattr(rig, "envelopes", [narrow, *rig.envelopes[1:]])
    assert [one.fired for one in Company(rig, demands).run()] == [{Tier.ENVELOPE}] * 5


def test_the_shadows_recall_is_that_of_the_products_own_verdict(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def agrees(*_: object, **__: object) -> tuple[ShadowResult, tuple[()]]:
        return ShadowResult(0, 12), ()

    monkeypatch.setattr(CorruptionDetector, "check_scores", agrees)
    (tally,) = measured(rig, "layers swapped").classes
    assert tally.harmful > 0
    assert tally.recall(Tier.SHADOW) == 0.0


def test_a_fault_leaves_nothing_behind(rig: Rig) -> None:
    demand = Demand(1, (5, 6, 7, 8), SamplingSpec(), 10)
    before = StreamRun(rig, demand).run().tokens
    measured(rig, "other weights in a layer", "output doubled", "KV of another request", streams=2)
    assert StreamRun(rig, demand).run().tokens == before
    assert [stage.requests for stage in rig.stages] == [0, 0, 0]


def test_equal_seeds_give_equal_measurements(rig: Rig) -> None:
    first, second = (measured(rig, "wire burst", "KV position zero").as_json() for _ in range(2))
    assert first == second


def test_the_curve_loses_recall_as_the_tolerance_grows() -> None:
    result = Measurement(0.0, classes=[Tally("x", 4, 4, gaps=[0.0, 0.02, 0.3, -1.0])])
    result.clean_gaps = [1e-7]
    found = {point["tolerance"]: point for point in result.curve()}
    assert found[0.0]["recall"] == 0.75
    assert found[0.0]["false_alarm_tokens"] == 1
    assert found[0.1]["recall"] == 0.25
    assert found[0.1]["false_alarm_tokens"] == 0


@pytest.mark.parametrize("fault", [one for one in FAULTS if one.wire], ids=lambda one: one.name)
def test_every_wire_fault_changes_bytes_and_keeps_their_number(fault: Fault) -> None:
    payload = random.Random(1).randbytes(256)
    assert fault.wire is not None
    changed = fault.wire(payload, random.Random(2), Recorded(bytes(256), bytes(256)))
    assert changed != payload
    assert len(changed) == len(payload)


def test_the_command_prints_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("STAGEMESH_HOME", str(tmp_path))
    flags = ("--model", "tiny:layers=4", "--stages", "2", "--streams", "2", "--tokens", "8")
    status = cli.main(["detect", *flags, "--only", "wire z", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status == 0
    assert document["ok"] is True
    (tally,) = document["classes"]
    assert set(tally) == {"name", "streams", "harmful", "recall", "noticed"}
    assert set(document["false_alarms"]) == {"T0", "T1", "T2", "T3", "T4"}
    assert document["clean_tokens"] == 16
    assert document["tolerance"] == 0.0
    assert cli.main(["detect", *flags, "--only", "wire z"]) == 0
    assert "wire zeroed" in capsys.readouterr().out


def test_a_model_too_small_for_its_stages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("STAGEMESH_HOME", str(tmp_path))
    assert cli.main(["detect", "--model", "tiny:layers=4", "--stages", "3"]) == 2
    assert "two layers" in capsys.readouterr().err


def test_the_page_measures_the_tolerance_that_is_the_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "detection.md").read_text()
    stated = re.findall(r"at the default, ([\d.]+): T0 0, T1 0, T2 0, T3 0,", page)
    assert stated
    assert {float(one) for one in stated} == {SHADOW_TOLERANCE_FAST}
    curves = re.findall(r"^\| ([\d.e-]+) \|.* (\d+) \|$", page, flags=re.MULTILINE)
    over = {int(tokens) for at, tokens in curves if float(at) >= SHADOW_TOLERANCE_FAST}
    assert over == {0}
    assert sum(int(count) for count in re.findall(r"(\d+) clean tokens", page)) >= 20_000
