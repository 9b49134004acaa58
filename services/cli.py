"""The one console command: ``stagemesh COMMAND …``.

Commands live in ``cli_*.py`` modules that are imported only when they are asked for, so that
``stagemesh --help`` answers at once and a coordinator's image needs no MLX. A command's module has
``add_arguments(parser, command)`` and ``run(arguments) -> int``. What goes wrong ends in one clear
line on stderr: what, and what to do about it. Exit status: 0 it holds, 1 it failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from services.process_exit import ExitStatus
from stagemesh import __version__
from stagemesh.errors import InvalidConfiguration, InvalidRequest, MeshError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand: where it lives and what it says of itself."""

    module: str
    summary: str
    group: str


COMMANDS: dict[str, Command] = {
    "run": Command(
        "services.cli_up", "ask one question on a mesh made for it, and show how", "start"
    ),
    "up": Command(
        "services.cli_up", "start a whole mesh on this machine and keep it running", "start"
    ),
    "generate": Command("services.cli_generate", "stream one answer", "use"),
    "chat": Command("services.cli_generate", "talk with the model", "use"),
    "status": Command("services.cli_admin", "workers, routes and requests of a mesh", "look"),
    "trace": Command("services.cli_admin", "where the time of one request went", "look"),
    "diagnose": Command("services.cli_diagnose", "one request's story from every side", "look"),
    "events": Command("services.cli_admin", "follow what happens in a mesh", "look"),
    "drain": Command("services.cli_admin", "take a worker out of service", "look"),
    "health": Command("services.cli_admin", "probe a process for an orchestrator", "look"),
    "doctor": Command(
        "services.cli_doctor", "what this machine offers, and what would be faster", "look"
    ),
    "model": Command("services.cli_model", "import and list models", "models"),
    "support": Command(
        "services.cli_model", "which model types can be split, by trying them", "models"
    ),
    "bench": Command("services.cli_bench", "measure against one process", "prove"),
    "validate": Command(
        "services.cli_validate", "compare with one process, token by token", "prove"
    ),
    "stress": Command("services.cli_stress", "many requests while faults are injected", "prove"),
    "simulate": Command("services.cli_simulate", "seeded faults against the decisions", "prove"),
    "detect": Command("services.cli_detect", "measure the corruption detectors", "prove"),
    "coordinator": Command("services.cli_process", "run a coordinator process", "processes"),
    "stage-worker": Command("services.cli_process", "run a stage worker process", "processes"),
    "check-config": Command(
        "services.cli_process", "print the settings in force, and whence", "processes"
    ),
    "certs": Command("services.cli_process", "make a mesh's certificates", "processes"),
}
"""Every command there may be; those whose module is not installed are not offered."""

_EXAMPLES = """\
examples:
  stagemesh run --prompt "Why is the sky blue?"     one question, start to finish
  stagemesh up --stages 3                           a mesh of three stages and a full worker
  stagemesh generate "Tell me a joke." --address 127.0.0.1:50051
  stagemesh status --address 127.0.0.1:50051

`stagemesh COMMAND --help` tells what a command takes. Settings also come from STAGEMESH_* variables
and from a TOML file (--config); `stagemesh check-config` shows the result.
"""


def is_installed(command: Command) -> bool:
    """Whether the command's module is part of this installation."""
    parent = command.module.rpartition(".")[0]
    if parent != "services" and importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(command.module) is not None


def overview() -> str:
    """The help text of ``stagemesh`` itself; imports no command."""
    lines = [
        "usage: stagemesh COMMAND …",
        "",
        "Runs one large language model as a pipeline of gRPC services, and proves every token.",
        "",
    ]
    offered = {name: one for name, one in COMMANDS.items() if is_installed(one)}
    for group in dict.fromkeys(one.group for one in offered.values()):
        lines.append(f"{group}:")
        members = ((name, one) for name, one in offered.items() if one.group == group)
        lines += [f"  {name:<14} {one.summary}" for name, one in members]
    return "\n".join([*lines, "", _EXAMPLES])


def parser_of(name: str) -> argparse.ArgumentParser:
    """What ``stagemesh NAME`` takes; imports its module. Raises KeyError for an unknown name."""
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(
        prog=f"stagemesh {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    importlib.import_module(command.module).add_arguments(parser, name)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Without ``arguments`` it is the console script: the process's own, and the process ends with
    that status (``process_exit``).
    """
    if arguments is not None:
        return _dispatch(list(arguments))
    status = ExitStatus.register()
    try:
        status.value = _dispatch(sys.argv[1:])
    except SystemExit as leaving:  # how argparse ends: 0 behind --help, 2 for bad usage
        status.value = leaving.code if isinstance(leaving.code, int) else EXIT_OK
        raise
    return status.value


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(overview())
        return EXIT_OK if words else EXIT_USAGE
    if words[0] in {"-V", "--version"}:
        print(f"stagemesh {__version__}")
        return EXIT_OK
    name = words[0]
    command = COMMANDS.get(name)
    if command is None or not is_installed(command):
        return _unknown(name)
    # Failed handshakes are told in our own words; gRPC's would come first, and many times.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        parsed = parser_of(name).parse_args(words[1:])
        parsed.command = name
        return int(importlib.import_module(command.module).run(parsed))
    except MeshError as error:
        return report(error)
    except UnicodeEncodeError:  # bytes of a path may be in any code, nothing else may
        settings = (value for name, value in os.environ.items() if name.startswith("STAGEMESH_"))
        odd = next((word for word in (*words, *settings) if _is_odd(word)), None)
        if odd is None:
            raise
        return report(
            InvalidConfiguration(f"bytes that are no Unicode text where text belongs: {odd!a}")
        )
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in {"mlx", "mlx_lm"}:
            complain("MLX is not installed here; a worker needs `pip install 'stagemesh[worker]'`")
            return EXIT_FAILED
        raise


def _is_odd(word: str) -> bool:
    """Whether it holds bytes that are not the locale's (and so half of a surrogate pair)."""
    return any("\ud800" <= one <= "\udfff" for one in word)


def _unknown(name: str) -> int:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else "."
    complain(f"there is no command {name!r}{hint} Try `stagemesh --help`.")
    return EXIT_USAGE


def report(error: MeshError) -> int:
    """Say what went wrong and return the exit status that says whose fault it was."""
    shown = {key: value for key, value in error.metadata.items() if value not in error.message}
    facts = "".join(f" {key}={value}" for key, value in sorted(shown.items()))
    complain(f"{error.message} [{error.reason}{facts}]")
    return EXIT_USAGE if isinstance(error, InvalidConfiguration | InvalidRequest) else EXIT_FAILED


def complain(text: str) -> None:
    """One message on stderr, the way every command says that it cannot go on."""
    print(f"stagemesh: {text}", file=sys.stderr)
