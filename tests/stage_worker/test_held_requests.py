"""Session and cache of a request come, go back and go together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from stage_worker.held_requests import HeldRequests
from stage_worker.sessions import RowFault
from stagemesh.frame import FrameKind, RowStatus, StepRow

PROMPT = (5, 17, 42)


@pytest.fixture
def held(spans_of_llama: Any) -> HeldRequests:
    (model,) = spans_of_llama((0, 6))
    return HeldRequests(model, kv_budget_tokens=100)


def opening_row(rig: Any, reserve: int = 64) -> StepRow:
    opening = rig.opening_for("a", PROMPT, reserve=reserve)
    return StepRow(rig.key("a"), 0, PROMPT, True, opening)


def fault(status: RowStatus) -> RowFault:
    return RowFault(status, "as the test says")


def test_an_opening_holds_both_and_a_close_frees_both(held: HeldRequests, rig: Any) -> None:
    held.admit(FrameKind.PREFILL, opening_row(rig))
    assert (len(held.sessions), rig.key("a") in held.caches) == (1, True)
    held.forget(rig.key("a"))
    held.forget(rig.key("a"))
    assert (len(held.sessions), rig.key("a") in held.caches) == (0, False)
    assert held.sessions.reserved_tokens == 0


def test_a_second_opening_that_is_refused_leaves_nothing_of_the_first(
    held: HeldRequests, rig: Any
) -> None:
    held.admit(FrameKind.PREFILL, opening_row(rig))
    with pytest.raises(RowFault) as caught:
        held.admit(FrameKind.PREFILL, opening_row(rig, reserve=101))
    assert caught.value.status is RowStatus.CACHE_EXHAUSTED
    assert (len(held.sessions), rig.key("a") in held.caches) == (0, False)


def test_a_probe_is_held_by_nobody(held: HeldRequests, rig: Any) -> None:
    session = held.admit(FrameKind.PROBE, StepRow(rig.key("a"), 0, PROMPT, True))
    assert session.opening.prompt_length == len(PROMPT)
    assert (len(held.sessions), rig.key("a") in held.caches) == (0, False)


def test_a_row_that_failed_behind_its_forward_is_put_back(held: HeldRequests, rig: Any) -> None:
    session = held.admit(FrameKind.PREFILL, opening_row(rig))
    cache = held.caches.single(rig.key("a"), 0)
    forward(held, cache, PROMPT)
    session.consume(PROMPT)
    row = StepRow(rig.key("a"), 3, (9, 8))
    forward(held, cache, row.token_ids)
    session.consume(row.token_ids)
    held.put_back(row, session, fault(RowStatus.NON_FINITE))
    assert session.length == 3
    assert held.caches.single(rig.key("a"), 3)[0].offset == 3


def test_a_request_whose_forward_raised_is_forgotten(held: HeldRequests, rig: Any) -> None:
    row = opening_row(rig)
    session = held.admit(FrameKind.PREFILL, row)
    held.put_back(row, session, fault(RowStatus.COMPUTE_FAILED))
    assert (len(held.sessions), rig.key("a") in held.caches) == (0, False)


def forward(held: HeldRequests, cache: Any, token_ids: tuple[int, ...]) -> None:
    held.caches._model.forward(mx.array([token_ids]), None, cache)
