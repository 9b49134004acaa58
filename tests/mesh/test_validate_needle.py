"""The needle ladder to its default top, and what the command asks for by itself."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from services import cli_validate, settings
from services.client import MeshClient
from services.validate import play
from services.validate.cases import NEEDLE_RUNGS
from services.validate.play import Validation
from stage_worker.model_source import ResolvedModel
from stage_worker.tiny_models import write_tiny_model
from tests.mesh.own_loop_mesh import own_loop_mesh

TOP = 4000


@pytest.mark.timeout(300)
async def test_every_rung_up_to_four_thousand_tokens_is_the_references_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The workers of this mesh share the test's process and do not say what it multiplies with.
    monkeypatch.setattr(play, "_is_deterministic", lambda _status: True)
    write_tiny_model(tmp_path, "llama", layers=4)
    validation = Validation(
        model=ResolvedModel(tmp_path, "tiny", "tiny"),
        settings=settings.load(environment={}),
        entries=(),
        seeds=(),
        count=4,
        needle=TOP,
        needle_count=4,
        concurrency=1,
        failover=False,
        calibrate=False,
        tau=None,
        note=lambda _line: None,
    )
    async with (
        own_loop_mesh(tmp_path) as mesh,
        MeshClient(mesh.coordinator.server.address) as client,
    ):
        report = await validation.of_running(client)
    assert (report.ok, report.tau_source, report.session.score) == (True, "exact", 1.0)
    runs = report.session.runs
    assert [run.prompt_tokens for run in runs] == [*NEEDLE_RUNGS, TOP]
    for run in runs:
        assert (run.verdict.tokens, run.verdict.max_abs_dlogit) == (4, 0.0)
        assert run.verdict.boundaries_compared == 4


@pytest.mark.parametrize(
    ("flags", "longest"),
    [((), TOP), (("--quick",), 0), (("--needle", "300"), 300), (("--needle", "0"), 0)],
)
def test_the_ladder_is_climbed_unless_it_is_left_out(flags: tuple[str, ...], longest: int) -> None:
    parser = argparse.ArgumentParser()
    cli_validate.add_arguments(parser, "validate")
    wanted = cli_validate._wanted(parser.parse_args(["--model", "tiny", *flags]))
    assert wanted.needle == longest
