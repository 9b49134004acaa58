"""The validator's own parts: what is asked, the reference process, tolerances, the report."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.validation.evidence import (
    Delivered,
    Expectation,
    Observation,
    StagePlace,
    Tolerance,
)
from coordinator.validation.scoring import score_run
from services import cli
from services.tokenizer import load_tokenizer
from services.validate import calibration, cases, failover
from services.validate.cases import Case
from services.validate.mesh_side import stages_of
from services.validate.play import foreign_weights
from services.validate.reference_side import ReferenceFailed, ReferenceSide
from services.validate.report import Report, markdown, summary_lines
from services.validate.session import Run, Session
from stage_worker.tiny_models import write_tiny_model
from stagemesh.errors import RouteUnavailable
from stagemesh.sampling import SamplingSpec
from stagemesh.topology import Span
from stagemesh.v1 import admin_service_pb2, topology_pb2

SCRIPTS = ("ARABIC", "CJK", "CYRILLIC", "DEVANAGARI", "GREEK", "HEBREW", "HIRAGANA", "THAI")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder, "llama", layers=4)
    return folder


# -- what is asked --------------------------------------------------------------------------------


def test_the_prompt_set_holds_what_it_promises() -> None:
    prompts = {one["name"]: one["prompt"] for one in cases.shipped_prompts()}
    names = " ".join(
        unicodedata.name(character, "") for text in prompts.values() for character in text
    )
    assert all(script in names for script in SCRIPTS)
    kinds = ("prose", "code", "json", "html", "digits", "emoji", "long")
    assert all(any(name.startswith(kind) for name in prompts) for kind in kinds)
    json_like, longest = prompts["json"], max(prompts.values(), key=len)
    assert json_like.startswith("{")
    assert len(longest) > 3000
    assert len(cases.shipped_prompts(quick=True)) == len(cases.QUICK_NAMES)


def test_every_prompt_is_asked_greedily_and_with_every_seed() -> None:
    found = cases.cases_of([{"prompt": "a"}, {"name": "b", "prompt": "x"}], (1, 2), 5)
    assert [(one.name, one.spec.seed) for one in found] == [
        ("a", 0),
        ("a", 1),
        ("a", 2),
        ("b", 0),
        ("b", 1),
        ("b", 2),
    ]
    assert found[0].sampling == "greedy"
    assert found[1].sampling == "temperature=0.8 top_p=0.95 seed=1"
    request = found[1].request([1, 2])
    # Both sides draw with the values as they travel, to the last bit.
    assert request.temperature == found[1].spec.temperature
    assert request.top_p == found[1].spec.top_p
    assert request.ignore_eos


@pytest.mark.parametrize(
    ("longest", "room", "wanted"),
    [
        (4000, 8192, [255, 256, 257, 513, 1025, 2049, 4000]),
        (4000, 300, [255, 256, 257, 300]),
        (100, 4000, [100]),
        (10, 0, []),
    ],
)
def test_the_ladder_climbs_over_every_cut_and_stays_in_the_context(
    longest: int, room: int, wanted: list[int]
) -> None:
    assert cases.rungs(longest, room) == wanted


async def test_a_needle_prompt_has_exactly_its_length_and_keeps_its_needle(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)

    async def encode(text: str) -> list[int]:
        return tokenizer.encode(text)

    for length in (255, 1025, 4000):
        ids = await cases.needle_tokens(length, encode)
        text = tokenizer.decode(ids)
        assert len(ids) == length
        secret = str(10_000 + length * 7 % 89_999)
        assert secret in text
        assert text.endswith("The secret number is")


# -- the reference process ------------------------------------------------------------------------


def _observed(prompt: tuple[int, ...], token_ids: list[int], stages: int = 1) -> Observation:
    tokens = tuple(
        Delivered(token_id, len(prompt) + index, 1, ((token_id, -1.0),), ())
        for index, token_id in enumerate(token_ids)
    )
    places = tuple(StagePlace(f"s{i}", Span(i, i + 1)) for i in range(stages))
    return Observation(prompt, len(token_ids), tokens, "", places)


async def test_the_reference_tokenizes_generates_and_judges_in_its_own_process(
    directory: Path,
) -> None:
    entry = {"prompt": "the tide \U0001f30a came in"}
    case = cases.Case("x", entry, SamplingSpec(logprobs=2), 4)
    async with ReferenceSide(directory, dtype="auto", deterministic=True) as side:
        assert (side.facts["layers"], side.facts["dtype"]) == (4, "f32")
        assert side.facts["environment"]["deterministic"] is True
        prompt = await side.encode(entry)
        assert list(prompt) == load_tokenizer(directory).encode(entry["prompt"])
        first = await side.expect(case, _observed(prompt, []), every_boundary=(1, 2), digests=True)
        assert len(first.token_ids) == 4
        own = list(first.token_ids)
        same = await side.expect(case, _observed(prompt, own), every_boundary=(), digests=False)
        assert [one.token_id for one in same.judgements] == own
        assert all((one.rank, one.gap) == (1, 0.0) for one in same.judgements)
        other = [own[0], own[0], own[2], own[3]]
        forced = await side.expect(case, _observed(prompt, other), every_boundary=(), digests=False)
        assert forced.token_ids == first.token_ids
        # Another token is another text, and only what was delivered is decoded otherwise.
        decode = load_tokenizer(directory).decode
        assert (forced.text, forced.delivered_text) == (decode(own), decode(other))
        assert forced.text != forced.delivered_text
        assert same.delivered_text == same.text
        assert forced.judgements[1].token_id == own[1]
        assert forced.judgements[1].rank > 1
        assert forced.judgements[1].gap == pytest.approx(
            forced.judgements[1].logits[1] - forced.judgements[1].logits[0]
        )


async def test_digests_of_a_cut_do_not_depend_on_which_other_cuts_are_watched(
    directory: Path,
) -> None:
    case = cases.Case("x", {"prompt": "the tide came in"}, SamplingSpec(), 3)
    async with ReferenceSide(directory, dtype="auto", deterministic=True) as side:
        prompt = await side.encode(case.entry)
        seen = _observed(prompt, [1, 2, 3], stages=3)
        shaped = await side.bisect(case, seen, Expectation(prompt, (), "", "", ()), chunk=128)
        free = await side.expect(
            case, _observed(prompt, [1], stages=3), every_boundary=(1, 2, 3), digests=True
        )
    assert shaped.judgements[0].digests == free.judgements[0].digests
    assert [len(one) for one in shaped.judgements[0].digests] == [len(prompt)] * 2
    assert [len(one) for one in shaped.judgements[1].digests] == [1, 1]


async def test_a_model_that_cannot_be_loaded_is_a_clear_error_and_leaves_no_process(
    tmp_path: Path,
) -> None:
    with pytest.raises(ReferenceFailed, match="cannot load"):
        async with ReferenceSide(tmp_path, dtype="auto", deterministic=True):
            pass


async def test_a_question_that_fails_says_so_and_the_next_one_is_answered(directory: Path) -> None:
    async with ReferenceSide(directory, dtype="auto", deterministic=True) as side:
        with pytest.raises(ReferenceFailed, match="KeyError"):
            await side._ask("divine")
        assert await side.encode({"prompt": "on"})


async def test_a_reference_that_dies_is_noticed(directory: Path) -> None:
    async with ReferenceSide(directory, dtype="auto", deterministic=True) as side:
        assert side._process is not None
        side._process.kill()
        with pytest.raises(ReferenceFailed, match="ended"):
            await side.encode({"prompt": "on"})


# -- the mesh -------------------------------------------------------------------------------------


def _mesh(*fingerprints: str) -> admin_service_pb2.GetMeshResponse:
    mesh = admin_service_pb2.GetMeshResponse()
    for index, fingerprint in enumerate(fingerprints):
        worker = mesh.workers.add().worker
        worker.name, worker.fingerprint = f"stage-{index}", fingerprint
        worker.span_first, worker.span_last = index, index + 1
    return mesh


def test_the_longest_open_route_is_under_test() -> None:
    mesh = _mesh("a", "a", "a")
    with pytest.raises(RouteUnavailable):
        stages_of(mesh)
    mesh.routes.add(workers=["stage-2"], state=topology_pb2.ROUTE_STATE_OPEN)
    mesh.routes.add(workers=["stage-0", "stage-1"], state=topology_pb2.ROUTE_STATE_OPEN)
    mesh.routes.add(workers=["a", "b", "c"], state=topology_pb2.ROUTE_STATE_CLOSED)
    assert stages_of(mesh) == (
        StagePlace("stage-0", Span(0, 1)),
        StagePlace("stage-1", Span(1, 2)),
    )


def test_a_worker_with_other_weights_is_named() -> None:
    found = foreign_weights(_mesh("aa", "bb"), "aa")
    assert [one["component"] for one in found] == ["stage-1"]
    assert foreign_weights(_mesh("aa", "aa"), "aa") == ()


# -- tolerances -----------------------------------------------------------------------------------


def test_a_measured_tolerance_is_kept_for_its_pair_only(tmp_path: Path) -> None:
    key = calibration.pair_key("m", "f32", {"blas": "OpenBLAS"}, {"blas": "reference"})
    other = calibration.pair_key("m", "f32", {"blas": "OpenBLAS"}, {"blas": "Accelerate"})
    assert calibration.stored_tau(tmp_path, key) is None
    calibration.store_tau(tmp_path, key, 0.25)
    calibration.store_tau(tmp_path, other, 0.5)
    assert calibration.stored_tau(tmp_path, key) == 0.25
    path = calibration.store_tau(tmp_path, key, 0.125)
    assert calibration.stored_tau(tmp_path, other) == 0.5
    path.write_text("{")
    assert calibration.stored_tau(tmp_path, key) is None
    path.write_text(json.dumps({key: "much"}))
    assert calibration.stored_tau(tmp_path, key) is None


# -- the report -----------------------------------------------------------------------------------


def _report(*, ok: bool) -> Report:
    seen = _observed((1,), [5, 6])
    verdict = score_run(seen, Expectation((1,) if ok else (2,), (5, 6), "", "", ()), Tolerance(0.5))
    reference: Any = None
    session = Session(reference, Tolerance(0.5), (), 128, lambda _line: None)
    case = cases.Case("name|with a bar", {"prompt": "x"}, SamplingSpec(), 2)
    session.runs.append(Run(case, 2, "alone", 1, verdict, 0.25, ("STAGE_UNREACHABLE",)))
    return Report(session, {"model": "tiny"}, tau_source="given")


def test_the_json_has_the_agreed_names() -> None:
    document = _report(ok=False).to_json()
    assert {"ok", "mode", "score", "runs", "environment"} <= set(document)
    wanted = (
        "prompt stages sampling tokens agreement first_divergence max_abs_dlogit mean_kl culprit"
    )
    assert set(wanted.split()) <= set(document["runs"][0])
    assert (document["ok"], document["mode"], document["tau"]) == (False, "margin", 0.5)
    assert document["runs"][0]["culprit"]["kind"] == "tokenizer"
    json.dumps(document)


def test_people_read_the_same_verdict() -> None:
    report = _report(ok=False)
    page = markdown(report)
    assert page.startswith("# Validation: FAILED")
    assert "name\\|with a bar" in page
    assert "tokenizer" not in summary_lines(report)[0]
    assert any("cut the prompt into different tokens" in line for line in summary_lines(report))


def test_problems_beside_the_runs_fail_a_validation_whose_runs_are_well() -> None:
    report = Report(_report(ok=True).session, {}, ({"component": "w", "problem": "p"},))
    assert not report.ok
    assert "**w**: p" in markdown(report)


@pytest.mark.parametrize(
    "flags",
    [
        ("--address", "127.0.0.1:1", "--failover"),
        ("--address", "127.0.0.1:1", "--stages", "2"),
        ("--stages", "0"),
        ("--stages", "two"),
        ("--seeds", ""),
        ("--concurrency", "0"),
        ("--prompts", "/nowhere.json"),
    ],
)
def test_bad_usage_is_told_before_anything_is_started(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    assert cli.main(["validate", "--model", "tiny", *flags]) == cli.EXIT_USAGE
    assert "stagemesh:" in capsys.readouterr().err


@pytest.mark.parametrize("strikes", [True, False])
async def test_a_failover_point_at_which_nothing_was_killed_is_no_proof(
    monkeypatch: pytest.MonkeyPatch, strikes: bool
) -> None:
    asked: list[int] = []

    async def answered(*_: object, on_token: Any, **__: object) -> tuple[str, str]:
        asked.append(1)
        for index in range(8):
            await on_token(index)
        return "seen", "finish"

    async def whole(*_: object) -> None:
        """The mesh is well again."""

    judged: list[str] = []

    async def judge(*_: object, problem: str, **__: object) -> None:
        judged.append(problem)

    process = SimpleNamespace(pid=7, send_signal=lambda _: None) if strikes else None
    child = SimpleNamespace(process=process)
    mesh = SimpleNamespace(
        client=None,
        supervisor=SimpleNamespace(children={"stage-0": child}),
        status=lambda: asyncio.sleep(0, SimpleNamespace(running=1)),
    )
    monkeypatch.setattr(failover, "observe", answered)
    monkeypatch.setattr(failover, "until_whole", whole)
    stages = [StagePlace("stage-0", Span(0, 4))]
    case = Case("long", {"prompt": "x"}, SamplingSpec(), 8)
    await failover.play_failover(SimpleNamespace(judge=judge), mesh, stages, case)
    if strikes:
        assert judged == [""] * 4
        assert len(asked) == 4
    else:
        assert judged == ["stage-0 was not killed in time"] * 4
        assert len(asked) == 4 * failover.ATTEMPTS_MAX
