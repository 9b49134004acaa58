"""What can be set: each setting explains itself, and a mesh's have one fingerprint."""

from __future__ import annotations

import dataclasses

from services import setting_values as parsing
from services.setting_fields import FIELDS, TOLD, MeshSettings, ProcessSettings, parse_value
from services.settings import load
from stagemesh.topology import Span


def test_what_a_mesh_tells_of_its_settings_exists_and_is_no_address_path_or_name():
    found = load(flags={"stages": "3", "fallback": "forbid", "deterministic": True}).told()
    assert set(found) == set(TOLD)
    assert (found["stages"], found["fallback"], found["deterministic"]) == ("3", "forbid", "true")
    private = (parsing.address, parsing.path, parsing.text, parsing.span_or_all)
    assert FIELDS["coordinator"][1].metadata["parse"] in private
    for name in TOLD:
        assert FIELDS[name][1].metadata["parse"] not in private, name


def test_the_fingerprint_covers_every_mesh_setting_and_no_process_setting():
    usual = MeshSettings().fingerprint()
    others = {
        "model": "x",
        "stages": 5,
        "spans": (Span(0, 2),),
        "dtype": "f16",
        "deterministic": True,
        "verification": "transport",
        "verification_max": "numeric",
        "delivery": "verified",
        "kv_budget_tokens": 99,
    }
    assert set(others) == {one.name for one in dataclasses.fields(MeshSettings)}
    for name, value in others.items():
        assert dataclasses.replace(MeshSettings(), **{name: value}).fingerprint() != usual
    assert load(environment={"STAGEMESH_THREADS": "7"}).mesh.fingerprint() == usual


def test_every_setting_explains_itself_and_accepts_its_own_default():
    for kind in (MeshSettings, ProcessSettings):
        for one in dataclasses.fields(kind):
            assert len(one.metadata["help"]) > 8
            shown = next(
                row["value"] for row in load(environment={}).as_rows() if row["setting"] == one.name
            )
            assert parse_value(one.name, shown) == one.default
