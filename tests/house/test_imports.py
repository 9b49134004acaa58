"""One-way arrows between the rooms, and one owner for every foreign dependency."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

OWNERS = {
    "crc32c": ("stagemesh/checksum.py",),
    "tenacity": ("coordinator/backoff.py",),
    "mlx": ("stage_worker/",),
    "mlx_lm": ("stage_worker/",),
    "grpc": ("services/",),
    "google": ("services/",),
    "stagemesh.v1": ("services/",),
    "opentelemetry": ("services/",),
    "opentelemetry.sdk": ("services/telemetry.py",),
    "opentelemetry.exporter": ("services/telemetry.py",),
    "prometheus_client": ("services/telemetry.py",),
}
"""Module → path prefixes that may import it. The longest module name decides."""


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported module name with its line; ``from a.b import c`` counts as ``a.b`` and
    ``a.b.c``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def trespasses(path: str, tree: ast.Module) -> Iterator[str]:
    """Imports in ``path`` of a dependency that another module owns."""
    for line, name in imported(tree):
        owners = [module for module in OWNERS if name == module or name.startswith(module + ".")]
        if owners and not path.startswith(OWNERS[max(owners, key=len)]):
            yield f"{path}:{line}: imports {name}"


def test_every_dependency_has_one_owner(product, root: Path):
    found = [
        x
        for path, tree in product.items()
        for x in trespasses(path.relative_to(root).as_posix(), tree)
    ]
    assert not found, "\n" + "\n".join(found)


def test_the_shared_language_needs_only_the_standard_library(product, root: Path):
    allowed = {*sys.stdlib_module_names, "stagemesh", "crc32c"}
    found = [
        f"{path.relative_to(root)}:{line}: imports {name}"
        for path, tree in product.items()
        if path.relative_to(root).parts[0] == "stagemesh"
        for line, name in imported(tree)
        if name.split(".")[0] not in allowed
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("coordinator/route.py", "import grpc"),
        ("coordinator/driver.py", "from tenacity import retry"),
        ("services/server.py", "from opentelemetry.sdk.trace import TracerProvider"),
        ("services/server.py", "import mlx.core as mx"),
        ("stage_worker/stage.py", "from stagemesh.v1 import frame_pb2"),
        ("stage_worker/stage.py", "from stagemesh import v1"),
    ],
)
def test_a_trespass_is_found(path: str, source: str):
    assert list(trespasses(path, ast.parse(source)))


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [str(program), "--no-cache"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def _copy(root: Path, folder: Path) -> Path:
    for room in ("stagemesh", "coordinator", "stage_worker", "services"):
        shutil.copytree(root / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", folder)
    return folder


def test_the_contracts_of_the_rooms_hold(root: Path):
    done = _lint_imports(root)
    assert done.returncode == 0, done.stdout


def test_each_contract_of_the_rooms_fires(root: Path, tmp_path: Path):
    folder = _copy(root, tmp_path)
    for path, source in {
        "coordinator/planted_a.py": "import services.telemetry\nimport random\n",
        "stage_worker/planted_b.py": "import coordinator.events\nimport grpc\n",
        "services/planted_c.py": "import mlx.core\nimport tenacity\n",
        "services/planted_d.py": "def serve():\n    from services.stress import session\n",
        "services/planted_e.py": "import services.fault_damage\n",
    }.items():
        (folder / path).write_text(source)
    with (folder / "stage_worker/reference.py").open("a") as reference:
        reference.write("import stage_worker.hosting\n")
    done = _lint_imports(folder)
    kept = [line for line in done.stdout.splitlines() if line.rstrip().endswith("KEPT")]
    assert done.returncode != 0
    assert not kept, done.stdout


def test_no_service_can_reach_whatever_makes_a_fault(root: Path):
    """Modules of faults are known by their names; the contract guards every one of them."""
    document = tomllib.loads((root / "pyproject.toml").read_text())
    contracts = {one["id"]: one for one in document["tool"]["importlinter"]["contracts"]}
    faults = {f"services.{path.stem}" for path in (root / "services").glob("fault_*")}
    assert len(faults) >= 3
    assert set(contracts["faults"]["protected_modules"]) == faults
    assert set(contracts["faults"]["allowed_importers"]) == {"services.stress", *faults}
    assert contracts["stress"]["protected_modules"] == ["services.stress"]
    assert contracts["stress"]["allowed_importers"] == ["services.cli_stress"]
