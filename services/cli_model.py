"""``stagemesh model import|list`` and ``stagemesh support``."""

from __future__ import annotations

import argparse
import time

from services.cli_common import print_json, progress_bar
from stagemesh.errors import InvalidConfiguration

_EXAMPLES = """\
examples:
  stagemesh model list
  stagemesh model import smollm2
  stagemesh model import ./model.Q4_1.gguf
  stagemesh model import org/name                  from the hub, if there is a network
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of both commands."""
    if command == "support":
        parser.add_argument(
            "types", nargs="*", metavar="TYPE", help="mlx-lm model types; none means all of them"
        )
        parser.add_argument(
            "--processes", type=int, default=1, metavar="N", help="side by side [1]"
        )
        parser.add_argument("--json", action="store_true", help="for programs")
        return
    parser.epilog = _EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|list")
    importing = actions.add_parser("import", help="fetch or convert a model into the cache folder")
    importing.add_argument("source", help="smollm2, a .gguf file, a directory, a hub id, or tiny")
    listing = actions.add_parser("list", help="what the cache folder holds")
    for one in (importing, listing):
        one.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Entry point of both commands."""
    if arguments.command == "support":
        return _support(arguments)
    return _import(arguments) if arguments.action == "import" else _list(arguments)


def _import(arguments: argparse.Namespace) -> int:
    from stage_worker.model_source import resolve
    from stage_worker.weights import manifest

    began = time.monotonic()
    with progress_bar() as progress:
        model = resolve(arguments.source, progress=progress)
        found = manifest(model.directory, progress=progress)
    document = {
        "name": model.name,
        "directory": str(model.directory),
        "fingerprint": found.fingerprint,
        "tensors": len(found.tensors),
        "bytes": found.size,
        "seconds": round(time.monotonic() - began, 3),
    }
    if arguments.json:
        print_json(document)
    else:
        print(f"{model.name}: {len(found.tensors)} tensors, {found.size / 2**20:.1f} MiB")
        print(f"  {model.directory}\n  fingerprint {found.fingerprint}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from stage_worker.model_source import list_models

    models = list_models()
    if arguments.json:
        print_json(
            {
                "models": [
                    {
                        "name": one.name,
                        "source": one.source,
                        "directory": str(one.directory) if one.directory else None,
                        "bytes": one.size,
                    }
                    for one in models
                ]
            }
        )
        return 0
    for one in models:
        where = str(one.directory) if one.directory else "not fetched yet"
        print(f"{one.name:<32} {one.size / 2**20:>9.1f} MiB  {where}")
    return 0


def _support(arguments: argparse.Namespace) -> int:
    from services.hop_roundtrip import DOTTED_NAME
    from stage_worker.support import run_support
    from stage_worker.tiny_models import model_types

    unknown = sorted(set(arguments.types) - set(model_types()))
    if unknown:
        raise InvalidConfiguration(f"mlx-lm has no model type {unknown[0]!r}", setting="types")
    with progress_bar() as progress:
        report = run_support(
            arguments.types or None,
            lambda _type, done, total: progress("trying model types", done, total),
            processes=arguments.processes,
            roundtrip=DOTTED_NAME,
        )
    if arguments.json:
        print_json(report.to_json())
        return 0 if report.ok else 1
    for verdict in ("exact", "refused", "untestable", "wrong"):
        outcomes = report.of(verdict)
        print(f"{verdict}: {len(outcomes)}")
        for outcome in outcomes:
            if verdict != "exact":
                print(f"  {outcome.model_type}: {outcome.detail}")
    return 0 if report.ok else 1
