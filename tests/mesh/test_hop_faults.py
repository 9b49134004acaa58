"""Every fault on every hop of a mesh that answers: caught, named, healed, nothing computed twice.

The faults happen to serialized messages between a real coordinator and real workers. Each test
makes exactly one happen, to one step of one phase, proves that it did, and then holds the answer
against that of the undisturbed mesh, which is held against mlx-lm's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coordinator.settings import MeshPolicy
from services.fault_proxy import Fault, FaultKind, ScriptedFaults
from services.tokenizer import load_tokenizer
from stage_worker.loading import DTypePolicy
from stage_worker.tiny_models import write_tiny_model
from stagemesh.frame import FrameKind
from tests.mesh.own_loop_mesh import HOPS, NAMES, OwnLoopMesh, own_loop_mesh

PROMPT = "one fault on one hop of one step, " * 2
COUNT = 10
CHUNK_TOKENS = 16
PHASES = {"prefill": 1, "decode": 3}
"""Which step of its kind is struck: neither the first nor the last."""

PLAIN = [FaultKind.GARBAGE, FaultKind.HEADER_BIT, FaultKind.ROW_BIT, FaultKind.RELABEL_REQUEST]
PLAIN += [FaultKind.RELABEL_POSITION, FaultKind.WRONG_HOP, FaultKind.WRONG_FINGERPRINT]
ACTIVATION = [FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BLOCKS, FaultKind.SWAP_BF16, FaultKind.NAN]
ACTIVATION += [FaultKind.INFINITY, FaultKind.WRONG_DTYPE, FaultKind.WRONG_SHAPE]
ORDER = [
    FaultKind.DROP,
    FaultKind.DUPLICATE,
    FaultKind.REORDER,
    FaultKind.OLD_EPOCH,
    FaultKind.RESET,
]
ANSWERS = [FaultKind.DROP_ANSWER, FaultKind.DUPLICATE_ANSWER, FaultKind.DELAY]

CHECKSUM, MALFORMED = "CHECKSUM_MISMATCH", "FRAME_MALFORMED"


@dataclass(frozen=True)
class Case:
    """One fault, and what has to be seen of it at the receiver: a reason, or at least a counter."""

    kind: FaultKind
    hop: str
    phase: str
    resealed: bool = False
    reason: str = ""
    counter: str = ""

    def __str__(self) -> str:
        resealed = "-resealed" if self.resealed else ""
        return f"{self.kind.value}{resealed}-{self.hop}-{self.phase}"


def everywhere(kinds: list[FaultKind], **facts: str | bool) -> list[Case]:
    return [Case(kind, hop, phase, **facts) for kind in kinds for hop in HOPS for phase in PHASES]


def on(hops: str, kind: FaultKind, **facts: str | bool) -> list[Case]:
    return [Case(kind, hop, phase, **facts) for hop in hops.split() for phase in PHASES]


def damaged() -> list[Case]:
    """What checksums catch: the frame is refused and comes again."""
    cases = [
        case for case in everywhere(PLAIN, reason=CHECKSUM) if case.kind is not FaultKind.GARBAGE
    ]
    cases += everywhere([FaultKind.GARBAGE], reason=MALFORMED)
    cases += [case for kind in ACTIVATION for case in on("middle", kind, reason=CHECKSUM)]
    cases += on("middle", FaultKind.TRUNCATE, reason=MALFORMED)
    cases += on("middle last", FaultKind.CACHE_LENGTH, reason=CHECKSUM)
    return [*cases, Case(FaultKind.TOKEN_FIELD, "last", "decode", reason=CHECKSUM)]


def mislabelled() -> list[Case]:
    """What is wrong under true checksums, and a receiver can tell: it is asked for once more."""
    true = {"resealed": True}
    cases = everywhere([FaultKind.WRONG_HOP], reason="HOP_MISMATCH", **true)
    cases += everywhere([FaultKind.WRONG_FINGERPRINT], reason="FINGERPRINT_MISMATCH", **true)
    for kind in (FaultKind.NAN, FaultKind.INFINITY):
        cases += on("middle", kind, reason="NON_FINITE_ACTIVATION", **true)
    for kind in (FaultKind.WRONG_DTYPE, FaultKind.WRONG_SHAPE):
        cases += on("middle", kind, reason=MALFORMED, **true)
    rejected = {"reason": "TOKEN_REJECTED", "resealed": True}
    for kind in (FaultKind.TOKEN_FIELD, FaultKind.RELABEL_POSITION, FaultKind.RELABEL_REQUEST):
        cases.append(Case(kind, "last", "decode", **rejected))
    return cases


def out_of_order() -> list[Case]:
    """One request alone decodes a step at a time, so that there nothing can be overtaken."""
    seen = {
        FaultKind.DUPLICATE: {"counter": "duplicates_answered"},
        FaultKind.REORDER: {"reason": "SEQUENCE_GAP", "counter": "frames_held"},
        FaultKind.OLD_EPOCH: {"reason": "EPOCH_FENCED", "counter": "frames_fenced"},
        FaultKind.RESET: {"reason": "STAGE_UNREACHABLE"},
    }
    return [
        Case(kind, hop, phase, **seen.get(kind, {}))
        for kind in (*ORDER, *ANSWERS)
        for hop in HOPS
        for phase in PHASES
        if (kind, phase) != (FaultKind.REORDER, "decode")
    ]


SENDER = {"first": "", "middle": "stage-0", "last": "stage-1"}
"""Whom the mesh names for what was changed on a hop before it was sealed; the coordinator blames no
worker."""
RECEIVER = {"first": ("stage-0", "0→1"), "middle": ("stage-1", "1→-1")}
"""Who refuses a position that is not its cache's, and where that is seen: it cannot tell more."""


def made_wrong() -> list[Case]:
    """Wrong under true checksums, and only what lies behind the hop can tell: the ladder heals."""
    cases = []
    for kind in (FaultKind.PAYLOAD_BIT, FaultKind.SWAP_BLOCKS, FaultKind.SWAP_BF16):
        cases += on("middle", kind, resealed=True, counter="rows_failed.corrupted")
    cases += on("first middle", FaultKind.RELABEL_POSITION, resealed=True)
    cases += on("middle last", FaultKind.CACHE_LENGTH, resealed=True)
    cases += on("first middle", FaultKind.ROW_BIT, resealed=True, counter="frames_mislabelled")
    cases += on(
        "first middle", FaultKind.RELABEL_REQUEST, resealed=True, counter="frames_mislabelled"
    )
    for kind, phase, counter in (
        (FaultKind.ROW_BIT, "decode", "tokens_rejected.ordering"),
        (FaultKind.RELABEL_POSITION, "prefill", "tokens_rejected.ordering"),
        (FaultKind.RELABEL_REQUEST, "prefill", "frames_mislabelled"),
    ):
        cases.append(Case(kind, "last", phase, True, counter=counter))
    expected = {
        FaultKind.RELABEL_POSITION: "rows_failed.position_mismatch",
        FaultKind.CACHE_LENGTH: "tokens_rejected.duplication",
    }
    return [
        Case(one.kind, one.hop, one.phase, True, "", one.counter or expected[one.kind])
        for one in cases
    ]


@dataclass
class Standing:
    """One mesh, on one loop, for all tests of the module."""

    runner: asyncio.Runner
    mesh: OwnLoopMesh
    directory: Path
    reference: list[int] = field(default_factory=list)

    def answer(self) -> tuple[list[int], object]:
        return self.runner.run(self.mesh.generate(COUNT, text=PROMPT))


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    with a_standing(tmp_path_factory.mktemp("tiny"), DTypePolicy.AUTO) as one:
        yield one


@contextlib.contextmanager
def a_standing(directory: Path, dtype: DTypePolicy) -> Iterator[Standing]:
    write_tiny_model(directory, "llama", layers=4)
    policy = MeshPolicy(
        prefill_chunk_tokens=CHUNK_TOKENS,
        prefill_chunk_tokens_shared=CHUNK_TOKENS,
        canary_interval_s=3600.0,
        corruptions_consecutive_max=1000,
        breaker_base_s=0.01,
        breaker_max_s=0.02,
    )
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        standing = own_loop_mesh(directory, policy=policy, dtype=dtype)
        mesh = runner.run(stack.enter_async_context(standing))
        one = Standing(runner, mesh, directory)
        one.reference = one.answer()[0]
        try:
            yield one
        finally:
            runner.run(stack.aclose())


def strike(standing: Standing, case: Case) -> list[int]:
    """Let the fault happen and return the answer; fails unless it did happen where it should."""
    mesh, proxy = standing.mesh, standing.mesh.proxies[case.hop]
    standing.runner.run(mesh.settled())
    first = mesh.next_step
    chunks = -(-len(load_tokenizer(standing.directory).encode(PROMPT)) // CHUNK_TOKENS)
    step = first + PHASES[case.phase] + (0 if case.phase == "prefill" else chunks)
    proxy._copies.clear()
    proxy.fired.clear()
    proxy.plan = ScriptedFaults({step: [Fault(case.kind, case.resealed)]})
    sent_before = len(mesh.sent)
    try:
        tokens, _ = standing.answer()
    finally:
        proxy.plan = ScriptedFaults({})
    assert [fired.step for fired in proxy.fired] == [step]
    struck = next(frame for frame in mesh.sent[sent_before:] if frame.step == step)
    assert struck.kind is FrameKind[case.phase.upper()]
    return tokens


@pytest.mark.parametrize("case", [*damaged(), *mislabelled(), *out_of_order()], ids=str)
def test_a_transient_fault_is_caught_named_and_healed_and_nothing_is_computed_twice(
    standing: Standing, case: Case
) -> None:
    mesh = standing.mesh
    sent, computed = standing.runner.run(mesh.settled()), mesh.steps_computed()
    before, since = mesh.counters_at(case.hop), len(mesh.published)
    resent = mesh.counters_at_sender(case.hop).get("frames_retransmitted", 0)
    assert strike(standing, case) == standing.reference
    more = standing.runner.run(mesh.settled()) - sent
    assert dict.fromkeys(computed, more) == {
        name: after - computed[name] for name, after in mesh.steps_computed().items()
    }
    after = mesh.counters_at(case.hop)
    if case.counter:
        assert after[case.counter] > before.get(case.counter, 0)
    if case.kind is FaultKind.DROP:
        assert mesh.counters_at_sender(case.hop)["frames_retransmitted"] > resent
    if case.reason:
        assert (NAMES[case.hop], case.reason) in mesh.faults(since)
    if case.reason in {CHECKSUM, MALFORMED} or case.resealed:
        counter = f"frames_rejected.{case.reason.lower()}"
        assert after[counter] == before.get(counter, 0) + 1
    assert not [event for event in mesh.published[since:] if event.type == "RecoveryStarted"]


@pytest.mark.parametrize("case", made_wrong(), ids=str)
def test_what_was_made_wrong_before_it_was_sealed_is_caught_behind_the_hop_and_healed(
    standing: Standing, case: Case
) -> None:
    mesh = standing.mesh
    standing.runner.run(mesh.settled())
    before, since = mesh.counters_at("last"), len(mesh.published)
    assert strike(standing, case) == standing.reference
    after = mesh.counters_at("last")
    assert after[case.counter] > before.get(case.counter, 0)
    recoveries = [event for event in mesh.published[since:] if event.type == "RecoveryStarted"]
    assert recoveries
    told = [event for event in mesh.published[since:] if event.topic == "integrity"]
    named = [(event.worker, event.attributes.get("hop")) for event in told]
    refused = case.kind is FaultKind.RELABEL_POSITION and case.hop in RECEIVER
    assert (RECEIVER[case.hop] if refused else (SENDER[case.hop], NAMES[case.hop])) in named


def test_two_bfloat16_values_that_changed_places_are_found_on_the_wire_and_behind_it(
    tmp_path: Path,
) -> None:
    with a_standing(tmp_path, DTypePolicy.BF16) as one:
        for phase in PHASES:
            for resealed in (False, True):
                one.runner.run(one.mesh.settled())
                before, since = one.mesh.counters_at("last"), len(one.mesh.published)
                case = Case(FaultKind.SWAP_BF16, "middle", phase, resealed)
                assert strike(one, case) == one.reference
                after = one.mesh.counters_at("last")
                corrupted = "rows_failed.corrupted"
                assert (after.get(corrupted, 0) > before.get(corrupted, 0)) is resealed
                assert ((NAMES["middle"], CHECKSUM) in one.mesh.faults(since)) is not resealed


@pytest.mark.parametrize("stage", ["stage-0", "stage-1"])
def test_a_cache_that_is_one_position_short_is_refused_by_its_own_stage_and_healed(
    standing: Standing, stage: str
) -> None:
    mesh = standing.mesh

    async def answer() -> list[int]:
        await mesh.settled()
        runner = mesh.workers[stage].runner

        def shorten() -> None:
            session = next(iter(runner.stage._held.sessions))
            session.rewind(session.length - 1)

        since = len(mesh.published)
        asking = asyncio.create_task(mesh.generate(COUNT, text=PROMPT))
        await mesh.until(
            lambda: sum(event.type == "ChunkGenerated" for event in mesh.published[since:]) >= 3
        )
        await asyncio.wrap_future(runner.call(shorten))
        tokens, _ = await asking
        failed = [event for event in mesh.published[since:] if event.type == "RowFailed"]
        assert [(e.worker, e.attributes["status"]) for e in failed] == [
            (stage, "POSITION_MISMATCH")
        ]
        return tokens

    assert standing.runner.run(answer()) == standing.reference


def test_the_undisturbed_answer_is_the_one_that_mlx_lm_gives_by_itself(standing: Standing) -> None:
    prompt = load_tokenizer(standing.directory).encode(PROMPT)
    request = {"prompt": prompt, "count": COUNT, "temperature": 0.0, "seed": 0}
    asked = {"model": str(standing.directory), "requests": [request]}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("reference.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(done.stdout) == [standing.reference]
