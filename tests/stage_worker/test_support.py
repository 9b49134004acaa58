"""The sweep over model types: exact or refused, never wrong, and bounded whatever a type does."""

import pytest

from stage_worker import support
from stage_worker.support import FAST_TYPES, Outcome, SupportReport, check_type, run_support
from stage_worker.tiny_models import model_types

REFUSED = {"gemma3n", "rwkv7"}


@pytest.mark.parametrize("model_type", FAST_TYPES)
def test_a_type_of_each_kind_is_exact_or_refused_with_a_reason(model_type):
    outcome = check_type(model_type)
    assert outcome.verdict == ("refused" if model_type in REFUSED else "exact"), outcome.detail
    assert bool(outcome.detail) is (model_type in REFUSED)


def test_an_activation_changed_on_the_way_is_found_wrong():
    def bend(array):
        return array * (1 + 1e-6)

    outcome = check_type("llama", roundtrip=bend)
    assert outcome.verdict == "wrong"
    assert "step 0 differs by" in outcome.detail


def test_a_sweep_in_child_processes_reports_every_type_it_was_given():
    seen = []
    report = run_support(
        ["rwkv7", "llama", "no_such_type"], progress=lambda *args: seen.append(args), processes=2
    )
    document = report.to_json()
    assert document["exact"] == ["llama"]
    assert [entry["model_type"] for entry in document["refused"]] == ["rwkv7"]
    assert [entry["model_type"] for entry in document["untestable"]] == ["no_such_type"]
    assert document["wrong"] == []
    assert report.ok
    assert sorted(done for _, done, _ in seen) == [1, 2, 3]
    assert document["environment"]["mlx"]


def test_a_type_that_hangs_or_dies_costs_its_time_and_no_other_type(monkeypatch):
    real = support._command()
    hang = [real[0], "-c", "import sys; sys.stdin.readline(); sys.stdin.readline()"]
    die = [real[0], "-c", "import sys; sys.stdin.readline(); sys.exit(7)"]
    commands = iter([hang, die, real])
    monkeypatch.setattr(support, "_command", lambda: next(commands))
    report = run_support(["a_hangs", "b_dies", "llama"], seconds_per_type=15.0)
    assert [outcome.verdict for outcome in report.outcomes] == ["untestable"] * 2 + ["exact"]
    assert [outcome.detail for outcome in report.outcomes[:2]] == [
        "took too long",
        "the process ended with status 7",
    ]


def test_a_wrong_type_makes_the_report_not_ok():
    report = SupportReport([Outcome("llama", "wrong", "step 3 differs by 0.1")])
    assert not report.ok
    assert report.to_json()["wrong"] == [{"model_type": "llama", "detail": "step 3 differs by 0.1"}]


def test_the_list_of_types_is_what_mlx_lm_ships():
    types = model_types()
    assert set(FAST_TYPES) <= set(types)
    assert len(types) > 100
    assert "cache" not in types


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_at_least_85_types_split_exactly_and_none_silently_wrong():
    report = run_support(processes=2)
    assert report.of("wrong") == []
    assert len(report.of("exact")) >= 85
