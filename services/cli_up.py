"""``stagemesh up`` keeps a local mesh running; ``stagemesh run`` asks it one question."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shlex
import signal
import time
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

from services import settings as settings_module
from services.answer_view import AnswerView, request_of, show_summary
from services.cli_common import (
    add_mesh_flags,
    command_line,
    load_settings,
    note,
    plain_terminal,
    progress_bar,
    run_async,
)
from services.cli_generate import add_sampling
from services.local_mesh import COORDINATOR, dialled
from services.mesh_report import word_of
from services.setting_fields import PORT_DEFAULT
from services.supervisor import StartFailed
from services.up import LocalMesh, Wishes, local_mesh, refresh_ready_file
from stagemesh.errors import MeshError

PROMPT_DEFAULT = "Tell me in three sentences why the sky is blue."
MAX_TOKENS_DEFAULT = 128
REFRESH_S = 1.0
"""How often the live table looks at the mesh."""

_NEXT = (
    ("chat", "talk with the model"),
    ("up", "keep a mesh running; then, in another terminal:"),
    (f'generate "…" --address 127.0.0.1:{PORT_DEFAULT}', ""),
    ("--help", "everything else"),
)
"""Behind the command's name, what to type next and why."""

_EXAMPLES = """\
examples:
  stagemesh up                                 two stages and a full worker of the default model
  stagemesh up --model ./my-model --stages 3
  stagemesh up --spans 0-12,12-30 --no-full-worker --ready-file mesh.json
"""


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of both commands."""
    add_mesh_flags(parser)
    if command == "up":
        parser.epilog = _EXAMPLES
        parser.add_argument(
            "--listen",
            default="",
            metavar="HOST:PORT",
            help="where clients connect [127.0.0.1:50051]",
        )
        parser.add_argument(
            "--ready-file", metavar="FILE", help="written as JSON once the mesh makes tokens"
        )
        settings_module.add_flags(parser, ("insecure", "journal", "resume_grace_s"))
        parser.add_argument(
            "--certs", metavar="DIR", help="speak mutual TLS with what `stagemesh certs init` made"
        )
        parser.add_argument("--run-directory", metavar="DIR", help="keep the processes' logs here")
        return
    parser.add_argument("--prompt", default=PROMPT_DEFAULT, metavar="TEXT", help="the question")
    parser.add_argument("--raw", action="store_true", help="send the prompt as it stands")
    add_sampling(parser)


def run(arguments: argparse.Namespace) -> int:
    """Entry point of both commands."""
    return run_async(_run_once(arguments) if arguments.command == "run" else _up(arguments))


# -- run ------------------------------------------------------------------------------------------


async def _run_once(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    arguments.max_tokens = arguments.max_tokens or MAX_TOKENS_DEFAULT
    settings = load_settings(arguments)
    wishes = Wishes(settings, full_worker=arguments.full_worker, listen="127.0.0.1:0")
    async with contextlib.AsyncExitStack() as stack:
        with progress_bar() as progress:
            mesh = await stack.enter_async_context(
                local_mesh(wishes, report=note, progress=progress)
            )
        note(f"mesh ready after {time.monotonic() - began:.1f} s: {_picture(mesh)}\n")
        print(f"> {arguments.prompt}\n", flush=True)
        view = await _ask(mesh, arguments)
        checks = await _checks(mesh)
    show_summary(view, print)
    for name, count in checks.items():
        print(f"  {name:<15} {count}")
    print("\nAll processes have ended. What to try next:")
    for words, why in _NEXT:
        print(f"  {command_line()} {words:<45} {why}".rstrip())
    return 0


async def _ask(mesh: LocalMesh, arguments: argparse.Namespace) -> AnswerView:
    """Stream the answer; every token's seal and its link in the chain are checked on this side."""
    from services.stream_checker import StreamChecker

    request = request_of(arguments, {"prompt": arguments.prompt})
    request.request_id = str(uuid.uuid4())
    prompt = await mesh.client.tokenize(request)
    view = AnswerView(request.request_id)
    view.checker = StreamChecker(view.key, prompt)
    stream = mesh.client.generate(request, timeout_s=arguments.timeout, checker=view.checker)
    try:
        async with aclosing(stream) as responses:
            async for response in responses:
                view.show(response)
    finally:
        view.break_line()
    return view


async def _checks(mesh: LocalMesh) -> dict[str, int]:
    """What the processes themselves have checked since they started, all together."""
    diagnostics = await mesh.client.diagnostics()
    everybody = [diagnostics.counters, *(one.counters for one in diagnostics.workers)]
    wanted = {"frames checked": "frames_checked", "barriers": "barriers_completed"}
    return {
        shown: sum(int(counters.get(name, 0)) for counters in everybody)
        for shown, name in wanted.items()
    }


def _picture(mesh: LocalMesh) -> str:
    stages = " → ".join(f"stage-{index} [{span}]" for index, span in enumerate(mesh.spans))
    spare = " + full worker" if any(spec.name == "full-worker" for spec in mesh.specs) else ""
    return f"{mesh.model.name} over {stages}{spare}"


# -- up -------------------------------------------------------------------------------------------


async def _up(arguments: argparse.Namespace) -> int:
    settings = load_settings(arguments)
    folder = Path(arguments.run_directory) if arguments.run_directory else None
    certs = Path(arguments.certs) if arguments.certs else None
    wishes = Wishes(settings, arguments.full_worker, arguments.listen, folder, certs)
    changed = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        with progress_bar() as progress:
            mesh = await stack.enter_async_context(
                local_mesh(wishes, report=note, progress=progress, changed=changed.set)
            )
        if arguments.ready_file:
            await mesh.write_ready_file(Path(arguments.ready_file))
        note(f"ready: {_picture(mesh)}")
        note(f"try: {_to_try(mesh, arguments.certs)}")
        leaving = _leave_on_signals(mesh)
        show = _lines if plain_terminal() else _table
        shown = asyncio.create_task(show(mesh, changed, arguments.ready_file))
        waits = [asyncio.create_task(one.wait()) for one in (leaving, mesh.supervisor.gave_up)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (shown, *waits):
                task.cancel()
            await asyncio.gather(shown, *waits, return_exceptions=True)
    if not leaving.is_set():
        raise StartFailed("the coordinator died too often and was given up")
    note("all processes have ended")
    return 0


def _to_try(mesh: LocalMesh, certs: str | None) -> str:
    """A command line that asks this mesh."""
    credentials = f" --client-certs {shlex.quote(certs)}" if certs else ""
    where = f"--address {dialled(mesh.address)}{credentials}"
    return f'{command_line()} generate "Why is the sky blue?" {where}'


def _leave_on_signals(mesh: LocalMesh) -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second one ends every process at once."""
    leaving = asyncio.Event()

    def signalled() -> None:
        if leaving.is_set():
            mesh.supervisor.kill()
            return
        note("draining; a second Ctrl-C does not wait")
        leaving.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signalled)
    return leaving


async def _lines(mesh: LocalMesh, changed: asyncio.Event, ready_file: str | None) -> None:
    """Without a terminal: a line for every process that changed, and fresh process ids on file."""
    known = {name: child.state for name, child in mesh.supervisor.children.items()}
    while True:
        await changed.wait()
        changed.clear()
        for name, child in mesh.supervisor.children.items():
            if child.state != known.get(name):
                known[name] = child.state
                note(f"{name}: {child.state} (pid {child.pid or '-'}, restarts {child.restarts})")
        if ready_file:
            await refresh_ready_file(mesh, Path(ready_file))


async def _table(mesh: LocalMesh, changed: asyncio.Event, ready_file: str | None) -> None:
    """On a terminal: a table that is looked up every second."""
    from rich.live import Live

    with Live(refresh_per_second=4, transient=True) as live:
        while True:
            live.update(await _render(mesh))
            if changed.is_set() and ready_file:
                changed.clear()
                await refresh_ready_file(mesh, Path(ready_file))
            await asyncio.sleep(REFRESH_S)


async def _render(mesh: LocalMesh) -> Any:
    from rich.table import Table

    table = Table(title=f"{mesh.model.name} at {mesh.address}")
    for heading in ("process", "pid", "layers", "state", "stage", "in flight", "KV", "restarts"):
        table.add_column(heading)
    try:
        status = await mesh.status()
        seen = {one.worker.name: one for one in status.workers}
        counts = (
            f"{status.running} running, {status.queued} queued, "
            f"{status.finished} finished, {status.failed} failed"
        )
    except MeshError as error:
        seen, counts = {}, error.message
    for name, child in mesh.supervisor.children.items():
        one = seen.get(name)
        state = "serving" if name == COORDINATOR and child.pid else child.state
        table.add_row(
            name,
            str(child.pid or "-"),
            str(child.spec.span or ("all" if name != COORDINATOR else "")),
            state if one is None else word_of(one),
            str(one.stage_index_plus_one - 1) if one and one.stage_index_plus_one else "",
            str(one.in_flight) if one else "",
            str(one.kv_tokens) if one else "",
            str(child.restarts),
        )
    table.caption = f"{counts}; Ctrl-C drains and stops"
    return table
