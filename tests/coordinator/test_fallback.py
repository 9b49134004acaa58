"""Where requests go, the first time and after their route was lost."""

import pytest

from coordinator.events import GenerationRequested
from coordinator.fallback import FallbackCoordinator
from coordinator.memory_worker import worker_info
from coordinator.route import LiveRoute, RoutePhase
from coordinator.scheduler import RouteScheduler
from coordinator.session import PendingRecovery, Session
from coordinator.settings import FallbackPolicy, MeshPolicy
from coordinator.token_validator import TokenValidator
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import Epoch, Route


def live(epoch, *spans, phase=RoutePhase.OPEN, began_at=0.0, kv_budget_tokens=0, policy=None):
    workers = tuple(
        worker_info(f"w{epoch}-{index}", span, kv_budget_tokens=kv_budget_tokens)
        for index, span in enumerate(spans)
    )
    route = Route(Epoch(epoch), workers)
    scheduler = RouteScheduler(route, policy or MeshPolicy())
    return LiveRoute(route, scheduler, epoch, 99.0, phase=phase, began_at=began_at)


def session(number=1, *, displaced=False, max_tokens=8):
    key = number.to_bytes(16, "big")
    demand = GenerationRequested(key, (1, 2), SamplingSpec(), max_tokens)
    one = Session.begin(demand, TokenValidator(100), context_tokens_max=100, now=0.0)
    if displaced:
        one.recovering = PendingRecovery("lost", "reroute", "w", (), 0.0, 0)
    return one


PIPELINE = ("0-3", "3-6")


def choose(one, routes, *, now=10.0, fallback=FallbackPolicy.PREFER_SPARE, has_stages=True, **more):
    coordinator = FallbackCoordinator(MeshPolicy(fallback=fallback, **more))
    return coordinator.choose(one, routes, now, has_stages=has_stages)


def test_a_new_request_prefers_the_pipeline_over_the_full_worker():
    choice = choose(session(), [live(1, "0-6"), live(2, *PIPELINE)])
    assert choice.route is not None
    assert choice.route.epoch == 2


def test_a_new_request_waits_a_moment_for_a_pipeline_that_opens_and_then_takes_the_full_worker():
    routes = [live(1, "0-6"), live(2, *PIPELINE, phase=RoutePhase.OPENING, began_at=9.0)]
    assert choose(session(), routes, pipeline_wait_s_max=2.0).route is None
    late = choose(session(), routes, now=11.5, pipeline_wait_s_max=2.0).route
    assert late is not None
    assert late.is_full


@pytest.mark.parametrize(
    ("fallback", "epoch"), [(FallbackPolicy.ALLOW, 1), (FallbackPolicy.PREFER_SPARE, None)]
)
def test_a_displaced_request_waits_for_spare_stages_only_if_policy_prefers_them(fallback, epoch):
    routes = [live(1, "0-6"), live(2, *PIPELINE, phase=RoutePhase.PROBING, began_at=9.9)]
    route = choose(session(displaced=True), routes, fallback=fallback).route
    assert (route.epoch if route else None) == epoch


def test_forbid_keeps_requests_off_the_full_worker_of_a_mesh_with_stages():
    one, routes = session(displaced=True), [live(1, "0-6")]
    assert choose(one, routes, fallback=FallbackPolicy.FORBID).route is None
    alone = choose(one, routes, fallback=FallbackPolicy.FORBID, has_stages=False).route
    assert alone is not None


def test_a_request_does_not_go_back_to_the_route_it_was_moved_from():
    one = session(displaced=True)
    one.avoid_epoch = 2
    choice = choose(one, [live(2, *PIPELINE)])
    assert choice.route is None
    assert not choice.hopeless


def test_a_request_no_cache_can_ever_hold_is_hopeless():
    choice = choose(session(max_tokens=50), [live(1, "0-6", kv_budget_tokens=20)])
    assert choice.hopeless


def test_a_request_waits_for_room_in_a_cache_that_could_hold_it():
    route = live(1, "0-6", kv_budget_tokens=20)
    route.scheduler.admit(session(1, max_tokens=12), 0.0)
    choice = choose(session(2), [route])
    assert (choice.route, choice.hopeless) == (None, False)


def test_displaced_requests_on_one_full_worker_are_bounded():
    route = live(1, "0-6")
    route.scheduler.admit(session(1, displaced=True), 0.0)
    route.scheduler.admit(session(2), 0.0)
    assert choose(session(3, displaced=True), [route], fallback_requests_max=1).route is None
    assert choose(session(3, displaced=True), [route], fallback_requests_max=2).route is route


def test_a_new_request_takes_no_room_that_a_displaced_one_waits_for():
    full, pipeline = live(1, "0-6"), live(2, *PIPELINE)
    full.scheduler.admit(session(1, displaced=True), 0.0)
    coordinator = FallbackCoordinator(MeshPolicy(fallback_requests_max=1))
    waiting = session(2, displaced=True)
    coordinator.enqueue(waiting)

    def goes_to(*routes):
        return coordinator.choose(session(3), routes, 10.0, has_stages=True).route

    assert goes_to(full) is None
    assert goes_to(full, pipeline) is pipeline
    waiting.avoid_epoch = full.epoch
    assert goes_to(full) is full


def test_the_line_is_bounded_and_every_wait_in_it_ends():
    coordinator = FallbackCoordinator(MeshPolicy(fallback_queue_max=2, fallback_wait_s_max=5.0))
    sessions = [session(number, displaced=True) for number in range(3)]
    for at, one in enumerate(sessions):
        one.detach(float(at))
    assert [coordinator.enqueue(one) for one in sessions] == [True, True, False]
    assert coordinator.overdue(4.9) == []
    assert coordinator.overdue(5.5) == sessions[:1]
    assert list(coordinator.displaced) == sessions[1:2]
