"""The ladder, its budgets, breakers and quarantine."""

import pytest

from coordinator.events import GenerationRequested
from coordinator.instructions import RecoveryRecord
from coordinator.recovery import (
    KIND_OF_STATUS,
    LADDER,
    FaultKind,
    RecoveryManager,
    RequestFault,
    Rung,
    TokenBucket,
)
from coordinator.session import PendingRecovery, Session
from coordinator.settings import MeshPolicy
from coordinator.token_validator import TokenValidator
from stagemesh.frame import RowStatus
from stagemesh.sampling import SamplingSpec


def session(confirmed=3, accepted=0):
    demand = GenerationRequested(
        bytes(16), (1, 2, 3, 4), SamplingSpec(), 8, accepted=tuple(range(accepted))
    )
    one = Session.begin(demand, TokenValidator(100), context_tokens_max=100, now=0.0)
    one.attach(1, ("a", "b"), 0.0)
    one.stream.confirmed = confirmed
    return one


def climb(manager, one, kind, *, times=6):
    return [manager.choose(one, RequestFault(kind, kind.name), 0.0) for _ in range(times)]


def test_a_wrong_cache_length_climbs_rewind_replay_reroute():
    rungs = climb(RecoveryManager(MeshPolicy()), session(), FaultKind.POSITION_MISMATCH, times=4)
    assert rungs == [Rung.REWIND, Rung.REPLAY, Rung.REROUTE, Rung.REROUTE]


def test_nothing_confirmed_cannot_be_rewound():
    rungs = climb(RecoveryManager(MeshPolicy()), session(0), FaultKind.POSITION_MISMATCH, times=1)
    assert rungs == [Rung.REPLAY]


@pytest.mark.parametrize("kind", [FaultKind.CACHE_LOST, FaultKind.CORRUPTION])
def test_a_lost_or_corrupt_row_is_replayed_once_and_then_rerouted(kind):
    rungs = climb(RecoveryManager(MeshPolicy()), session(), kind, times=2)
    assert rungs == [Rung.REPLAY, Rung.REROUTE]


def test_a_refused_row_fails_at_once():
    rungs = climb(RecoveryManager(MeshPolicy()), session(), FaultKind.REFUSED, times=1)
    assert rungs == [Rung.FAIL]


def recovered(kept):
    return RecoveryRecord("SILENT", "reroute", "w", ("a",), ("b",), 2, kept, 4, 0.5)


@pytest.mark.parametrize(
    ("kept", "rung"),
    [
        ((5, 5), Rung.FAIL),
        ((0, 5, 5), Rung.FAIL),
        ((5,), Rung.REROUTE),
        ((0, 1, 2, 3, 4, 5), Rung.REROUTE),
        ((0, 0, 0, 4, 4, 4), Rung.REROUTE),
    ],
)
def test_a_request_is_not_recovered_for_ever_unless_it_goes_on(kept, rung):
    """A long answer on a bad day: what counts is that every recovery brings new tokens."""
    manager, one = RecoveryManager(MeshPolicy(fruitless_recoveries_max=2)), session(accepted=5)
    one.recoveries = [recovered(count) for count in kept]
    assert climb(manager, one, FaultKind.ROUTE_LOST, times=1) == [rung]


def test_a_recovery_under_way_counts():
    manager, one = RecoveryManager(MeshPolicy(fruitless_recoveries_max=1)), session(accepted=5)
    one.recovering = PendingRecovery("SILENT", "reroute", "w", ("a",), 0.0, 5)
    assert climb(manager, one, FaultKind.ROUTE_LOST, times=1) == [Rung.FAIL]


def test_a_mesh_that_falls_apart_fails_requests_instead_of_replaying_them_for_ever():
    policy = MeshPolicy(recoveries_burst_max=3, recoveries_per_s=1.0)
    manager = RecoveryManager(policy)
    rungs = climb(manager, session(), FaultKind.ROUTE_LOST, times=4)
    assert rungs == [Rung.REROUTE] * 3 + [Rung.FAIL]
    assert manager.choose(session(), RequestFault(FaultKind.ROUTE_LOST, ""), 1.5) is Rung.REROUTE
    assert manager.rungs_used[Rung.REROUTE] == 4


def test_every_row_status_but_ok_has_a_place_on_the_ladder():
    assert set(KIND_OF_STATUS) == set(RowStatus) - {RowStatus.OK}
    assert set(LADDER) == set(FaultKind)


def test_rungs_of_a_ladder_only_go_up():
    order = list(Rung)
    for rungs in LADDER.values():
        assert list(rungs) == sorted(rungs, key=order.index)


def test_the_breaker_doubles_and_starts_over_after_a_quiet_time():
    policy = MeshPolicy(breaker_base_s=1.0, breaker_max_s=3.0, breaker_reset_s=10.0)
    manager = RecoveryManager(policy)
    assert [manager.failed("w", now) - now for now in (0.0, 1.0, 2.0)] == [1.0, 2.0, 3.0]
    assert not manager.may_serve("w", 4.9)
    assert manager.may_serve("w", 5.0)
    assert manager.cost(3.0) == {"w": 3.0}
    assert manager.cost(30.0) == {}
    assert manager.failed("w", 20.0) == 21.0


def test_a_series_of_corruptions_is_quarantine_and_clean_steps_end_the_series():
    policy = MeshPolicy(corruptions_consecutive_max=3, corruption_window_steps=10)
    manager = RecoveryManager(policy)
    assert [manager.corrupted("w", 1, step) for step in (5, 9, 12)] == [False, False, True]
    manager.cleared("w")
    assert [manager.corrupted("w", 1, step) for step in (20, 25, 40)] == [False, False, False]


def test_a_series_goes_on_over_a_new_epoch():
    policy = MeshPolicy(corruptions_consecutive_max=2, corruption_window_steps=10)
    manager = RecoveryManager(policy)
    assert not manager.corrupted("w", 1, 500)
    assert manager.corrupted("w", 2, 4)


def test_a_bucket_refills_up_to_its_capacity():
    bucket = TokenBucket(capacity=2.0, rate_per_s=1.0, level=2.0)
    assert [bucket.take(0.0) for _ in range(3)] == [True, True, False]
    assert [bucket.take(100.0) for _ in range(3)] == [True, True, False]
