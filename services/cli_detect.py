"""``stagemesh detect``: faults put into a pipeline of real stages, and which detectors see them.

Everything happens in this process: no mesh is touched, and the product has no switch that could
make it compute wrongly. The exit status is 1 if a tier raised a false alarm, or if the shadow, at
tolerance 0 on a bit-exact matrix library, missed more than one harmful stream in a hundred.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from services.cli_common import print_json
from stagemesh.errors import InvalidConfiguration

MODEL_DEFAULT = "tiny:layers=9"
"""Random weights, three layers for each of three stages."""
RECALL_MIN = 0.99
CERTAIN = ("T0", "T1", "T2", "T3")
"""Tiers that act; the fourth is advisory."""
STAGES_MAX = 16
SIDE_BY_SIDE_MAX = 64


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of ``detect``."""
    parser.add_argument("--model", default=MODEL_DEFAULT, help=f"as for `up` [{MODEL_DEFAULT}]")
    parser.add_argument("--stages", type=int, default=3, metavar="N", help="stages [3]")
    parser.add_argument("--streams", type=int, default=32, metavar="N", help="per class [32]")
    parser.add_argument("--tokens", type=int, default=24, metavar="N", help="per stream [24]")
    parser.add_argument("--clean-tokens", type=int, default=0, metavar="N", help="at least [0]")
    parser.add_argument(
        "--side-by-side", type=int, default=16, metavar="N", help="clean streams at a time [16]"
    )
    parser.add_argument(
        "--tolerance", type=float, default=None, metavar="LOGITS", help="shadow's [by library]"
    )
    parser.add_argument("--only", metavar="TEXT", help="classes whose name contains this")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of every draw [1]")
    parser.add_argument(
        "--fast", action="store_true", help="with the fast matrix library, as workers use it"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit status says whether it holds."""
    from stage_worker import blas

    if arguments.streams < 2 or arguments.tokens < 8 or not 2 <= arguments.stages <= STAGES_MAX:
        raise InvalidConfiguration(
            f"at least 2 streams of 8 tokens, and 2 to {STAGES_MAX} stages", setting="streams"
        )
    if not 1 <= arguments.side_by_side <= SIDE_BY_SIDE_MAX:
        raise InvalidConfiguration(
            f"1 to {SIDE_BY_SIDE_MAX} streams side by side", setting="side_by_side"
        )
    if arguments.fast:
        blas.reexec_with_fast_blas(1)
    document = measure(arguments, is_exact=blas.describe().deterministic)
    if arguments.json:
        print_json(document)
    else:
        show(document)
    return 0 if document["ok"] else 1


@contextlib.contextmanager
def _rows_fail_quietly() -> Iterator[None]:
    """Rows fail on purpose during a measurement; a line for each would bury the result."""
    log = logging.getLogger("stage_worker")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def measure(arguments: argparse.Namespace, *, is_exact: bool) -> dict[str, Any]:
    """The whole measurement as ``--json`` prints it."""
    from coordinator.route import PROBE_PROMPTS
    from coordinator.settings import SHADOW_TOLERANCE_FAST
    from services.detect.measure import Detection
    from services.tokenizer import load_served_model
    from services.validate.cases import shipped_prompts
    from stage_worker import blas, machine, model_source
    from stage_worker.detect.faults import FAULTS
    from stage_worker.detect.rig import Rig

    tolerance = arguments.tolerance
    if tolerance is None:
        tolerance = 0.0 if is_exact else SHADOW_TOLERANCE_FAST
    resolved = model_source.resolve(arguments.model)
    served = load_served_model(resolved.directory, resolved.name)
    if served.layer_count < 2 * arguments.stages:
        raise InvalidConfiguration(
            f"each stage needs two layers, and the model has {served.layer_count}",
            setting="stages",
        )
    count = arguments.stages
    cuts = tuple(served.layer_count * index // count for index in range(count + 1))
    rig = Rig(resolved.directory, cuts, PROBE_PROMPTS)
    detection = Detection(
        rig,
        decode=served.tokenizer.decode,
        streams=arguments.streams,
        tokens=arguments.tokens,
        tolerance=tolerance,
        seed=arguments.seed,
        prompts=[served.tokenizer.encode(str(one["prompt"])) for one in shipped_prompts()],
    )
    faults = [one for one in FAULTS if not arguments.only or arguments.only in one.name]
    with _rows_fail_quietly():
        result = detection.run(
            faults,
            clean_tokens=arguments.clean_tokens,
            side_by_side=arguments.side_by_side,
            progress=_progress,
        )
    found = result.as_json()
    alarms = sum(found["false_alarms"][tier] for tier in CERTAIN)
    recall = found["recall"]["T3"]
    enough = tolerance > 0.0 or recall is None or recall >= RECALL_MIN
    library = blas.describe()
    return {
        "ok": alarms == 0 and enough,
        **found,
        "model": resolved.name,
        "cuts": list(cuts),
        "library": f"{library.name} {library.version}".strip(),
        "exact": is_exact,
        "seed": arguments.seed,
        "side_by_side": arguments.side_by_side,
        "environment": {
            "model": resolved.name,
            "dtype": rig.dtype,
            **machine.describe_environment(),
        },
    }


def _progress(name: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total} {name}", end="", file=sys.stderr, flush=True)
        if done + 1 >= total:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def show(document: dict[str, Any]) -> None:
    """For people."""
    tiers = list(document["recall"])
    print(f"{'fault':<28} {'harmful':>9}  " + "  ".join(f"{tier:>5}" for tier in tiers))
    for one in document["classes"]:
        found = "  ".join(_percent(one["recall"][tier]) for tier in tiers)
        print(f"{one['name']:<28} {one['harmful']:>4}/{one['streams']:<4}  {found}")
    print(
        f"{'all':<28} {document['harmful']:>4}       "
        + "  ".join(_percent(document["recall"][tier]) for tier in tiers)
    )
    print()
    alarms = ", ".join(f"{tier} {n}" for tier, n in document["false_alarms"].items())
    print(
        f"  clean           {document['clean_streams']} streams, {document['clean_tokens']} tokens"
    )
    print(f"  false alarms    {alarms}")
    print(f"  tolerance       {document['tolerance']:g} logits ({document['library']})")
    print(f"  largest gap     {document['clean_gap_max']:.3g} logits on clean tokens")
    for point in document["curve"]:
        print(
            f"    at {point['tolerance']:<8g} recall {point['recall']:.4f}, "
            f"{point['false_alarm_tokens']} clean tokens over it"
        )


def _percent(share: float | None) -> str:
    return "    -" if share is None else f"{share * 100:4.0f}%"
