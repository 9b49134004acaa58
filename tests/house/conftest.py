"""What the tests of the house share: the root, the product's sources, the tools in ``scripts/``."""

from __future__ import annotations

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("stagemesh", "coordinator", "stage_worker", "services")


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def product() -> dict[Path, ast.Module]:
    """Every hand-written module of the four rooms, parsed."""
    found = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return {path: _parsed(path) for path in found if path.parts[-2] != "v1"}


@pytest.fixture(scope="session")
def handwritten(product: dict[Path, ast.Module]) -> list[Path]:
    """The product, its tests and tools."""
    other = [path for name in ("tests", "scripts") for path in (ROOT / name).rglob("*.py")]
    return [*product, *sorted(other)]


@pytest.fixture(scope="session")
def tool():
    """``tool("generate_protos")`` is that script as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
