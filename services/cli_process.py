"""``stagemesh coordinator | stage-worker | check-config | certs``: single processes."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from services import settings as settings_module
from services.cli_common import add_config, command_line, load_settings, print_json
from services.setting_fields import (
    COORDINATOR_ONLY,
    MESH_NAMES,
    PORT_DEFAULT,
    PROCESS_NAMES,
    WORKER_ONLY,
)


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of the command that was asked for."""
    if command == "certs":
        actions = parser.add_subparsers(dest="action", required=True, metavar="init")
        making = actions.add_parser("init", help="make a CA and one certificate per role, or renew")
        making.add_argument("--directory", default="certs", metavar="DIR", help="[certs]")
        making.add_argument(
            "--host", action="append", default=[], metavar="NAME", help="DNS name or IP to include"
        )
        making.add_argument("--days", type=float, metavar="N", help="how long they last [30]")
        making.add_argument("--json", action="store_true", help="for programs")
        return
    add_config(parser)
    if command == "check-config":
        parser.add_argument("--json", action="store_true", help="for programs")
        settings_module.add_flags(parser, (*MESH_NAMES, *PROCESS_NAMES))
        return
    left_out = WORKER_ONLY if command == "coordinator" else COORDINATOR_ONLY
    mesh = parser.add_argument_group("equal in every process of a mesh")
    settings_module.add_flags(mesh, MESH_NAMES)
    own = parser.add_argument_group("this process")
    settings_module.add_flags(own, [name for name in PROCESS_NAMES if name not in left_out])


def run(arguments: argparse.Namespace) -> int:
    """Entry point of all of them."""
    if arguments.command == "certs":
        return _certs(arguments)
    usual = {"listen": f"127.0.0.1:{PORT_DEFAULT}"} if arguments.command == "coordinator" else {}
    settings = load_settings(arguments, defaults=usual)
    if arguments.command == "coordinator":
        from services import run_coordinator

        return run_coordinator.main(settings)
    if arguments.command == "stage-worker":
        from services import run_stage_worker

        return run_stage_worker.main(settings)
    return _check_config(settings, as_json=arguments.json)


def _check_config(settings: settings_module.Settings, *, as_json: bool) -> int:
    rows = settings.as_rows()
    if as_json:
        print_json({"fingerprint": settings.mesh.fingerprint(), "settings": rows})
        return 0
    width = max(len(row["setting"]) for row in rows)
    values = max(len(row["value"]) for row in rows)
    for row in rows:
        print(f"{row['setting']:<{width}}  {row['value']:<{values}}  {row['source']}")
    print(f"\nmesh settings fingerprint {settings.mesh.fingerprint()}")
    return 0


def _certs(arguments: argparse.Namespace) -> int:
    from services import certs

    directory = Path(arguments.directory).expanduser()
    days = certs.LEAF_LIFETIME_DAYS if arguments.days is None else arguments.days
    issued = certs.init(directory, hosts=arguments.host, lifetime_days=days)
    files = sorted(path.name for path in directory.iterdir() if path.suffix in {".pem", ".key"})
    if arguments.json:
        expires = issued.expires.isoformat()
        print_json({"directory": str(directory), "files": files, "expires": expires})
        return 0
    shown, command = shlex.quote(str(directory)), command_line()
    print(f"{directory}: {', '.join(files)}")
    print(f"valid until {issued.expires:%Y-%m-%d %H:%M} UTC; the same command again renews them")
    print(f"  {command} up --certs {shown}")
    print(f'  {command} generate "…" --address HOST:PORT --client-certs {shown}')
    return 0
