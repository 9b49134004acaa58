"""``stagemesh diagnose REQUEST_ID``: one request's story from every side."""

from __future__ import annotations

import argparse
from pathlib import Path

from services.cli_common import add_config, add_connection, connect, note, print_json, run_async
from services.setting_fields import PORT_DEFAULT
from stagemesh.errors import InvalidConfiguration

ADDRESS_DEFAULT = f"127.0.0.1:{PORT_DEFAULT}"

_NOTES = """\
The story: frames and time per hop, barriers, recoveries, digests, events, in time order; versions
and settings. --logs takes the run directory of `stagemesh up --run-directory DIR`, or any folder of
*.log files, and puts the lines that name the request or its trace among the rest. The prompt is in
nothing that this command can read; the answer's token ids and text are left out unless --with-text
is given.
"""


def add_arguments(parser: argparse.ArgumentParser, _command: str) -> None:
    """Flags of the command."""
    parser.epilog = _NOTES
    parser.add_argument("request_id", metavar="REQUEST_ID")
    parser.add_argument("--bundle", metavar="FILE", help="write a zip to attach to a bug report")
    parser.add_argument(
        "--with-text", action="store_true", help="include the answer's token ids and text"
    )
    parser.add_argument("--logs", metavar="DIR", help="folder with the processes' log files")
    parser.add_argument("--json", action="store_true", help="for programs")
    add_config(parser)
    add_connection(parser, required_note=f"[{ADDRESS_DEFAULT}]")


def run(arguments: argparse.Namespace) -> int:
    """Entry point."""
    logs = Path(arguments.logs).expanduser() if arguments.logs else None
    if logs is not None and not logs.is_dir():
        raise InvalidConfiguration(f"{arguments.logs} is no folder", setting="logs")
    return run_async(_diagnose(arguments, logs))


async def _diagnose(arguments: argparse.Namespace, logs: Path | None) -> int:
    from services.request_evidence import gather
    from services.request_story import logs_json, story, write_bundle

    async with connect(arguments, arguments.address or ADDRESS_DEFAULT) as client:
        found = await gather(client, arguments.request_id, with_text=arguments.with_text, logs=logs)
    if arguments.bundle:
        try:
            write_bundle(found, Path(arguments.bundle))
        except OSError as error:
            raise InvalidConfiguration(
                f"cannot write {arguments.bundle}: {error.strerror}", setting="bundle"
            ) from None
        note(f"bundle: {arguments.bundle}")
    if arguments.json:
        print_json(
            {
                "request_id": found.request_id,
                "generation": found.generation,
                "events": found.events,
                "diagnostics": found.diagnostics,
                "tokens": found.tokens,
                "digests": found.digests,
                "logs": logs_json(found),
                "missing": found.missing,
                "version": found.mesh.get("version", ""),
                "environment": found.mesh.get("environment", {}),
                "settings": found.mesh.get("settings", {}),
            }
        )
    else:
        print("\n".join(story(found)))
    return 0
