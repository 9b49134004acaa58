"""SmolLM2 on one to five stages, in every type, under faults: with ``--long`` only (4 minutes)."""

from __future__ import annotations

import pytest
from mlx_lm.utils import load_model

from stage_worker import model_source
from stage_worker.reference import unpacked
from tests.mesh.test_families import into
from tests.mesh.test_families_faults import RealMesh, expected_by, under_faults

CUTS = [("f32", 1), ("f32", 5), ("4bit", 2), ("bf16", 4), ("f16", 1)]
"""On three stages in f32 it is part of every run."""


@pytest.mark.smollm2
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "stages"), CUTS)
def test_smollm2_in_every_type_answers_as_mlx_lm_does_whatever_befalls_it(
    kind: str, stages: int
) -> None:
    model, config = load_model(model_source.resolve("smollm2").directory)
    model = unpacked(model, "f32")
    into(model, kind)
    under_faults(RealMesh(model, config), expected_by(model), stages, 1)
