"""Saved runs: read, and put together to one. The reading is the only I/O here.

A whole run takes longer than a machine can be kept quiet, so suites are measured one by one and the
page is written from all of them. What was measured twice counts as it was measured last. Runs of
different machines, models or versions are refused: a table must not compare what cannot be.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.bench.results import TARGETS
from stagemesh.errors import InvalidConfiguration

SAME_MACHINE = ("cores", "cpu", "platform", "python", "python_build", "mlx", "mlx_lm", "grpcio")
"""What has to be equal in all runs of one page."""
SAME_MESH = ("model", "dtype", "blas", "spans", "threads_per_stage", "threads_baseline")
"""And in all of them that had a mesh with a model."""


def read(path: Path) -> dict[str, Any]:
    """A run as ``stagemesh bench --json`` printed it. Raises InvalidConfiguration."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"results", "environment"} <= set(document):
            raise ValueError("results and environment are missing")
    except (OSError, ValueError, TypeError) as error:
        raise InvalidConfiguration(f"{path} is not a saved run: {error}", setting="from") from None
    return document


def merge(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One run from several, later ones first in rank; results in the order of the goals, others
    behind them as they come. Raises InvalidConfiguration."""
    results: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    for document in documents:
        facts = document["environment"]
        _require_same(environment, facts)
        busiest = max(one.get("load_before", 0.0) for one in (environment, facts))
        # A run without a mesh knows what it was started with, not what the workers then had.
        better, other = (facts, environment) if "spans" in facts else (environment, facts)
        environment = {**other, **better, "load_before": busiest}
        for result in document["results"]:
            results[result["name"]] = result
        for one in document.get("side_by_side", ()):
            beside[one["label"]] = one
    quick = any(document.get("quick", False) for document in documents)
    places = {name: place for place, name in enumerate(TARGETS)}
    ordered = sorted(results.values(), key=lambda one: places.get(one["name"], len(places)))
    merged = {"results": ordered, "environment": environment, "quick": quick}
    return merged | ({"side_by_side": list(beside.values())} if beside else {})


def _require_same(known: dict[str, Any], facts: dict[str, Any]) -> None:
    have_meshes = "spans" in known and "spans" in facts
    for name in (*SAME_MACHINE, *(SAME_MESH if have_meshes else ())):
        if name in known and name in facts and str(known[name]) != str(facts[name]):
            raise InvalidConfiguration(
                f"these runs do not belong together: {name} is {known[name]!r} in one "
                f"and {facts[name]!r} in another",
                setting="from",
            )
