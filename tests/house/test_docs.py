"""What the documents promise exists: commands, targets, files, links."""

import re
from pathlib import Path

import pytest

from services import cli

LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
COMMAND = re.compile(r"`?(?<![\w./-])stagemesh ([a-z][a-z-]+)")
TARGET = re.compile(r"\bmake ([a-z][a-z-]+)")


def _documents(root: Path) -> list[Path]:
    return [*root.glob("*.md"), *(root / "docs").rglob("*.md")]


def commands(text: str) -> set[str]:
    """Subcommands named in code spans or code blocks."""
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    return {name for piece in code for name in COMMAND.findall(piece)}


def targets(text: str) -> set[str]:
    """Makefile targets named in code spans or code blocks."""
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    return {name for piece in code for name in TARGET.findall(piece)}


def test_every_link_to_a_file_leads_somewhere(root: Path):
    broken = [
        f"{document.name} → {link}"
        for document in _documents(root)
        for link in LINK.findall(document.read_text())
        if not (document.parent / link).exists()
    ]
    assert not broken, broken


def test_every_command_in_the_documents_exists(root: Path):
    known = {name for name, one in cli.COMMANDS.items() if cli.is_installed(one)}
    named = {name for document in _documents(root) for name in commands(document.read_text())}
    assert named, "the documents name commands"
    assert named <= known, named - known


def test_every_make_target_in_the_documents_exists(root: Path):
    known = set(
        re.findall(r"^([a-z][a-z-]*):", (root / "Makefile").read_text(), flags=re.MULTILINE)
    )
    named = {name for document in _documents(root) for name in targets(document.read_text())}
    assert named <= known, named - known


def test_the_readme_leads_with_the_two_commands(root: Path):
    opening = (root / "README.md").read_text()[:1200]
    assert "make run" in opening
    assert "make test" in opening


@pytest.mark.parametrize("path", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_usual_files_are_there(root: Path, path: str):
    assert (root / path).stat().st_size > 0


def test_an_unknown_command_would_be_found():
    assert commands("`stagemesh fly --high`") == {"fly"}
    assert targets("run `make coffee` first") == {"coffee"}
