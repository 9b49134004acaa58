"""docs/operations.md knows every event that there is, and no other, each in its topic."""

from __future__ import annotations

import ast
import re
from pathlib import Path

EVENT = re.compile(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+")
TOPICS = {"MEMBERSHIP", "GENERATION", "INTEGRITY", "RECOVERY", "BARRIER", "DIAGNOSTICS"}
BESIDE = {"WorkerFailed": "membership", "WorkerLost": "membership"}
"""Published under a name that is an argument by then."""


def documented(root: Path) -> dict[str, str]:
    """Event → topic, as the page says."""
    page = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- table events -->") :].partition("<!-- end -->")[0]
    return {
        event: topic for topic, event in re.findall(r"^\| (\w+) \| `(\w+)` \|", table, re.MULTILINE)
    }


def published(product: dict[Path, ast.Module]) -> dict[str, str]:
    """Event → topic, as the code says: strings beside the name of a topic in one call."""
    found: dict[str, str] = {}
    for tree in product.values():
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            for call in calls:
                names = {one.id for one in call.args if isinstance(one, ast.Name)}
                for topic in names & TOPICS:
                    for event in _events_of(call, function):
                        found[event] = topic.lower()
    return found


def _events_of(call: ast.Call, function: ast.FunctionDef) -> set[str]:
    """The event's name as it stands in the call, or what a variable of it may be."""
    kind = call.args[1]
    if isinstance(kind, ast.Name):
        values = [
            node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == kind.id
        ]
    else:
        values = [kind]
    return {
        node.value
        for value in values
        for node in ast.walk(value)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and EVENT.fullmatch(node.value)
    }


def test_every_event_is_on_the_page_and_every_event_on_the_page_exists(
    root: Path, product: dict[Path, ast.Module]
) -> None:
    from coordinator.mesh_state import _BARRIER_EVENTS

    code = {**published(product), **BESIDE, **dict.fromkeys(_BARRIER_EVENTS.values(), "barrier")}
    assert documented(root) == code
    source = "".join(path.read_text(encoding="utf-8") for path in product)
    for event in BESIDE:
        assert f'"{event}"' in source
