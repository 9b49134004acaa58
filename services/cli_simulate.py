"""`stagemesh simulate`: seeded faults against the real decisions and the real hop machines.

The seeds are spread over the machine's cores in blocks; results are sums, so their order does not
matter. A violating seed is printed with the command that replays it. With ``--planted`` the bugs of
``coordinator.simulation.planted`` are hunted instead: the run fails if too many survive.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

from coordinator.simulation.campaign import Campaign, hunt, run_seeds
from coordinator.simulation.planted.catalogue import BUGS, BUGS_BY_NAME
from services.cli_common import note, print_json
from stagemesh.errors import InvalidConfiguration

BLOCK_SEEDS = 50
"""Seeds that one process takes at a time."""
PLANTED_KILLED_MIN = 0.95
VIOLATIONS_SHOWN_MAX = 20
PROGRESS_INTERVAL_S = 5.0


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Arguments of ``simulate``."""
    parser.add_argument(
        "--seeds", metavar="A:B", default="0:2000", help="seeds A to B-1 (default %(default)s)"
    )
    parser.add_argument(
        "--planted", action="store_true", help="hunt planted bugs with these seeds instead"
    )
    parser.add_argument("--bug", action="append", metavar="NAME", help="only this planted bug")
    parser.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="processes (default: one per core)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(arguments: argparse.Namespace) -> int:
    """0 if nothing was violated (or enough planted bugs were found), else 1."""
    seeds = seeds_of(arguments.seeds)
    if arguments.planted or arguments.bug:
        return _planted(arguments, seeds)
    began = time.monotonic()
    campaign = _campaign(seeds, _jobs_of(arguments))
    seconds = time.monotonic() - began
    document: dict[str, Any] = {
        "seeds": campaign.seeds,
        "faults": campaign.faults,
        "events": campaign.events,
        "tokens": campaign.tokens,
        "violations": [
            {"seed": seed, "invariant": invariant, "detail": detail, "replay": replay_of(seed)}
            for seed, invariant, detail in sorted(campaign.violations)
        ],
        "cells": dict(sorted(campaign.cells.items())),
        "rarest_cells": dict(campaign.rarest(5)),
        "counters": dict(sorted(campaign.counters.items())),
        "requests_failed": campaign.failed,
        "planted": {"total": len(BUGS), "killed": None},
        "seconds": round(seconds, 3),
        "environment": {"cores": os.cpu_count()},
    }
    if arguments.json:
        print_json(document)
    else:
        _describe(document)
    return 1 if campaign.violations else 0


def seeds_of(text: str) -> range:
    """``"A:B"`` or ``"A"``. Raises InvalidConfiguration."""
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise InvalidConfiguration(f"seeds {text!r} are not A:B", setting="seeds")
    begin = int(first)
    end = int(last) if colon else begin + 1
    if end <= begin:
        raise InvalidConfiguration(f"seeds {text!r} are none", setting="seeds")
    return range(begin, end)


def replay_of(seed: int) -> str:
    """The command that runs this seed again."""
    return f"stagemesh simulate --seeds {seed}:{seed + 1}"


def _jobs_of(arguments: argparse.Namespace) -> int:
    return int(arguments.jobs) if arguments.jobs > 0 else os.cpu_count() or 1


def _campaign(seeds: range, jobs: int) -> Campaign:
    blocks = [seeds[at : at + BLOCK_SEEDS] for at in range(0, len(seeds), BLOCK_SEEDS)]
    total, told = Campaign(), time.monotonic()
    for part in _spread(run_seeds, blocks, jobs):
        total.merge(part)
        for seed, invariant, detail in part.violations:
            note(f"{invariant}: {detail}\n    {replay_of(seed)}")
        if time.monotonic() - told > PROGRESS_INTERVAL_S:
            told = time.monotonic()
            note(f"{total.seeds} of {len(seeds)} seeds, {len(total.violations)} violations")
    return total


def _spread(work: Any, items: list[Any], jobs: int) -> Iterator[Any]:
    """``work(item)`` for every item, as results come in, in this process or in ``jobs`` of them."""
    if jobs == 1 or len(items) == 1:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=context) as pool:
        pending: set[Future[Any]] = {pool.submit(work, item) for item in items}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _hunt(task: tuple[str, range]) -> tuple[str, tuple[int, str] | None]:
    name, seeds = task
    return name, hunt(name, seeds)


def _planted(arguments: argparse.Namespace, seeds: range) -> int:
    names = arguments.bug or [bug.name for bug in BUGS]
    unknown = [name for name in names if name not in BUGS_BY_NAME]
    if unknown:
        raise InvalidConfiguration(f"there is no planted bug {unknown[0]!r}", setting="bug")
    tasks = [(name, seeds) for name in names]
    found: dict[str, tuple[int, str] | None] = {}
    for name, kill in _spread(_hunt, tasks, _jobs_of(arguments)):
        found[name] = kill
        note(f"{name}: {'SURVIVED' if kill is None else f'seed {kill[0]}, {kill[1]}'}")
    killed = sum(kill is not None for kill in found.values())
    if arguments.json:
        print_json(
            {
                "seeds": len(seeds),
                "faults": 0,
                "events": 0,
                "violations": [],
                "cells": {},
                "planted": {
                    "total": len(found),
                    "killed": killed,
                    "bugs": {
                        name: None if kill is None else {"seed": kill[0], "detail": kill[1]}
                        for name, kill in sorted(found.items())
                    },
                },
                "environment": {"cores": os.cpu_count()},
            }
        )
    else:
        print(f"{killed} of {len(found)} planted bugs found")
    return 0 if killed >= PLANTED_KILLED_MIN * len(found) else 1


def _describe(document: dict[str, Any]) -> None:
    rate = document["seeds"] / max(document["seconds"], 1e-9)
    print(
        f"{document['seeds']} seeds, {document['faults']} faults, {document['events']} events, "
        f"{document['tokens']} tokens in {document['seconds']:.1f} s ({rate:.0f} seeds/s)"
    )
    rare = ", ".join(f"{cell} {hits}" for cell, hits in document["rarest_cells"].items())
    print(f"rarest fault × phase: {rare}")
    violations = document["violations"]
    for one in violations[:VIOLATIONS_SHOWN_MAX]:
        print(f"seed {one['seed']}: {one['invariant']}: {one['detail']}")
        print(f"    {one['replay']}")
    print(f"{len(violations)} violations" if violations else "no violation")
