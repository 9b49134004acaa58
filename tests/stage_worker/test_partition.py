"""Contiguous spans: optimal, exact covers, and refusals that name the layers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stage_worker.partition import balance, check_cover
from stagemesh.errors import InvalidConfiguration
from stagemesh.topology import Span

COSTS = st.lists(st.floats(0.0, 100.0), min_size=1, max_size=8)


def largest_cost(costs, spans, head_cost):
    return max(
        sum(costs[span.first : span.last]) + (head_cost if span.last == len(costs) else 0.0)
        for span in spans
    )


def every_partition(count, stages):
    for inner in itertools.combinations(range(1, count), stages - 1):
        cuts = (0, *inner, count)
        yield [Span(a, b) for a, b in itertools.pairwise(cuts)]


@given(costs=COSTS, head_cost=st.floats(0.0, 100.0), data=st.data())
def test_no_other_contiguous_partition_has_a_smaller_largest_cost(costs, head_cost, data):
    stages = data.draw(st.integers(1, len(costs)))
    spans = balance(costs, stages, head_cost=head_cost)
    check_cover(spans, len(costs))
    assert len(spans) == stages
    best = min(
        largest_cost(costs, candidate, head_cost)
        for candidate in every_partition(len(costs), stages)
    )
    assert largest_cost(costs, spans, head_cost) == pytest.approx(best)


def test_equal_layers_give_spans_that_differ_by_at_most_one_layer():
    sizes = [len(span) for span in balance([1.0] * 30, 4)]
    assert sorted(sizes) == [7, 7, 8, 8]


def test_a_costly_head_leaves_the_last_stage_fewer_layers():
    sizes = [len(span) for span in balance([1.0] * 30, 3, head_cost=8.0)]
    assert sizes == [12, 13, 5]


def test_more_stages_than_layers_are_refused():
    with pytest.raises(InvalidConfiguration, match="2 layers cannot be split over 3 stages"):
        balance([1.0, 1.0], 3)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_a_cost_that_is_no_cost_is_refused(cost):
    with pytest.raises(InvalidConfiguration):
        balance([1.0, cost], 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0-12,13-30", "no stage hosts layers 12-13"),
        ("1-30", "no stage hosts layers 0-1"),
        ("0-29", "no stage hosts layers 29-30"),
        ("0-12,10-30", "layers 10-12 are hosted by more than one stage"),
        ("0-31", "layers 30-31 do not exist"),
        ("0-12,", "is not FIRST-LAST"),
        ("12-0", "empty or negative"),
    ],
)
def test_spans_that_do_not_cover_each_layer_once_are_refused_by_name(text, complaint):
    with pytest.raises(InvalidConfiguration, match=complaint):
        check_cover([Span.parse(part) for part in text.split(",")], 30)
