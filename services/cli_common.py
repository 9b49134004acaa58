"""What the commands share: flags, progress, a mesh to talk to, JSON lines."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services import settings as settings_module
from services.setting_fields import MESH_NAMES
from services.settings import Settings
from stagemesh import __version__
from stagemesh.errors import InvalidConfiguration

if TYPE_CHECKING:
    from services.credentials import TlsFiles

PROGRESS_SHARE = 0.1
"""Without a terminal, a line is printed for every tenth of a download."""


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config FILE``."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with the tables [mesh] and [process]"
    )


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """What a private or local mesh can be told."""
    group = parser.add_argument_group("mesh (when one is started)")
    add_config(parser)
    settings_module.add_flags(group, MESH_NAMES)
    settings_module.add_flags(group, ("threads", "tensor_parallel", "drain_s", "log_level"))
    group.add_argument(
        "--no-full-worker",
        dest="full_worker",
        action="store_false",
        help="do without the worker that hosts every layer (reroute target and verifier)",
    )


def add_connection(parser: argparse.ArgumentParser, *, required_note: str) -> None:
    """``--address`` and the client's TLS files."""
    parser.add_argument("--address", metavar="HOST:PORT", help=f"a running mesh; {required_note}")
    settings_module.add_flags(parser, ("tls_ca", "tls_cert", "tls_key"))
    parser.add_argument(
        "--client-certs", metavar="DIR", help="instead: a directory of `stagemesh certs init`"
    )


def load_settings(
    arguments: argparse.Namespace, defaults: Mapping[str, object] | None = None
) -> Settings:
    """The settings in force for this command. Raises InvalidConfiguration."""
    return settings_module.load(
        config=getattr(arguments, "config", None),
        flags=settings_module.flags_of(arguments),
        defaults=defaults,
    )


def connect(arguments: argparse.Namespace, address: str) -> Any:
    """A MeshClient for ``address`` with the TLS files that were given."""
    from services.client import MeshClient

    return MeshClient(address, tls=client_tls(arguments))


def client_tls(arguments: argparse.Namespace) -> TlsFiles | None:
    """The TLS files that were given, or the administrator's of a directory. None: plain text.

    Raises InvalidConfiguration for files that cannot be used.
    """
    from services.credentials import TlsFiles

    tls = load_settings(arguments).process.tls
    if getattr(arguments, "client_certs", None):
        tls = TlsFiles.in_directory(Path(arguments.client_certs), "admin")
    if tls is not None:
        tls.checked()
    return tls


def check_only_private(arguments: argparse.Namespace) -> None:
    """Raise InvalidConfiguration if flags of a private mesh were given together with an address.

    ``--model`` may be: it names the model to ask for.
    """
    private = [name for name in (*MESH_NAMES, "threads", "drain_s") if name != "model"]
    given = [name for name in private if getattr(arguments, name, None) is not None]
    given += [] if arguments.full_worker else ["no_full_worker"]
    if given:
        raise InvalidConfiguration(
            f"--{given[0].replace('_', '-')} is for a mesh that is started here; leave it out, or"
            " --address",
            setting=given[0],
        )


@contextlib.asynccontextmanager
async def some_mesh(arguments: argparse.Namespace) -> AsyncIterator[Any]:
    """A client of the mesh at ``--address``, or of a private one that ends with the block."""
    if arguments.address:
        check_only_private(arguments)
        async with connect(arguments, arguments.address) as client:
            yield client
        return
    from services.up import Wishes, local_mesh

    wishes = Wishes(
        load_settings(arguments), full_worker=arguments.full_worker, listen="127.0.0.1:0"
    )
    async with contextlib.AsyncExitStack() as stack:
        with progress_bar() as progress:
            mesh = await stack.enter_async_context(
                local_mesh(wishes, report=note, progress=progress)
            )
        yield mesh.client


def run_async(main: Coroutine[Any, Any, int]) -> int:
    """Run a command's coroutine; SIGTERM and SIGINT cancel it, so that everything is cleaned up."""

    async def supervised() -> int:
        task = asyncio.ensure_future(main)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            return 130

    return asyncio.run(supervised())


def note(text: str) -> None:
    """A line about what is going on, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def command_line() -> str:
    """How this command was called, for hints that can be pasted: ``.venv/bin/stagemesh``."""
    called = Path(sys.argv[0])
    if called.name != "stagemesh":
        return "stagemesh"
    found = shutil.which("stagemesh")
    return "stagemesh" if found and Path(found).samefile(called) else shlex.quote(str(called))


def print_json(document: dict[str, Any]) -> None:
    """One JSON object on one line, with the version."""
    print(json.dumps({"version": __version__, **document}, ensure_ascii=False), flush=True)


@contextlib.contextmanager
def progress_bar() -> Any:
    """``progress(what, done, total)`` for downloads: a bar on a terminal, else lines."""
    if not sys.stderr.isatty():
        yield _line_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total or None)
            shown.update(tasks[what], completed=done, total=total or None)

        yield update


def _line_progress() -> Any:
    seen: dict[str, float] = {}

    def update(what: str, done: int, total: int) -> None:
        share = done / total if total else 0.0
        last = seen.get(what)
        if last is None or share >= min(1.0, last + PROGRESS_SHARE) > last:
            seen[what] = share
            note(f"{what}: {share:.0%}" if total else what)

    return update


def read_prompts(path: str) -> list[dict[str, Any]]:
    """``--prompts FILE``: a JSON list of strings, or a JSON object with prompt or messages a line.

    Raises InvalidConfiguration naming the line that cannot be used.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {path}: {error.strerror}", setting="prompts"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(f"{path} is not UTF-8: {error}", setting="prompts") from None
    found: list[Any] = []
    try:
        if text.lstrip().startswith("["):
            found = [{"prompt": one} if isinstance(one, str) else one for one in json.loads(text)]
        else:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise InvalidConfiguration(f"{path} is not JSON: {error}", setting="prompts") from None
    for index, one in enumerate(found):
        if not (isinstance(one, dict) and {"prompt", "messages"} & set(one)):
            raise InvalidConfiguration(
                f"{path}: entry {index + 1} has neither prompt nor messages", setting="prompts"
            )
    return found


def plain_terminal() -> bool:
    """Whether to leave out colours and cursor movements."""
    return not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
