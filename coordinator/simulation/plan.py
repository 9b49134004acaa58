"""What one seed stands for: a mesh, its requests, and the faults that will befall them.

Everything is drawn here, before the run, from the seed alone; the run then only decides *when* a
condition holds. A plan has up to two kinds of trouble: *noise*, a share of all hop messages that is
lost, late, repeated, overtaken or damaged while the noise lasts; and *shots*, single faults that
wait for a phase of one request. Then it *heals*: everything that was broken is repaired, and what
is still alive must come to an end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.echo import oracle
from coordinator.events import Delivery, GenerationRequested, Verification
from coordinator.failure_detector import DetectorPolicy
from coordinator.settings import FallbackPolicy, MeshPolicy
from coordinator.simulation.prng import Prng
from stagemesh.sampling import SamplingSpec
from stagemesh.transport import HopLimits

LAYERS = 6
VOCAB_SIZE = 997
STAGES_MAX = 4

PHASES = (
    "handshake",
    "first_prefill",
    "later_prefill",
    "first_token",
    "mid_decode",
    "last_token",
    "drain",
)
"""Where in a request's life a fault fires. ``first_token``: between prefill and first token."""

WIRE_FAULTS = (
    "drop",
    "duplicate",
    "delay",
    "heavy_delay",
    "reorder",
    "payload_bit",
    "swapped_blocks",
    "header_bit",
    "token_field",
    "truncate",
    "wrong_type",
    "wrong_fingerprint",
    "replay_old",
    "ack_drop",
    "ack_delay",
    "ack_duplicate",
    "ack_damage",
    "reset",
)
"""Faults of single hop messages, or of the connection that carries them."""

PROCESS_FAULTS = (
    "kill",
    "kill_for_good",
    "kill_full",
    "kill_two",
    "stop",
    "stop_long",
    "restart_empty",
    "restart_other_weights",
    "weights_swapped",
    "cache_lost",
    "cache_short",
    "compute_crash",
    "slow",
    "lie_mark",
    "lie_token",
    "lie_nan",
    "lie_compute",
    "half_open",
    "partition",
    "one_way_lost",
    "one_way_held",
    "swizzle",
    "control_reset",
    "control_delay",
    "coordinator_stop",
    "coordinator_kill",
    "journal_full",
    "journal_lost",
    "cancel",
)
"""Faults of processes, paths, control streams and clients."""

FAULTS = WIRE_FAULTS + PROCESS_FAULTS
GENTLE_RATE_MAX = 0.1
"""Share of messages that may suffer without a route being lost; less where frames travel in many
parts, each of which may suffer."""
FALLBACK_WAIT_S_SHORT = 0.3
"""Of a mesh that gives up requests in the middle of their answers, which then are resumed."""
LEDGER_SPARE = 16
"""Frames that a ledger takes beyond its window: what a scheduler has in flight, and cleaning up."""
FORBID_SHARE = 0.2
"""Of meshes whose displaced requests never go to the full worker."""
SMALL_FULL_SHARE, SMALL_FULL_TOKENS = 0.2, 40
"""Of meshes with stages whose full workers have so little room that half of the requests only fit
the pipeline."""
HARM_BORNE_MAX = 2
"""Harmful faults that a mesh with a full worker bears without failing a request."""
UNKEPT = frozenset({"journal_full", "journal_lost"})
"""What may cost any request: what cannot be kept, or is kept no more, ends by name."""
OTHERS = frozenset({"restart_other_weights", "weights_swapped"})
"""Behind a coordinator's death the mesh serves whatever weights come first, and does not finish
with them what was begun with others."""
GENTLE = frozenset(WIRE_FAULTS) | {"slow", "control_delay"}
"""What must never cost a request that has a route."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One fault: when request ``victim`` is in ``phase``, behind ``skip`` more occasions. ``place``
    and ``size`` in [0, 1) choose the stage and how bad it is."""

    fault: str
    phase: str
    victim: int
    skip: int
    place: float
    size: float


@dataclass(frozen=True, slots=True)
class Noise:
    """``rate``: share of hop messages; ``faults``: which; from ``begins`` to ``ends``."""

    rate: float = 0.0
    faults: tuple[str, ...] = ()
    begins: float = 0.0
    ends: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the workload."""

    demand: GenerationRequested
    arrives_at: float
    cancel_after: int | None = None
    stop_at: int | None = None
    resumes: int = 0
    """How often its client comes back for an answer that failed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module. ``cuts``: layer boundaries of the pipeline, empty for none."""

    seed: int
    cuts: tuple[int, ...]
    spares: tuple[int, ...]
    full_workers: int
    batch: bool
    asks: tuple[Ask, ...]
    noise: Noise
    shots: tuple[Shot, ...]
    drain_at: float | None
    drain_place: float
    policy: MeshPolicy
    limits: HopLimits
    kv_budget_tokens: int
    full_kv_budget_tokens: int
    """Of full workers; with stages beside them often less, so that some requests fit only those."""
    part_bytes: int
    step_s: float
    commit_s: float
    """How long the journal's disk takes."""
    gentle: bool
    """Only messages suffer, and not too many: no route may be lost over it."""
    must_succeed: bool
    """So little is broken, and there is so much room, that no request may fail."""
    heal_at: float


def draw_plan(seed: int) -> Plan:
    """The plan of a seed."""
    prng = Prng(seed)
    shape, work, trouble = prng.fork(), prng.fork(), prng.fork()
    stages = shape.choice((1, 2, 2, 3, 3, 3, 4))
    cuts = () if stages == 1 else _cuts(stages, shape)
    spares = (shape.below(stages),) if cuts and shape.chance(0.25) else ()
    full_workers = 1 if not cuts else int(shape.chance(0.9))
    full_workers += int(shape.chance(0.1))
    patience = Prng(seed ^ 0xC0BA)
    asks = tuple(replace(ask, resumes=patience.choice((0, 0, 1, 3))) for ask in _asks(work))
    noise, shots = _trouble(trouble, asks)
    policy = _policy(shape)
    impatient = patience.chance(0.25)
    if impatient:
        policy = replace(policy, fallback_wait_s_max=FALLBACK_WAIT_S_SHORT)
    if forbids := patience.chance(FORBID_SHARE):
        policy = replace(policy, fallback=FallbackPolicy.FORBID)
    roomy = min(policy.queue_length_max, policy.fallback_queue_max) > len(asks) and not impatient
    drain = any(shot.phase == "drain" for shot in shots)
    harmful = [shot.fault for shot in shots if shot.fault not in GENTLE]
    part_bytes = shape.choice((16, 48, 128, 2**20))
    gentle_rate = GENTLE_RATE_MAX if part_bytes >= 128 else GENTLE_RATE_MAX / 5
    gentle = not harmful and noise.rate <= gentle_rate and not drain
    unkept = bool(UNKEPT & set(harmful))
    unkept |= "coordinator_kill" in harmful and bool(OTHERS & set(harmful))
    has_fallback = bool(full_workers) and not forbids
    bearable = not unkept and noise.rate <= 0.1 and has_fallback and not drain
    batch, limits, kv_budget = shape.chance(0.8), _limits(shape), shape.choice((0, 0, 60, 140))
    small = bool(cuts) and patience.chance(SMALL_FULL_SHARE)
    return Plan(
        seed=seed,
        cuts=cuts,
        spares=spares,
        full_workers=full_workers,
        batch=batch,
        asks=asks,
        noise=noise,
        shots=shots,
        drain_at=trouble.uniform(0.05, 0.4) if drain else None,
        drain_place=trouble.random(),
        policy=policy,
        limits=limits,
        kv_budget_tokens=kv_budget,
        full_kv_budget_tokens=SMALL_FULL_TOKENS if small else kv_budget,
        part_bytes=part_bytes,
        step_s=shape.choice((0.002, 0.004, 0.01)),
        commit_s=shape.choice((0.0, 0.0004, 0.003, 0.02)),
        gentle=gentle,
        must_succeed=roomy and (gentle or (bearable and len(harmful) <= HARM_BORNE_MAX)),
        heal_at=trouble.uniform(2.5, 6.0),
    )


def _cuts(stages: int, prng: Prng) -> tuple[int, ...]:
    inner = prng.shuffled(range(1, LAYERS))[: stages - 1]
    return (0, *sorted(inner), LAYERS)


def _asks(prng: Prng) -> tuple[Ask, ...]:
    count = prng.choice((1, 2, 2, 3, 4, 5))
    return tuple(_ask(number + 1, prng) for number in range(count))


def _ask(number: int, prng: Prng) -> Ask:
    prompt = tuple(prng.below(VOCAB_SIZE) for _ in range(prng.choice((1, 3, 8, 14, 24, 40, 60))))
    sampling = SamplingSpec(temperature=prng.choice((0.0, 0.8)), seed=prng.below(2**32))
    stops = (
        frozenset(prng.below(VOCAB_SIZE) for _ in range(40)) if prng.chance(0.1) else frozenset()
    )
    max_tokens = prng.choice((1, 2, 5, 8, 12, 18))
    arrives_at = 0.02 + prng.uniform(0.0, prng.choice((0.05, 0.3, 1.5)))
    accepted: list[int] = []
    if prng.chance(0.08):  # begun elsewhere
        known = prng.below(max_tokens)
        accepted = oracle(prompt, known, layer_count=LAYERS, sampling=sampling) if known else []
        stops = frozenset()
    verification = Verification.SHADOW if prng.chance(0.25) else Verification.NUMERIC
    holds = verification is Verification.SHADOW and prng.chance(0.6)
    demand = GenerationRequested(
        number.to_bytes(16, "big"),
        prompt,
        sampling,
        max_tokens,
        stop_token_ids=stops,
        deadline=arrives_at + prng.uniform(0.05, 2.0) if prng.chance(0.05) else None,
        verification=verification,
        delivery=Delivery.VERIFIED if holds else Delivery.IMMEDIATE,
        accepted=tuple(accepted),
    )
    cancels = prng.chance(0.04)
    return Ask(
        demand,
        arrives_at,
        cancel_after=prng.below(max_tokens) if cancels else None,
        stop_at=prng.between(1, max_tokens) if not cancels and prng.chance(0.06) else None,
    )


def _trouble(prng: Prng, asks: tuple[Ask, ...]) -> tuple[Noise, tuple[Shot, ...]]:
    kind = prng.random()
    if kind < 0.02:
        return Noise(), ()
    noise = Noise()
    if prng.chance(0.9):
        faults: tuple[str, ...] = WIRE_FAULTS
        if prng.chance(0.4):
            faults = tuple(prng.shuffled(WIRE_FAULTS)[: prng.between(1, 4)])
        rate = prng.choice((0.02, 0.05, 0.1, 0.1, 0.2, 0.35))
        begins = prng.uniform(0.0, 0.1)
        noise = Noise(rate, faults, begins, begins + prng.uniform(0.5, 3.0))
    harm = 0.0 if kind < 0.35 else 0.85
    shots = tuple(_shot(harm, asks, prng) for _ in range(prng.between(2, 8)))
    return noise, shots


def _shot(harm: float, asks: tuple[Ask, ...], prng: Prng) -> Shot:
    """``harm``: share of faults that are more than a message's."""
    harms = prng.chance(harm)
    phase, victim = prng.choice(PHASES), prng.below(len(asks))
    if phase == "later_prefill":  # only long prompts have one
        victim = max(range(len(asks)), key=lambda index: len(asks[index].demand.prompt))
    return Shot(
        fault=prng.choice(PROCESS_FAULTS if harms else WIRE_FAULTS),
        phase=phase,
        victim=victim,
        skip=0 if harms else prng.choice((0, 0, 0, 1, 3)),
        place=prng.random(),
        size=prng.random(),
    )


def _policy(prng: Prng) -> MeshPolicy:
    chunk = prng.choice((4, 8, 16))
    fallback = prng.choice((FallbackPolicy.PREFER_SPARE, FallbackPolicy.ALLOW))
    return MeshPolicy(
        requests_running_max=prng.choice((1, 4, 64)),
        queue_length_max=prng.choice((2, 256, 256, 256)),
        queue_wait_s_max=20.0,
        route_wait_s_max=12.0,
        pipeline_wait_s_max=0.5,
        context_tokens_max=128,
        vocab_size=VOCAB_SIZE,
        microbatches_in_flight=prng.choice((0, 0, 1, 3)),
        rows_per_step_max=prng.choice((1, 2, 16)),
        prefill_chunk_tokens=chunk,
        prefill_chunk_tokens_shared=prng.choice((4, chunk)),
        barrier_timeout_s=3.0,
        link_timeout_s=3.0,
        probe_timeout_s=5.0,
        check_interval_s=0.1,
        step_expected_s=0.5,
        stall_s_min=1.5,
        canary_interval_s=5.0,
        detector=DetectorPolicy(stuck_floor_s=4.0, first_deadline_s=2.0, idle_failed_s=6.0),
        fallback=fallback,
        spare_wait_s_max=0.3,
        fallback_queue_max=prng.choice((1, 256, 256, 256)),
        fallback_wait_s_max=12.0,
        verification_wait_s_max=6.0,
        shadow_chunk_tokens=prng.choice((2, 16)),
        audit_budget=prng.choice((0.0, 0.02, 0.5)),
        breaker_base_s=0.25,
        breaker_max_s=3.0,
        reinitialise_timeout_s=4.0,
    )


def _limits(prng: Prng) -> HopLimits:
    frames = prng.choice((1, 2, 4, 32))
    return HopLimits(
        inflight_frames_max=frames,
        inflight_bytes_max=prng.choice((256, 4096, 2**20)),
        ledger_frames_max=frames + LEDGER_SPARE,
        retransmit_wait_s_initial=0.1,
        retransmit_wait_s_min=0.02,
        retransmit_wait_s_max=0.5,
        silence_s_max=2.0,
        hold_off_s=0.5,
    )
