"""Tolerances measured on pairs of machines, kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from coordinator.validation import evidence
from coordinator.validation.evidence import Tolerance

TAU_DEFAULT = {"f32": 1e-3, "f16": 0.1, "bf16": 0.5}
"""Used while a pair has not been calibrated: several times what another matrix library of the same
element type was seen to change."""
MEAN_KL_MAX = {"bf16": 1e-2}
"""Where not what float32 is held to. Honest routes of SmolLM2 in bfloat16 have shown 3.8e-3."""
TAU_MIN = 1e-6
"""A pair that happened to agree in every bit while it was measured is still not exact."""
_FACTS = ("blas", "platform", "mlx", "threads")
_FILE = "validate-tolerances.json"


def pair_key(
    model: str, dtype: str, mesh: Mapping[str, object], reference: Mapping[str, object]
) -> str:
    """What a tolerance belongs to: model, element type, and both sides' matrix libraries."""
    facts = [model, dtype]
    for side in (mesh, reference):
        facts += [f"{name}={side.get(name, '')}" for name in _FACTS]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def tolerance_of(tau: float, dtype: str) -> Tolerance:
    """The tolerance for models that compute in ``dtype``."""
    return Tolerance(tau, MEAN_KL_MAX.get(dtype, evidence.MEAN_KL_MAX))


def stored_tau(home: Path, key: str) -> float | None:
    """The tolerance measured for this pair, if any was."""
    try:
        found = json.loads((home / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    tau = found.get(key) if isinstance(found, dict) else None
    return float(tau) if isinstance(tau, int | float) and tau >= 0 else None


def store_tau(home: Path, key: str, tau: float) -> Path:
    """Keep a measured tolerance; the file is replaced as a whole."""
    path = home / _FILE
    home.mkdir(parents=True, exist_ok=True)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**known, key: tau}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
