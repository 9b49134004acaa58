"""``stagemesh validate``: the same prompts on a mesh and through mlx-lm in one process."""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from services import settings as settings_module
from services.cli_common import (
    add_config,
    connect,
    load_settings,
    note,
    print_json,
    progress_bar,
    read_prompts,
    run_async,
)
from services.setting_fields import MESH_NAMES
from services.settings import Settings
from stagemesh.errors import InvalidConfiguration

TOKENS_DEFAULT, TOKENS_QUICK = 32, 12
SEEDS_DEFAULT = "7"
STAGES_DEFAULT, STAGES_QUICK = (2, 3, 5), (2,)
CONCURRENCY_DEFAULT = 8
NEEDLE_ANSWER_TOKENS = 16
FAILOVER_PROMPT = "long"

_EXAMPLES = """\
examples:
  stagemesh validate --quick                        a first look, in a minute
  stagemesh validate --deterministic                every bit must be equal
  stagemesh validate --model tiny --stages 2,3 --failover --deterministic
  stagemesh validate --address 127.0.0.1:50051 --report validation/
  stagemesh validate --address HOST:PORT --calibrate     measure the tolerance of a pair

Exact mode (--deterministic, or a mesh that runs so): tokens, log-probabilities, boundary digests
and cache lengths are equal bit for bit. Margin mode: a token may differ only where the reference's
own choice was closer than tau, and rarely. The score is the share of answer positions that hold.
"""


def add_arguments(parser: argparse.ArgumentParser, _command: str) -> None:
    """Flags of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--stages", dest="stage_counts", metavar="N,N", help="private meshes to start [2,3,5]"
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a running mesh instead")
    parser.add_argument("--client-certs", metavar="DIR", help="of `stagemesh certs init`")
    parser.add_argument("--prompts", metavar="FILE", help="as for generate; sent as raw text")
    parser.add_argument("--seeds", default=SEEDS_DEFAULT, metavar="N,N", help="of sampled runs [7]")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="per answer [32]")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY_DEFAULT,
        metavar="N",
        help=f"answers at a time in the second pass; 1 leaves it out [{CONCURRENCY_DEFAULT}]",
    )
    parser.add_argument(
        "--needle", type=int, metavar="N", help="longest needle prompt, tokens; 0 is none [4000]"
    )
    parser.add_argument("--failover", action="store_true", help="kill each stage at each point")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure tau on this mesh, taken to be well"
    )
    parser.add_argument(
        "--tau", type=float, metavar="X", help="tolerance instead of a measured one"
    )
    parser.add_argument("--quick", action="store_true", help="few prompts, one mesh, no needles")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--report", metavar="DIR", help="write validate.md and validate.json")
    group = parser.add_argument_group("mesh and reference")
    add_config(group)  # type: ignore[arg-type]
    names = tuple(name for name in MESH_NAMES if name not in {"stages", "spans"})
    settings_module.add_flags(group, (*names, "threads", "drain_s", "log_level"))
    settings_module.add_flags(group, ("tls_ca", "tls_cert", "tls_key"))


def run(arguments: argparse.Namespace) -> int:
    """Entry point."""
    return run_async(_validate(arguments))


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the flags ask for, checked."""

    settings: Settings
    entries: list[dict[str, Any]]
    seeds: tuple[int, ...]
    count: int
    needle: int
    stage_counts: tuple[int, ...]
    explicit_stages: bool


def _numbers(text: str, setting: str, *, least: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InvalidConfiguration(
            f"--{setting} takes whole numbers from {least}, separated by commas", setting=setting
        )
    return tuple(int(part) for part in parts)


def _wanted(arguments: argparse.Namespace) -> _Wanted:
    from services.validate.cases import NEEDLE_TOKENS_DEFAULT, shipped_prompts

    quick = arguments.quick
    if arguments.address and (arguments.failover or arguments.stage_counts):
        raise InvalidConfiguration(
            "--stages and --failover need a private mesh; leave out --address", setting="address"
        )
    if arguments.concurrency < 1 or arguments.tokens < 0:
        raise InvalidConfiguration("--concurrency and --tokens are positive", setting="concurrency")
    settings = load_settings(arguments)
    threads = settings.process.threads or 1  # both sides multiply in the same shapes
    settings = replace(settings, process=replace(settings.process, threads=threads))
    entries = read_prompts(arguments.prompts) if arguments.prompts else shipped_prompts(quick=quick)
    needle = arguments.needle
    if needle is None:
        needle = 0 if quick or arguments.prompts else NEEDLE_TOKENS_DEFAULT
    stages: tuple[int, ...] = STAGES_QUICK if quick else STAGES_DEFAULT
    if arguments.stage_counts:
        stages = _numbers(arguments.stage_counts, "stages", least=1)
    return _Wanted(
        settings=settings,
        entries=entries,
        seeds=_numbers(arguments.seeds, "seeds", least=0),
        count=arguments.tokens or (TOKENS_QUICK if quick else TOKENS_DEFAULT),
        needle=needle,
        stage_counts=stages,
        explicit_stages=bool(arguments.stage_counts),
    )


async def _validate(arguments: argparse.Namespace) -> int:
    from services.validate.report import summary_lines, write_report

    wanted = _wanted(arguments)
    report = await _measure(arguments, wanted)
    if arguments.report:
        page, _data = write_report(report, Path(arguments.report))
        note(f"report: {page}")
    if arguments.json:
        print_json(report.to_json())
    else:
        print("\n".join(summary_lines(report)))
    return 0 if report.ok else 1


async def _measure(arguments: argparse.Namespace, wanted: _Wanted) -> Any:
    from services.validate.play import Validation
    from stage_worker.model_source import resolve

    with progress_bar() as progress:
        model = await asyncio.to_thread(resolve, wanted.settings.mesh.model, progress=progress)
    validation = Validation(
        model=model,
        settings=wanted.settings,
        entries=wanted.entries,
        seeds=wanted.seeds,
        count=wanted.count,
        needle=wanted.needle,
        needle_count=min(wanted.count, NEEDLE_ANSWER_TOKENS),
        concurrency=arguments.concurrency,
        failover=arguments.failover,
        calibrate=arguments.calibrate,
        tau=arguments.tau,
        note=note,
    )
    if arguments.address:
        async with connect(arguments, arguments.address) as client:
            return await validation.of_running(client)
    return await validation.of_private(
        wanted.stage_counts, skip_impossible=not wanted.explicit_stages
    )
