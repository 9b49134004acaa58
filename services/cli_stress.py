"""``stagemesh stress``: many readers on a private mesh of real processes while faults happen."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from services import settings as settings_module
from services.cli_common import add_config, load_settings, note, print_json, progress_bar, run_async
from services.setting_fields import MESH_NAMES
from stagemesh.errors import InvalidConfiguration

DURATION_DEFAULT, STREAMS_DEFAULT = "2m", 4
STAGES_DEFAULT = 3
DURATION_S_MAX = 7 * 86_400.0
STREAMS_MAX = 1024
LOOPBACK, LOSSY = "loopback", "lossy"
NETWORKS = (LOOPBACK, LOSSY)
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

_EXAMPLES = """\
examples:
  stagemesh stress --model tiny --duration 30s          every fault there is, once or more
  stagemesh stress --duration 1h --streams 8 --report soak/
  stagemesh stress --faults sigkill,black-hole --seed 7
  stagemesh stress --faults plan.toml --json
  stagemesh stress --network lossy --faults sigkill     as if between hosts, over bad links

A run is a function of its seed: which fault, when, where, and what is asked. Expected tokens come
from mlx-lm in a process of its own. Exit status 1 if a token was lost, repeated or wrong, an answer
hung, something was left over, or any fault never fired or was not answered. Every fault is made by
this command's own process: in proxies between the mesh's, and by signals.
"""


def add_arguments(parser: argparse.ArgumentParser, _command: str) -> None:
    """Flags of the command."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--duration",
        default=DURATION_DEFAULT,
        metavar="T",
        help=f"such as 90s, 10m, 1h [{DURATION_DEFAULT}]",
    )
    parser.add_argument(
        "--streams",
        type=int,
        default=STREAMS_DEFAULT,
        metavar="N",
        help=f"answers at a time [{STREAMS_DEFAULT}]",
    )
    parser.add_argument(
        "--faults",
        default="all",
        metavar="PLAN",
        help="all, none, names with commas between, or a TOML or JSON file [all]",
    )
    parser.add_argument("--every", type=float, metavar="S", help="seconds between faults [5]")
    parser.add_argument("--seed", type=int, metavar="N", help="of everything; drawn if left out")
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default=LOOPBACK,
        help="loopback: through proxies that can do every fault; lossy: each process on a machine "
        "of its own, with mutual TLS over links that delay, lose, damage and reorder packets; "
        f"needs root on Linux [{LOOPBACK}]",
    )
    parser.add_argument(
        "--plaintext", action="store_true", help="no TLS between the machines of a lossy network"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--report", metavar="DIR", help="write a page, charts, history and logs here"
    )
    group = parser.add_argument_group("mesh")
    add_config(group)  # type: ignore[arg-type]
    settings_module.add_flags(group, (*MESH_NAMES, "threads", "log_level"))


def run(arguments: argparse.Namespace) -> int:
    """Entry point."""
    return run_async(_stress(arguments))


def seconds_of(text: str) -> float:
    """``90``, ``90s``, ``10m`` or ``1h`` in seconds. Raises InvalidConfiguration."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1.0 <= value <= DURATION_S_MAX:
        raise InvalidConfiguration(
            f"--duration {text!r} is not a time such as 90s, 10m or 1h", setting="duration"
        )
    return value


def plan_of(arguments: argparse.Namespace, stages: int) -> Any:
    """The plan that was asked for. Raises InvalidConfiguration."""
    from dataclasses import replace

    from services.stress import plan as plans

    plan = plans.builtin(arguments.faults)
    if plan is None:
        path = Path(arguments.faults).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            known = ", ".join(one.value for one in plans.FaultName)
            raise InvalidConfiguration(
                f"{arguments.faults!r} is neither a plan file ({error.strerror}) nor names of "
                f"faults; there are {known}",
                setting="faults",
            ) from None
        plan = plans.parse(text, is_json=path.suffix == ".json")
    if arguments.every is not None:
        if not arguments.every >= plans.EVERY_S_LEAST:
            raise InvalidConfiguration("--every is too short", setting="every")
        plan = replace(plan, every_s=arguments.every)
    if arguments.network == LOSSY:
        return _on_packets(plan, stages)
    return plan.possible(stages)


def _on_packets(plan: Any, stages: int) -> Any:
    from services.stress.machines import Machines

    kept = plan.possible(stages, Machines.faults)
    if plan.faults and not kept.faults:
        raise InvalidConfiguration(
            "none of these faults can be made on a lossy network, where there are no proxies; "
            f"there are {', '.join(sorted(one.value for one in Machines.faults))}",
            setting="faults",
        )
    return kept


def replay_command(arguments: argparse.Namespace, seed: int) -> str:
    """What asks for the same run again."""
    words = ["stagemesh", "stress", "--seed", str(seed), "--duration", arguments.duration]
    words += ["--streams", str(arguments.streams), "--faults", arguments.faults]
    if arguments.every is not None:
        words += ["--every", f"{arguments.every:g}"]
    for name in (*MESH_NAMES, "threads", "config"):
        value, flag = getattr(arguments, name, None), name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", str(value)]
    if arguments.network != LOOPBACK:
        words += ["--network", arguments.network]
    if arguments.plaintext:
        words.append("--plaintext")
    return shlex.join(words)


async def _stress(arguments: argparse.Namespace) -> int:
    from services.stress.report import summary_lines, to_json, write_report

    run = await _carried_out(arguments)
    if arguments.report:
        note(f"report: {write_report(run, Path(arguments.report))}")
    elif run.ok:
        shutil.rmtree(run.wanted.folder, ignore_errors=True)
    else:
        write_report(run, run.wanted.folder)
        note(f"logs, history and report: {run.wanted.folder}")
    if arguments.json:
        print_json(to_json(run))
        if not run.ok:
            note(f"seed {run.wanted.seed}; to see it again: {run.wanted.command}")
    else:
        print("\n".join(summary_lines(run)))
    return 0 if run.ok else 1


def _run_folder(report: str | None) -> Path:
    """Where logs and journal go, without an earlier run's: its journal would answer for us."""
    if not report:
        return Path(tempfile.mkdtemp(prefix="stagemesh-stress-"))
    folder = Path(report) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (*folder.glob("journal.db*"), *folder.glob("*.log")):
        earlier.unlink()
    return folder


async def _carried_out(arguments: argparse.Namespace) -> Any:
    if not 1 <= arguments.streams <= STREAMS_MAX:
        raise InvalidConfiguration(f"--streams is from 1 to {STREAMS_MAX}", setting="streams")
    if arguments.plaintext and arguments.network != LOSSY:
        raise InvalidConfiguration("--plaintext is for --network lossy", setting="plaintext")
    settings = load_settings(arguments, {"stages": STAGES_DEFAULT, "deterministic": True})
    duration_s = seconds_of(arguments.duration)
    plan = plan_of(arguments, len(settings.mesh.spans) or settings.mesh.stages)

    from services.stress import live
    from services.stress.session import Run, Wanted, stress, with_stress_settings
    from stage_worker.model_source import resolve

    settings = with_stress_settings(settings, arguments.streams)
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    showing: list[asyncio.Task[None]] = []

    def shown(run: Run) -> None:
        begin = live.table(run) if sys.stderr.isatty() else live.lines(run, note)
        showing.append(asyncio.create_task(begin))

    folder = _run_folder(arguments.report)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(progress_bar())
        model = await asyncio.to_thread(resolve, settings.mesh.model, progress=progress)
        wanted = Wanted(
            settings=settings,
            model=model,
            plan=plan,
            seed=seed,
            duration_s=duration_s,
            streams=arguments.streams,
            folder=folder,
            command=replay_command(arguments, seed),
            is_lossy=arguments.network == LOSSY,
            plaintext=arguments.plaintext,
        )
        note(f"seed {seed}: {len(plan.faults)} kinds of faults, {arguments.streams} streams")
        try:
            return await stress(wanted, note=note, progress=progress, shown=shown)
        finally:
            for task in showing:
                task.cancel()
            await asyncio.gather(*showing, return_exceptions=True)
