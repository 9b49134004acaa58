"""compose.yaml is valid, starts what the CLI knows, and sets only settings that exist."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services import cli, setting_fields, settings

VARIABLE = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    return yaml.safe_load((root / "compose.yaml").read_text())


def _ours(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    services = compose["services"].items()
    return {name: one for name, one in services if one["image"].startswith("stagemesh-")}


def _words(service: dict[str, Any]) -> list[str]:
    """What the container runs after ``stagemesh``, with variables at their defaults."""
    words = [*service.get("entrypoint", ["stagemesh"]), *service["command"]]
    return [VARIABLE.sub(r"\1", word) for word in words][1:]


def _parse(words: list[str]) -> None:
    """Ends the test unless ``stagemesh WORDS`` is a command line the CLI takes."""
    cli.parser_of(words[0]).parse_args(words[1:])


def test_compose_is_valid_by_the_published_schema(root: Path):
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [program, "--builtin-schema", "vendor.compose-spec", "compose.yaml"]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "version" not in yaml.safe_load((root / "compose.yaml").read_text())


def test_every_service_starts_with_a_command_line_the_cli_takes(compose):
    for service in _ours(compose).values():
        _parse(_words(service))


def test_every_health_check_is_a_command_line_the_cli_takes(compose):
    for name in ("coordinator", "stage-0", "stage-1", "full-worker"):
        kind, program, *words = compose["services"][name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "stagemesh")
        _parse(words)


def test_every_variable_is_a_setting_and_parses(compose):
    for service in _ours(compose).values():
        environment = {
            name: VARIABLE.sub(r"\1", value)
            for name, value in service.get("environment", {}).items()
            if name.startswith(settings.ENVIRONMENT_PREFIX)
        }
        settings.load(environment=environment)


def test_the_spans_cover_the_default_model_exactly_once(compose):
    spans = [
        setting_fields.parse_value("span", words[words.index("--span") + 1])
        for words in map(_words, _ours(compose).values())
        if "--span" in words
    ]
    assert spans.count(None) == 1, "one full worker"
    ordered = sorted(span for span in spans if span is not None)
    assert [span.first for span in ordered] == [0, *(span.last for span in ordered[:-1])]
    assert ordered[-1].last == 30, "SmolLM2-135M has 30 layers"


def test_stopping_takes_longer_than_draining(compose):
    drain_s = setting_fields.ProcessSettings().drain_s
    for name in ("coordinator", "stage-0", "stage-1", "full-worker"):
        assert int(compose["services"][name]["stop_grace_period"].rstrip("s")) > drain_s
