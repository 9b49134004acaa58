"""Planted faults: the validator fails, and names the boundary at which it went wrong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.validation.evidence import Expectation, Observation, StagePlace, Tolerance
from coordinator.validation.scoring import score_run
from services.validate.cases import Case
from services.validate.mesh_side import delivered
from services.validate.reference_side import expectation_of, judgements_of, request_fields
from stage_worker.hosting import SpanModel
from stage_worker.reference import Reference
from stage_worker.reference_process import ReferenceServer
from stage_worker.tiny_models import write_tiny_model
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import Span
from tests.faults import planted
from tests.mesh.chain import Chain, Question

CUTS = (0, 2, 4, 6)
COUNT = 10
GREEDY = SamplingSpec(logprobs=20)
SAMPLED = SamplingSpec(temperature=0.75, top_p=0.875, seed=11, logprobs=20)
TAU = 1e-4
"""What another matrix library may change in a model this small."""


class Bench:
    """A model on disk, and the reference that runs it."""

    def __init__(self, directory: Path, folder: Path) -> None:
        self.directory = directory
        self.reference = Reference.load(directory)
        self.server = ReferenceServer(self.reference, folder)
        self.prompt = tuple(self.reference.encode("The tide came in and the boats " * 3))

    def spans(self) -> list[SpanModel]:
        return [SpanModel.load(self.directory, Span(*ends)) for ends in itertools.pairwise(CUTS)]

    def observe(self, models: list[SpanModel], case: Case) -> Observation:
        """What a client would have received from these stages."""
        question = Question(self.prompt, case.count, case.spec)
        chunks = Chain.of(models, chunk=16).answer([question])[0]
        return Observation(
            self.prompt,
            case.count,
            tuple(delivered(chunk) for chunk in chunks),
            self.reference.decode([chunk.token_id for chunk in chunks]),
            tuple(StagePlace(f"stage-{i}", model.span) for i, model in enumerate(models)),
        )

    def expect(self, case: Case, seen: Observation) -> Expectation:
        fields = request_fields(case, seen, digests=True, chunk=16)
        answer = self.server.answer({"operation": "compare", **fields})
        return expectation_of(self.prompt, answer)

    def bisect(self, case: Case, seen: Observation, known: Expectation) -> Expectation:
        fields = request_fields(case, seen, digests=True, chunk=16)
        judgements = judgements_of(self.server.answer({"operation": "bisect", **fields}))
        return replace(known, judgements=judgements)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("model")
    write_tiny_model(directory, "llama", layers=6, seed=4)
    return Bench(directory, tmp_path_factory.mktemp("logits"))


def case_of(spec: SamplingSpec) -> Case:
    return Case("planted", {"prompt": ""}, spec, COUNT)


PLANTED = [
    *((name, 1) for name in planted.MIDDLE),
    *((name, 0) for name in planted.FIRST),
    *((name, 2) for name in planted.LAST),
]


def test_there_are_at_least_twelve_faults() -> None:
    assert len(PLANTED) >= 12


@pytest.mark.parametrize("spec", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tau", [0.0, TAU], ids=["exact", "margin"])
def test_a_mesh_that_is_well_passes_with_full_score(
    bench: Bench, spec: SamplingSpec, tau: float
) -> None:
    case = case_of(spec)
    seen = bench.observe(bench.spans(), case)
    verdict = score_run(
        seen, bench.expect(case, seen), Tolerance(tau), temperature=spec.temperature
    )
    assert verdict.ok, verdict
    assert (verdict.score, verdict.agreement, verdict.max_abs_dlogit) == (1.0, 1.0, 0.0)
    assert verdict.boundaries_compared == 2 * COUNT
    assert verdict.culprit is None


def test_exact_bits_depend_on_neither_the_cuts_of_a_prompt_nor_who_shares_a_step(
    bench: Bench,
) -> None:
    """What lets exact mode leave batches as they come."""
    models = bench.spans()
    asked = Question(bench.prompt, COUNT, SAMPLED)
    others = [Question(bench.prompt[index:], COUNT, GREEDY) for index in (1, 5)]
    answers = [Chain.of(models, chunk=chunk).answer([asked])[0] for chunk in (7, 16, 96)]
    answers.append(Chain.of(models, chunk=16).answer([others[0], asked, others[1]])[1])
    bits = [[(one.token_id, one.logprob, one.alternatives) for one in each] for each in answers]
    # The first token's digests are over whole chunks, which is what differs here.
    digests = [[one.marks for one in each[1:]] for each in answers]
    assert bits[1:] == bits[:-1]
    assert digests[1:] == digests[:-1]


@pytest.mark.parametrize("spec", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("name", "stage"), PLANTED)
def test_a_planted_fault_fails_exact_mode_at_the_right_boundary(
    bench: Bench, name: str, stage: int, spec: SamplingSpec
) -> None:
    models = bench.spans()
    planted.plant(name, models[stage])
    case = case_of(spec)
    seen = bench.observe(models, case)
    verdict = score_run(seen, bench.expect(case, seen), Tolerance(), temperature=spec.temperature)
    assert not verdict.ok
    culprit = verdict.culprit
    assert culprit is not None
    assert (culprit.stage, culprit.worker) == (stage, f"stage-{stage}")
    assert culprit.layers == str(models[stage].span)
    expected = "logits" if stage == 2 else "state" if name in planted.KEPT else "compute"
    assert culprit.kind == expected
    assert (culprit.position > 0) == (name in planted.KEPT)


@pytest.mark.parametrize(("name", "stage"), PLANTED)
def test_a_planted_fault_fails_margin_mode_and_the_second_look_names_the_boundary(
    bench: Bench, name: str, stage: int
) -> None:
    models = bench.spans()
    planted.plant(name, models[stage])
    case = case_of(GREEDY)
    seen = bench.observe(models, case)
    expected = bench.expect(case, seen)
    assert not score_run(seen, expected, Tolerance(TAU)).ok
    shaped = bench.bisect(case, seen, expected)
    culprit = score_run(seen, shaped, Tolerance(TAU), digests_decide=True).culprit
    assert culprit is not None
    assert culprit.stage == stage
