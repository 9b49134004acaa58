"""Planning: which workers can serve together."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.memory_worker import worker_info
from coordinator.route import (
    PROBE_PROMPTS,
    ProbeAnswer,
    explain_cover,
    plan_pipeline,
    probes_agree,
)
from stagemesh.topology import Span


def names(cover):
    return [worker.name for worker in cover] if cover else None


def stages(*spans):
    return [worker_info(f"stage-{index}", span) for index, span in enumerate(spans)]


def test_stages_that_cover_every_layer_once_form_a_pipeline_in_layer_order():
    workers = list(reversed(stages("0-2", "2-4", "4-6")))
    assert names(plan_pipeline(workers, cost={})) == ["stage-0", "stage-1", "stage-2"]


@pytest.mark.parametrize(
    "spans",
    [("0-2", "4-6"), ("0-3", "2-6"), ("2-6",), ("0-5",), ()],
    ids=["hole", "overlap", "no head", "no tail", "nobody"],
)
def test_anything_but_an_exact_disjoint_cover_is_no_pipeline(spans):
    assert plan_pipeline(stages(*spans), cost={}) is None


def test_a_full_worker_is_never_part_of_a_pipeline():
    assert plan_pipeline([worker_info("full", "0-6")], cost={}) is None


def test_a_spare_is_preferred_over_a_worker_that_failed():
    workers = [*stages("0-3", "3-6"), worker_info("spare", "3-6")]
    assert names(plan_pipeline(workers, cost={})) == ["stage-0", "spare"]
    assert names(plan_pipeline(workers, cost={"spare": 1.0})) == ["stage-0", "stage-1"]


def test_equal_costs_prefer_fewer_stages():
    workers = [*stages("0-2", "2-4", "4-6"), worker_info("wide", "2-6")]
    assert names(plan_pipeline(workers, cost={})) == ["stage-0", "wide"]


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 8)), max_size=10))
def test_whatever_is_planned_covers_every_layer_exactly_once(pairs):
    workers = [
        worker_info(f"w{index}", f"{first}-{last}", layer_count=8)
        for index, (first, last) in enumerate(pairs)
        if first < last
    ]
    cover = plan_pipeline(workers, cost={})
    spans = [worker.span for worker in workers if not worker.is_full]
    assert (cover is None) == (explain_cover(spans, 8) != "")
    if cover is not None:
        layers = [layer for worker in cover for layer in range(worker.span.first, worker.span.last)]
        assert layers == list(range(8))


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ((), "no worker hosts any of the 6 layers"),
        (("0-2", "4-6"), "layers 2-4 are hosted by nobody"),
        (("0-3", "2-6"), "span 2-6 overlaps the layers before 3"),
        (("0-3",), "layers 3-6 are hosted by nobody"),
        (("0-3", "3-6"), ""),
    ],
)
def test_a_missing_cover_is_explained(spans, said):
    assert explain_cover([Span.parse(span) for span in spans], 6) == said


def test_probes_that_differ_clearly_name_both_tokens_and_margins():
    ours = [ProbeAnswer(1, 3.0), ProbeAnswer(2, 0.5)]
    theirs = [ProbeAnswer(1, 3.0), ProbeAnswer(9, 0.7)]
    facts = probes_agree(ours, theirs, margin_tolerance=0.05)
    assert facts.startswith("probe 1: token 2 (margin 0.5000) here, token 9")


def test_a_near_tie_may_fall_either_way():
    ours, theirs = [ProbeAnswer(2, 0.04)], [ProbeAnswer(9, 0.7)]
    assert probes_agree(ours, theirs, margin_tolerance=0.05) == ""
    assert probes_agree(ours, theirs, margin_tolerance=0.0) != ""


def test_probe_prompts_are_legal_for_the_smallest_vocabulary():
    assert all(0 <= token < 32 for prompt in PROBE_PROMPTS for token in prompt)
