"""Every limit the decisions obey, in one frozen policy.

The numbers below are defaults for one mesh on one site; the composition root may replace any of
them. Names carry their unit: ``_s`` seconds, ``_tokens`` cached positions, ``_max`` a limit that is
refused or waited for, never silently exceeded. Each number says what breaks when it is much smaller
or larger.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields

from coordinator.failure_detector import DetectorPolicy
from stagemesh.errors import InvalidConfiguration

SHADOW_TOLERANCE_FAST = 0.05
"""Logits. For matrix libraries that are not bit-exact: over ten times the largest difference that
honest workers have shown (`stagemesh detect --fast`)."""
ROUNDING = {"f16": 2.0, "bf16": 10.0}
"""By how much a tolerance in logits widens where models compute with fewer bits than float32 has.
At the defaults it comes to four steps between neighbouring bfloat16 numbers from 16 to 32, where
the largest logits often lie, and to six of float16; honest near ties were seen to miss by one."""


class FallbackPolicy(enum.Enum):
    """Where a request goes whose route is lost.

    ALLOW: whichever open route can take it first, which is nearly always the full worker.
    PREFER_SPARE: wait for a pipeline formed with spare stages if one can be planned, else as ALLOW.
    FORBID: only ever another pipeline; the full worker is used only by a mesh that has no stages at
    all.
    """

    ALLOW = "allow"
    PREFER_SPARE = "prefer_spare"
    FORBID = "forbid"


@dataclass(frozen=True, slots=True)
class MeshPolicy:
    """Limits of one mesh. ``check`` raises InvalidConfiguration for the first contradiction.

    Admission
        requests_running_max: requests with a cache at once; above it they queue.
        queue_length_max: requests that wait; above it callers get Overloaded with a retry time.
        queue_wait_s_max: longest wait in the queue while a route is open.
        route_wait_s_max: longest wait for any route at all, so that callers may come before
            workers do.
        pipeline_wait_s_max: how long a new request prefers a pipeline that is being opened over an
            open full worker. Larger makes the first answers after start wait, smaller loads the
            full worker.
        context_tokens_max: prompt plus answer; the model's own context. Longer answers are cut
            there.
        vocab_size: token ids are below it; a token at or above it is refused as corrupt.
        retry_after_s: what an overloaded caller is told.

    Scheduling
        microbatches_in_flight: steps in flight per route; 0 means as many as the route has stages.
        rows_per_step_max: most requests computed together in one decode step.
        prefill_chunk_tokens: prompt tokens per step. Smaller keeps more stages busy and suits a
        CPU's caches (measured: 2.2 ms a token at 64 and 128, 2.6 at 256, 3.2 at 512); larger suits
        a GPU.
        prefill_chunk_tokens_shared: at most so many while other requests decode on the route; fewer
        where a chunk would take longer than a round of their steps.

    Opening a route
        barrier_timeout_s: how long every worker has to arrive.
        link_timeout_s: how long the coordinator's own hop may take to connect.
        probe_timeout_s: how long all probe steps may take: the first forward after load is slow.
        probe_margin_tolerance: two routes may choose different probe tokens only if either's top-2
            margin is at most this (float32 logits; see `ROUNDING`). 0 demands equality.
        reopen_wait_s, reopen_wait_s_max: wait before opening again after a failed attempt; doubles.

    Detection
        check_interval_s: how often deadlines are looked at while work is in flight.
        step_expected_s: assumed duration of a step before any was measured on the route.
        stall_s_min, stall_factor: when no step has come back for this long although no worker of
            the route is computing one, frames vanish on a hop: the route is closed, its workers
            stay.
        canary_interval_s: an idle route is asked its first probe again this often, so that
            readiness means that it makes tokens.
        detector: how single workers are judged; see ``failure_detector``.

    Recovery
        rewinds_per_route_max, replays_per_route_max: tries of those rungs for one request on one
            route.
        fruitless_recoveries_max: after this many recoveries in a row that brought no new token a
            request fails; one that goes on may be recovered as often as it takes.
        recoveries_burst_max, recoveries_per_s: token bucket of recoveries of the whole mesh.
        fallback: see FallbackPolicy.
        spare_wait_s_max: how long a displaced request prefers a pipeline that is being opened with
            spare stages. The client sees this as a pause, so it is short.
        fallback_requests_max: displaced requests computed at once on one full worker.
        fallback_queue_max: displaced requests waiting; above it the newest fail.
        fallback_wait_s_max: how long a displaced request waits for a route.
        corruptions_consecutive_max: corruptions of one worker before it is quarantined.
        corruption_window_steps: clean steps that end a series of corruptions.
        reinitialise_attempts_max, reinitialise_timeout_s: reloads before a quarantined worker is
            given up until its process restarts.
        breaker_base_s, breaker_max_s: how long a failed worker is kept out; doubles per failure.
        breaker_reset_s: time without failure after which the doubling starts over.

    Verification
        shadow_chunk_tokens: accepted tokens scored at once behind a stream. Smaller verifies sooner
        and costs more steps of the full worker.
        shadow_tolerance: where kernels are not bit-exact, a token is accepted whose score is within
            this of the full worker's best (float32 logits; see `ROUNDING` for shorter ones). Where
            all are, equality is demanded.
        live_steps_per_score: steps of live requests on a full worker between two score steps, so
            that shadows never hold up streams that were moved there.
        verification_wait_s_max: how long an answer may wait to be verified before it ends (or, if
            it may only be delivered verified, fails).
        audit_budget: share of compute for shadowing streams that did not ask. 0 is no audits.
        audit_first_streams: streams of a newly opened route that are always audited.
        examine_tokens_max: tokens computed again to find the stage that is to blame.
        boundary_tolerance: how far an honest stage's activation may be from the full worker's,
            relative to its root mean square, where kernels are not bit-exact.

    Memory of the past
        generations_kept_max: ended requests that admin calls can still describe.
        gone_worker_kept_s: how long a worker that went away is still listed, with what is held
            against its name. One that owes the mesh a reload is kept until it comes back.
    """

    requests_running_max: int = 64
    queue_length_max: int = 256
    queue_wait_s_max: float = 120.0
    route_wait_s_max: float = 30.0
    pipeline_wait_s_max: float = 2.0
    context_tokens_max: int = 8192
    vocab_size: int = 2**31
    retry_after_s: float = 1.0

    microbatches_in_flight: int = 0
    rows_per_step_max: int = 64
    prefill_chunk_tokens: int = 128
    prefill_chunk_tokens_shared: int = 64

    barrier_timeout_s: float = 10.0
    link_timeout_s: float = 5.0
    probe_timeout_s: float = 30.0
    probe_margin_tolerance: float = 0.05
    reopen_wait_s: float = 0.25
    reopen_wait_s_max: float = 15.0

    check_interval_s: float = 0.1
    step_expected_s: float = 1.0
    stall_s_min: float = 3.0
    stall_factor: float = 10.0
    canary_interval_s: float = 15.0
    detector: DetectorPolicy = field(default_factory=DetectorPolicy)

    rewinds_per_route_max: int = 1
    replays_per_route_max: int = 1
    fruitless_recoveries_max: int = 8
    recoveries_burst_max: int = 256
    recoveries_per_s: float = 8.0
    fallback: FallbackPolicy = FallbackPolicy.PREFER_SPARE
    spare_wait_s_max: float = 0.5
    fallback_requests_max: int = 32
    fallback_queue_max: int = 256
    fallback_wait_s_max: float = 30.0
    corruptions_consecutive_max: int = 3
    corruption_window_steps: int = 200
    reinitialise_attempts_max: int = 3
    reinitialise_timeout_s: float = 120.0
    breaker_base_s: float = 0.5
    breaker_max_s: float = 30.0
    breaker_reset_s: float = 60.0

    shadow_chunk_tokens: int = 16
    shadow_tolerance: float = SHADOW_TOLERANCE_FAST
    live_steps_per_score: int = 4
    verification_wait_s_max: float = 30.0
    audit_budget: float = 0.02
    audit_first_streams: int = 2
    examine_tokens_max: int = 512
    boundary_tolerance: float = 0.02

    generations_kept_max: int = 1000
    gone_worker_kept_s: float = 900.0

    def check(self) -> None:
        """Raise InvalidConfiguration naming the first setting that is out of range."""
        may_be_zero = {
            "microbatches_in_flight",
            "probe_margin_tolerance",
            "shadow_tolerance",
            "audit_budget",
            "audit_first_streams",
        }
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, FallbackPolicy | DetectorPolicy):
                continue
            if value < 0 or (value == 0 and item.name not in may_be_zero):
                raise InvalidConfiguration(
                    "setting is out of range", setting=item.name, value=value
                )
        if self.prefill_chunk_tokens_shared > self.prefill_chunk_tokens:
            raise InvalidConfiguration(
                "the shared prefill chunk must not be the larger one",
                setting="prefill_chunk_tokens_shared",
            )
