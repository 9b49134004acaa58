"""Settings: weakest to strongest, and nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.events import Delivery, Verification
from coordinator.settings import FallbackPolicy, MeshPolicy
from services import settings
from services.run_coordinator import options_of
from services.setting_fields import MESH_NAMES, PROCESS_NAMES, MeshSettings
from services.settings import arguments_for, load
from stagemesh.errors import InvalidConfiguration
from stagemesh.topology import Span


def write(tmp_path, text: str) -> str:
    path = tmp_path / "mesh.toml"
    path.write_text(text)
    return str(path)


def origin(found: settings.Settings, name: str) -> str:
    return next(one.source for one in found.origins if one.setting == name)


def test_flags_beat_the_environment_which_beats_the_file_which_beats_defaults(tmp_path):
    path = write(tmp_path, '[mesh]\nmodel = "file"\nstages = 3\nspans = ["0-4", "4-9"]\n')
    found = load(
        config=path,
        environment={"STAGEMESH_MODEL": "environment", "STAGEMESH_STAGES": "4"},
        flags={"model": "flag", "dtype": None},
    )
    assert (found.mesh.model, found.mesh.stages, found.mesh.dtype) == ("flag", 4, "auto")
    assert found.mesh.spans == (Span(0, 4), Span(4, 9))
    assert origin(found, "model") == "--model"
    assert origin(found, "stages") == "STAGEMESH_STAGES"
    assert origin(found, "spans") == f"{path} [mesh]"
    assert origin(found, "dtype") == "default"


def test_the_file_may_be_named_by_the_environment(tmp_path):
    path = write(tmp_path, "[process]\nthreads = 3\n")
    assert load(environment={"STAGEMESH_CONFIG": path}).process.threads == 3


@pytest.mark.parametrize(
    ("text", "setting", "said"),
    [
        ("[mesh]\nmodell = 'x'\n", "modell", "did you mean 'model'"),
        ("[process]\nstages = 2\n", "stages", "unknown setting"),
        ("[proces]\n", "proces", "did you mean 'process'"),
        ("model = 'x'\n", "model", "tables"),
        ("[mesh]\nstages = 'two'\n", "stages", "whole number"),
        ("[mesh]\nstages = true\n", "stages", "whole number"),
        ("[mesh]\nstages = 0\n", "stages", "from 1"),
        ("[mesh]\nspans = ['0-x']\n", "spans", "FIRST-LAST"),
        ("[mesh]\ndeterministic = 'maybe'\n", "deterministic", "true or false"),
        ("[mesh]\ndtype = 'f64'\n", "dtype", "one of"),
        ("[process]\nlisten = 'nowhere'\n", "listen", "HOST:PORT"),
        ("[process]\ndrain_s = 'nan'\n", "drain_s", "seconds"),
        ("[process]\nspan = '4-4'\n", "span", "empty"),
        ("[process]\ntls_ca = 'ca.pem'\n", "tls_cert", "together"),
        ("[mesh]\nverification = 'shadow'\nverification_max = 'numeric'\n", "verification", "more"),
        ("[mesh]\ndelivery = 'verified'\nverification_max = 'numeric'\n", "delivery", "needs"),
        ("[mesh\n", "config", "not TOML"),
    ],
)
def test_what_cannot_be_used_is_an_error_naming_the_key(tmp_path, text, setting, said):
    with pytest.raises(InvalidConfiguration, match=said) as caught:
        load(config=write(tmp_path, text), environment={})
    assert caught.value.metadata["setting"] == setting


def test_an_unknown_variable_is_an_error_and_reserved_ones_are_not():
    load(environment={"STAGEMESH_HOME": "/x", "STAGEMESH_INTERNAL_BLAS": "1", "OTHER": "x"})
    with pytest.raises(InvalidConfiguration, match="did you mean 'listen'"):
        load(environment={"STAGEMESH_LISTN": "127.0.0.1:0"})


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(InvalidConfiguration, match="cannot read"):
        load(config=str(tmp_path / "none.toml"), environment={})


def test_a_child_gets_the_same_mesh_settings_from_its_command_line():
    import argparse

    mesh = MeshSettings(model="a b", spans=(Span(0, 2), Span(2, 5)), deterministic=True)
    words = arguments_for(mesh, name="stage-0", span=Span(0, 2), insecure=False, parent_pipe=-1)
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, (*MESH_NAMES, *PROCESS_NAMES))
    found = load(environment={}, flags=settings.flags_of(parser.parse_args(words)))
    assert found.mesh == mesh
    assert (found.process.name, found.process.span) == ("stage-0", Span(0, 2))
    full = arguments_for(mesh, span=None)
    assert (
        load(flags=settings.flags_of(parser.parse_args(full)), environment={}).process.span is None
    )


def test_a_journal_is_found_again_by_the_address_and_the_model(monkeypatch, tmp_path):
    from services.run_coordinator import journal_path

    monkeypatch.setenv("STAGEMESH_HOME", str(tmp_path))

    def path(**flags):
        return journal_path(load(environment={}, flags=flags).process, "ab" * 32)

    assert path(listen="[::1]:50051") == tmp_path / "journal" / f"--1-50051-{'ab' * 8}.db"
    assert path(listen="127.0.0.1:0") is None
    assert path(listen="127.0.0.1:50051", journal="none") is None
    assert path(listen="127.0.0.1:0", journal="/some/where.db") == Path("/some/where.db")


def test_how_requests_that_do_not_say_are_verified_and_delivered_are_settings():
    told = {"verification": "shadow", "delivery": "verified"}
    limits = options_of(load(flags=told, environment={})).limits
    assert (limits.verification, limits.delivery) == (Verification.SHADOW, Delivery.VERIFIED)
    usual = options_of(load(environment={})).limits
    assert (usual.verification, usual.delivery) == (Verification.NUMERIC, Delivery.IMMEDIATE)


def test_what_is_done_about_a_lost_route_is_a_setting():
    told = {"fallback": "forbid", "route_wait_s_max": "7", "failed_worker_s_max": "0.25"}
    policy = options_of(load(flags=told, environment={})).policy
    assert policy.fallback is FallbackPolicy.FORBID
    assert (policy.route_wait_s_max, policy.fallback_wait_s_max) == (7.0, 7.0)
    assert (policy.breaker_base_s, policy.breaker_max_s) == (0.25, 0.25)
    usual = options_of(load(environment={})).policy
    assert usual.fallback is MeshPolicy().fallback
    assert usual.rows_per_step_max == MeshPolicy().rows_per_step_max
    fewer = options_of(load(flags={"step_rows_max": 16}, environment={})).policy
    assert fewer.rows_per_step_max == 16
    with pytest.raises(InvalidConfiguration, match="step_rows_max"):
        load(flags={"step_rows_max": 257}, environment={})
    with pytest.raises(InvalidConfiguration, match="fallback"):
        load(flags={"fallback": "never"}, environment={})
