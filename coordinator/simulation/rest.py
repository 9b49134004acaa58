"""I7: what must be gone when everything has come to rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.simulation.world import World

COPIES_SPARE = 3
"""Retransmissions beyond what the faults explain, where only messages suffered."""


def leftovers(world: World) -> list[str]:
    """Whatever is left of requests that have ended and routes that are closed, in words."""
    return [*_at_the_coordinator(world), *_at_workers(world)]


def _at_the_coordinator(world: World) -> list[str]:
    coordinator = world.coordinator
    state = coordinator.mesh.state
    left = []
    if state.sessions:
        left.append(f"{len(state.sessions)} sessions")
    for live in state.routes.values():
        scheduler = live.scheduler
        if scheduler.sessions or scheduler.reserved_tokens:
            left.append(f"{live} still serves {len(scheduler.sessions)} requests")
        if scheduler.steps.outstanding:
            left.append(f"{live} still waits for steps {list(scheduler.steps.outstanding)[:4]}")
    for name in state.workers:
        owed = state.detector.owed(name)
        if owed:
            left.append(f"{name} is still held to owe {owed} steps")
    links = coordinator.links
    left += [
        f"the coordinator keeps an end of closed epoch {epoch}"
        for epoch in (*links.links, *links.servicer.endpoints)
        if epoch not in state.routes
    ]
    left += [
        f"epoch {epoch}: {link.sender.unacknowledged} frames in the ledger"
        for epoch, link in links.links.items()
        if link.sender.unacknowledged
    ]
    return left


def _at_workers(world: World) -> list[str]:
    routes = world.coordinator.mesh.state.routes
    left = []
    for worker in world.workers.values():
        if not worker.process.alive:
            continue
        if worker.runner.stage is not None and worker.runner.stage.caches:
            left.append(f"{worker.name} keeps {len(worker.runner.stage.caches)} caches")
        if worker.link is not None and worker.link.sender.unacknowledged:
            left.append(f"{worker.name} keeps {worker.link.sender.unacknowledged} frames")
        left += [
            f"{worker.name} keeps an endpoint of closed epoch {epoch}"
            for epoch in worker.servicer.endpoints
            if epoch not in routes
        ]
        if worker.runner.queued:
            left.append(f"{worker.name} has {worker.runner.queued} frames queued")
    return left


def judge_economy(world: World) -> None:
    """I11: what was done twice is bounded by what was damaged, lost or late, and the budget; and
    while only messages suffered, no route was given up."""
    outcome, watch = world.outcome(), world.context.watch
    again = outcome.counters.get("frames_retransmitted", 0)
    checked = outcome.counters.get("frames_checked", 0)
    allowed = world.tally.faults + 0.1 * checked + COPIES_SPARE
    if not world.plan.gentle:
        broken = outcome.counters.get("links_reopened", 0) + world.context.network.lost
        links = 2 + len(world.workers) + len(world.gone)
        allowed += 2 * world.tally.faults + 40 * broken + 10 * links
    if again > allowed:
        said = f"{again} copies of {checked} frames with {world.tally.faults} faults"
        watch.violate("I11", said)
    lost = outcome.published.get("RouteClosed", 0)
    if world.plan.gentle and lost:
        watch.violate("I11", f"{lost} routes were given up although only messages suffered")
