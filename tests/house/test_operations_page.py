"""docs/operations.md knows every event and metric that there is, and no other, and says of every
failure how it is seen: every name it uses for that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from services.metrics import ACTIONS
from stagemesh.guards import FAMILIES, GUARDS

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


METRIC = re.compile(r"(?:mesh|gen_ai|rpc)(?:\.[a-z_]+)+")
NAME = re.compile(r"`([^`]+)`")


def table(root: Path, name: str) -> list[list[str]]:
    """The cells of a marked table, without its head."""
    page = (root / "docs" / "operations.md").read_text(encoding="utf-8")
    text = page[page.index(f"<!-- table {name} -->") :].partition("<!-- end -->")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows[1:]]


def strings_in(product: dict[Path, ast.Module], *files: str) -> set[str]:
    """Every literal of some files, the keys of dictionaries apart: those are attributes."""
    found: set[str] = set()
    for path, tree in product.items():
        if path.name not in files:
            continue
        keys = {
            id(key) for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys
        }
        found |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in keys
        }
    return found


def metrics(product: dict[Path, ast.Module]) -> set[str]:
    return {name for name in strings_in(product, "metrics.py") if METRIC.fullmatch(name)}


def is_guard(name: str) -> bool:
    prefix = name.removesuffix("*")
    family = prefix in FAMILIES or any(guard.startswith(prefix) for guard in GUARDS)
    return name in GUARDS or (name.endswith(".*") and family)


def test_every_metric_is_on_the_page_and_every_metric_on_the_page_exists(
    root: Path, product: dict[Path, ast.Module]
) -> None:
    named = {name for row in table(root, "metrics") for name in NAME.findall(row[0])}
    assert named == metrics(product)


def test_every_failure_says_how_it_is_seen_in_names_that_exist(
    root: Path, product: dict[Path, ast.Module]
) -> None:
    events, known = documented(root), metrics(product)
    spans = strings_in(product, "tracked_request.py", "request_telemetry.py", "stage_telemetry.py")
    spans |= {f"recovery {action}" for action in ACTIONS}
    rows = table(root, "failures")
    assert len(rows) >= 15
    for what, happened, trace, measured, done, *rest in rows:
        assert all((happened, trace, measured, done, rest)), what
        for name in NAME.findall(happened):
            assert name in events or re.fullmatch(r"[A-Z_]+|re\w+", name), (what, name)
        for name in NAME.findall(trace):
            is_attribute = "." in name and not name.startswith("stage.")
            is_call = name.startswith("GenerationService/")
            assert name in events or name in spans or is_attribute or is_call, (what, name)
        seen = NAME.findall(measured)
        assert seen or measured.startswith("–"), what
        for name in seen:
            is_label = name == "error.type"
            assert name in known or is_guard(name) or is_label, (what, name)
