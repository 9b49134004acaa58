"""Generates ``stagemesh/v1`` from ``protos/``: ``make protos``; ``--check`` only compares.

The proto path is the Python path, so imports come out right without rewriting anything. gRPC code
is made only for ``*_service.proto``, otherwise every noun would get an empty ``_pb2_grpc`` module.
The generator is pinned to the oldest one for the protobuf floor in pyproject.toml: code made by a
newer one refuses to run on older runtimes, code made by an older one runs on newer.
"""

from __future__ import annotations

import argparse
import importlib.resources
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from google.rpc import status_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("stagemesh/v1")
GENERATOR = "1.81.1"
INIT = '"""Generated from protos/stagemesh/v1 by `make protos`. Never edited."""\n'


def third_party() -> Path:
    """Folder that holds ``google/rpc/*.proto`` (from googleapis-common-protos)."""
    return Path(status_pb2.__file__).parents[2]


def generate(target: Path) -> None:
    """Writes all modules below ``target``. Raises SystemExit if protoc refuses a file."""
    protos = sorted(
        path.relative_to(ROOT / "protos") for path in (ROOT / "protos").rglob("*.proto")
    )
    services = [path for path in protos if path.stem.endswith("_service")]
    well_known = Path(str(importlib.resources.files("grpc_tools"))) / "_proto"
    includes = [f"-I{ROOT / 'protos'}", f"-I{third_party()}", f"-I{well_known}"]
    outputs = [f"--python_out={target}", f"--pyi_out={target}"]
    _protoc([*includes, *outputs, *map(str, protos)])
    _protoc([*includes, f"--grpc_python_out={target}", *map(str, services)])
    (target / PACKAGE / "__init__.py").write_text(INIT)


def differences(fresh: Path, existing: Path) -> list[str]:
    """Names of files that are missing, left over or different, sorted."""
    made = {path.name: path.read_bytes() for path in fresh.iterdir() if path.is_file()}
    kept = {path.name: path.read_bytes() for path in existing.iterdir() if path.is_file()}
    return sorted(name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name))


def _protoc(arguments: list[str]) -> None:
    if protoc.main(["protoc", *arguments]) != 0:
        raise SystemExit("protoc failed")


def main() -> int:
    """Entry point; 0 if generated (or, with --check, fresh)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="compare only; 1 if anything differs")
    check = parser.parse_args().check
    if version("grpcio-tools") != GENERATOR:
        raise SystemExit(f"needs grpcio-tools=={GENERATOR}, found {version('grpcio-tools')}")
    if not check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = differences(Path(folder) / PACKAGE, ROOT / PACKAGE)
    for name in stale:
        print(f"{PACKAGE / name} is not what protos/ says; run: make protos", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
