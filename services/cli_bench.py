"""``stagemesh bench``: measure a private mesh against bare mlx-lm on the same machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from services.cli_common import add_mesh_flags, load_settings, note, print_json, run_async
from stagemesh.errors import InvalidConfiguration

SUITE_NAMES = ("single", "prefill", "batch", "overhead", "coordinator", "failover", "memory", "all")

_EXAMPLES = """\
examples:
  stagemesh bench --suite single                     one stream against mlx-lm
  stagemesh bench --suite all --json > run.json      everything, for programs
  stagemesh bench --suite single,prefill             two suites that share their turns
  stagemesh bench --quick --model tiny               does everything work? (not: how fast is it?)
  stagemesh bench --from *.json --write docs/benchmarks.md --plot docs/benchmarks

The machine should be otherwise idle. Exit status 1 means that a figure could not be taken; a missed
target is reported, and is not an error.
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of the command."""
    add_mesh_flags(parser)
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--suite",
        default="all",
        metavar="NAME",
        help=f"{', '.join(SUITE_NAMES)}, or several with commas between [all]",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: a test, not a benchmark")
    parser.add_argument("--json", action="store_true", help="print the run as one JSON object")
    parser.add_argument("--plot", metavar="DIR", help="write SVG plots into this folder")
    parser.add_argument("--write", metavar="FILE", help="write the run as a Markdown page")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        metavar="FILE",
        help="measure nothing: use runs saved with --json, put together to one",
    )


def run(arguments: argparse.Namespace) -> int:
    """Entry point."""
    for name in arguments.suite.split(","):
        if name not in SUITE_NAMES:
            raise InvalidConfiguration(
                f"there is no suite {name!r}; one of {', '.join(SUITE_NAMES)}", setting="suite"
            )
    if arguments.sources:
        from services.bench import saved

        _show(arguments, saved.merge([saved.read(Path(name)) for name in arguments.sources]))
        return 0
    return run_async(_measure(arguments))


async def _measure(arguments: argparse.Namespace) -> int:
    from services.bench.run import SUITES, Bench
    from services.bench.sides import Sizes

    bench = Bench(load_settings(arguments), Sizes.quick() if arguments.quick else Sizes(), say=note)
    asked = arguments.suite.split(",")
    try:
        await bench.run(SUITES if "all" in asked else asked)
    finally:
        # Also when it is interrupted: what was measured by then took minutes, and holds.
        document = bench.as_json() | {"suite": arguments.suite, "quick": arguments.quick}
        _show(arguments, document)
    return 0 if bench.ok else 1


def _show(arguments: argparse.Namespace, document: dict[str, Any]) -> None:
    from services.bench import plots, report

    if arguments.json:
        print_json(document)
    else:
        for result in document["results"]:
            print(report.line_of(result))
    drawn = plots.plot(document, Path(arguments.plot)) if arguments.plot else []
    if arguments.write:
        page = Path(arguments.write)
        links = [os.path.relpath(path, page.parent) for path in drawn]
        page.write_text(report.page(document, links), encoding="utf-8")
        drawn.append(page)
    for path in drawn:
        note(f"wrote {path}")
