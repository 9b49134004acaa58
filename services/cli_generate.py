"""``stagemesh generate`` and ``stagemesh chat``: answers on the terminal, or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from contextlib import aclosing
from pathlib import Path
from typing import Any

from services.answer_view import AnswerView, request_of, show_summary
from services.cli_common import (
    add_connection,
    add_mesh_flags,
    load_settings,
    note,
    print_json,
    read_prompts,
    run_async,
    some_mesh,
)
from services.line_reader import LineReader
from stagemesh.errors import InvalidConfiguration, MeshError

_EXAMPLES = """\
examples:
  stagemesh generate "Why is the sky blue?" --max-tokens 64
  stagemesh generate "Once upon a time" --raw --temperature 0.8 --seed 7
  stagemesh generate --prompts questions.jsonl --address 127.0.0.1:50051 --json
"""
_CHAT_HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) ends."


def add_arguments(parser: argparse.ArgumentParser, command: str) -> None:
    """Flags of both commands; generate also takes prompts."""
    if command == "generate":
        parser.epilog = _EXAMPLES
        parser.add_argument(
            "prompt", nargs="?", metavar="PROMPT", help="what to ask; - reads stdin"
        )
        parser.add_argument("--raw", action="store_true", help="send the prompt as it stands")
        parser.add_argument("--messages", metavar="FILE", help="JSON list of {role, content}")
        parser.add_argument(
            "--prompts",
            metavar="FILE",
            help="JSON list of strings, or one {prompt} or {messages} a line; asked in turn",
        )
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
        parser.add_argument(
            "--request-id", metavar="UUID", help="chosen by you, to resume it later"
        )
        parser.add_argument(
            "--detach", action="store_true", help="keep generating when this command ends"
        )
        parser.add_argument(
            "--resume", metavar="UUID", help="attach to a known generation instead of asking"
        )
        parser.add_argument(
            "--from-position", type=int, default=0, metavar="N", help="first token to --resume at"
        )
    else:
        parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(parser)
    add_connection(parser, required_note="without it a private one is started and stopped")
    add_mesh_flags(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Everything a request may say about its answer."""
    group = parser.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, default=0, metavar="N", help="0: mesh's default")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P", help="likeliest tokens up to this sum")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only so many; 0: any")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off")
    group.add_argument("--repetition-context", type=int, metavar="N", help="tokens it looks back")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="-2 to 2")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="-2 to 2")
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=X", help="repeatable"
    )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    group.add_argument(
        "--stop-token-id", type=int, action="append", default=[], metavar="ID", help="repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on behind the model's end")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same answer on any split")
    group.add_argument("--logprobs", type=int, default=0, metavar="N", help="1 to 20")
    group.add_argument(
        "--verify",
        choices=("transport", "numeric", "shadow"),
        help="least that is checked (numeric always is)",
    )
    group.add_argument(
        "--deliver", choices=("immediate", "verified"), help="before or behind the shadow"
    )
    group.add_argument("--timeout", type=float, metavar="S", help="deadline for the whole answer")


def run(arguments: argparse.Namespace) -> int:
    """Entry point of both commands."""
    return run_async(_chat(arguments) if arguments.command == "chat" else _generate(arguments))


def _wanted(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts to ask, each ``{"prompt"}`` or ``{"messages"}``; none to ``--resume``. Raises
    InvalidConfiguration."""
    given = [arguments.prompt is not None, bool(arguments.messages), bool(arguments.prompts)]
    if sum(given) + bool(arguments.resume) != 1:
        raise InvalidConfiguration(
            "give one of PROMPT, --messages, --prompts and --resume", setting="prompt"
        )
    if arguments.resume:
        return []
    if arguments.prompts:
        return read_prompts(arguments.prompts)
    if arguments.messages:
        return [{"messages": _read_messages(arguments.messages)}]
    return [{"prompt": _read_stdin() if arguments.prompt == "-" else arguments.prompt}]


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(
            f"standard input is not text: {error}", setting="prompt"
        ) from None


def _read_messages(path: str) -> Any:
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidConfiguration(
            f"cannot read {path}: {error.strerror}", setting="messages"
        ) from None
    except ValueError as error:
        raise InvalidConfiguration(f"{path} is not JSON: {error}", setting="messages") from None


async def _generate(arguments: argparse.Namespace) -> int:
    prompts = _wanted(arguments)
    if arguments.request_id and len(prompts) > 1:
        raise InvalidConfiguration(
            f"--request-id names one answer, and there are {len(prompts)} prompts",
            setting="request_id",
        )
    load_settings(arguments)  # bad settings are told before a mesh is started
    async with some_mesh(arguments) as client:
        if arguments.resume:
            return await _resume(client, arguments)
        for prompt in prompts:
            await _ask(client, arguments, prompt)
    return 0


async def _resume(client: Any, arguments: argparse.Namespace) -> int:
    view = AnswerView(arguments.resume, first_index=arguments.from_position, as_json=arguments.json)
    try:
        stream = client.resume(
            arguments.resume, arguments.from_position, timeout_s=arguments.timeout
        )
        async with aclosing(stream):
            async for response in stream:
                view.show(response)
    except MeshError as error:
        _broke_off(view, error, arguments)
        raise
    await _end(client, view, arguments)
    return 0


async def _ask(client: Any, arguments: argparse.Namespace, prompt: dict[str, Any]) -> AnswerView:
    from services.stream_checker import StreamChecker

    request = request_of(arguments, prompt)
    request_id = getattr(arguments, "request_id", None) or str(uuid.uuid4())
    view = AnswerView(
        request_id,
        as_json=getattr(arguments, "json", False),
        logprobs=request.logprobs > 0,
    )
    request.request_id = request_id
    request.model = (arguments.address and arguments.model) or ""
    checker = StreamChecker(view.key)
    stream = client.generate(request, timeout_s=arguments.timeout, checker=checker)
    try:
        async with aclosing(stream) as responses:
            async for response in responses:
                view.show(response)
    except MeshError as error:
        _broke_off(view, error, arguments)
        raise
    view.checker = checker
    await _end(client, view, arguments)
    return view


def _broke_off(view: AnswerView, error: MeshError, arguments: argparse.Namespace) -> None:
    """The answer is not whole: say how to get the rest of it, if it can be had."""
    view.break_line()
    told = error.metadata
    if arguments.address and told.get("resumable") == "yes" and told.get("request_id"):
        note(
            f"stagemesh: the answer has {told.get('position', '0')} tokens so far; for the rest:"
            f" stagemesh generate --address {arguments.address} --resume {told['request_id']}"
            f" --from-position {told.get('position', '0')}"
        )


async def _end(client: Any, view: AnswerView, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "json", False):
        print_json(await view.final_json(client))
    elif arguments.command == "generate":
        view.break_line()
        if sys.stderr.isatty():
            show_summary(view, note)


async def _chat(arguments: argparse.Namespace) -> int:
    load_settings(arguments)
    history: list[dict[str, str]] = []
    if arguments.system:
        history.append({"role": "system", "content": arguments.system})
    start = list(history)
    async with some_mesh(arguments) as client:
        note(_CHAT_HELP)
        reader = LineReader(sys.stdin.fileno())
        while True:
            line = await _read_line(reader)
            if line is None or line == "/quit":
                return 0
            if line == "/reset":
                history = list(start)
                continue
            if not line:
                continue
            history.append({"role": "user", "content": line})
            try:
                view = await _ask(client, arguments, {"messages": history})
            except MeshError as error:
                note(f"stagemesh: {error.message}")
                history.pop()
                continue
            view.break_line()
            history.append({"role": "assistant", "content": view.text})


async def _read_line(reader: LineReader) -> str | None:
    """A line from the terminal, a pipe or a file; None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", flush=True)
    line = await reader.line()
    return None if line is None else line.strip()
