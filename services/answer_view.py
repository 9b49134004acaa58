"""An answer as the command line shows it, and what it says at the end."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from services.cli_common import print_json
from services.mesh_report import environment_json, finish_json
from services.request_ids import request_key
from stagemesh.errors import InvalidConfiguration, InvalidRequest, MeshError
from stagemesh.v1 import generation_service_pb2 as pb

if TYPE_CHECKING:
    from services.stream_checker import StreamChecker

_OPTIONAL = ("top_p", "repetition_penalty", "repetition_context", "seed")
_PLAIN = (
    "max_tokens",
    "temperature",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "logprobs",
)


def request_of(arguments: argparse.Namespace, prompt: dict[str, Any]) -> pb.GenerateRequest:
    """The request that flags and a ``{"prompt"}`` or ``{"messages"}`` entry describe.

    Raises InvalidRequest for what cannot even be put into a message, InvalidConfiguration for a
    bad flag.
    """
    request = pb.GenerateRequest()
    try:
        for name in _PLAIN:
            setattr(request, name, getattr(arguments, name))
        for name in _OPTIONAL:
            if getattr(arguments, name) is not None:
                setattr(request, name, getattr(arguments, name))
        request.stop.extend(arguments.stop)
        request.stop_token_ids.extend(arguments.stop_token_id)
        for text in arguments.logit_bias:
            token_id, _, bias = text.partition("=")
            request.logit_bias.add(token_id=int(token_id), bias=float(bias))
    except (ValueError, TypeError) as error:
        raise InvalidConfiguration(f"a parameter is out of range: {error}") from None
    if arguments.verify:
        level = f"VERIFICATION_LEVEL_{arguments.verify.upper()}"
        request.MergeFrom(pb.GenerateRequest(verify=level))
    if arguments.deliver:
        mode = f"DELIVERY_MODE_{arguments.deliver.upper()}"
        request.MergeFrom(pb.GenerateRequest(deliver=mode))
    request.detach = getattr(arguments, "detach", False)
    try:
        _set_prompt(request, prompt, raw=getattr(arguments, "raw", False))
    except UnicodeEncodeError:  # half a surrogate pair, or bytes of a command line in another code
        raise InvalidRequest("the prompt is not Unicode text", field="prompt") from None
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: dict[str, Any], *, raw: bool) -> None:
    if "messages" in prompt:
        messages = prompt["messages"]
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise InvalidRequest("messages is a list of {role, content}", field="messages")
        request.chat.SetInParent()
        for one in messages:
            role, content = one.get("role", ""), one.get("content", "")
            if not (isinstance(role, str) and isinstance(content, str)):
                raise InvalidRequest("a message's role and content are text", field="messages")
            request.chat.messages.add(role=role, content=content)
        return
    text = prompt["prompt"]
    if not isinstance(text, str):
        raise InvalidRequest("a prompt is text", field="prompt")
    if raw or not text:
        request.text = text
    else:
        request.chat.messages.add(role="user", content=text)


class AnswerView:
    """Prints responses as they come and measures them on this side."""

    def __init__(
        self,
        request_id: str,
        *,
        first_index: int = 0,
        as_json: bool = False,
        logprobs: bool = False,
        stream: Any = None,
    ) -> None:
        self.request_id = request_id
        self.key = request_key(request_id)
        self.text = ""
        self._first_index = first_index
        self._begins = 0
        """Character of the answer at which ``text`` begins, if there is some."""
        self.token_ids: list[int] = []
        self.finish: pb.Finish | None = None
        self.checker: StreamChecker | None = None
        self._as_json = as_json
        self._logprobs = logprobs
        """They were asked for: a certain token's is 0, which says nothing by itself."""
        self._stream = stream or sys.stdout
        self._began = time.monotonic()
        self._first = self._last = 0.0
        self._timed = 0

    def show(self, response: pb.GenerateResponse) -> None:
        """One response."""
        if response.HasField("correction"):
            self._withdraw(response.correction)
        if response.tokens:
            self._last = time.monotonic()
            self._first = self._first or self._last
            self._timed += len(response.tokens)
        self.token_ids += [token.token_id for token in response.tokens]
        if response.text and not self.text:
            self._begins = response.character
        self.text += response.text
        if response.HasField("finish"):
            self.finish = response.finish
        if self._as_json:
            print_json(response_json(response, logprobs=self._logprobs))
        elif response.text:
            print(response.text, end="", file=self._stream, flush=True)

    def _withdraw(self, correction: pb.Correction) -> None:
        del self.token_ids[max(0, correction.from_position - self._first_index) :]
        self.text = self.text[: max(0, correction.from_character - self._begins)]
        if not self._as_json:
            print(f"\n[corrected: {correction.reason}]\n{self.text}", end="", file=self._stream)

    def break_line(self) -> None:
        """End the line that the answer stands on."""
        if self.text and not self.text.endswith("\n") and not self._as_json:
            print(file=self._stream, flush=True)

    @property
    def ttft_ms(self) -> float:
        """From the call to the first token, milliseconds, on this side."""
        return round((self._first - self._began) * 1000, 3) if self._first else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first by the time since the first, on this side."""
        lasted_s = self._last - self._first
        return round((self._timed - 1) / lasted_s, 3) if self._timed > 1 and lasted_s > 0 else 0.0

    async def final_json(self, client: Any) -> dict[str, Any]:
        """The last line of ``generate --json``."""
        finish = self.finish or pb.Finish()
        try:
            environment = environment_json(await client.mesh())
        except MeshError as error:  # the answer is complete; this client may not see the mesh
            environment = {"unknown": str(error)}
        return {
            "request_id": self.request_id,
            "text": self.text,
            "token_ids": self.token_ids,
            **finish_json(finish),
            "ttft_ms": self.ttft_ms,
            "tokens_per_second": self.tokens_per_second,
            "verified_by_client": {
                "tokens": self.checker.tokens_checked if self.checker else 0,
                "links": self.checker.links_checked if self.checker else 0,
            },
            "environment": environment,
        }


def response_json(response: pb.GenerateResponse, *, logprobs: bool = False) -> dict[str, Any]:
    """One line of ``generate --json`` but the last."""
    document: dict[str, Any] = {
        "request_id": response.request_id,
        "position": response.position,
        "token_ids": [token.token_id for token in response.tokens],
        "text": response.text,
        "epoch": response.epoch,
        "verified_through": response.verified_through,
    }
    if response.tokens and (logprobs or any(token.logprob for token in response.tokens)):
        document["logprobs"] = [token.logprob for token in response.tokens]
    if any(token.alternatives for token in response.tokens):
        document["alternatives"] = [
            [{"token_id": one.token_id, "logprob": one.logprob} for one in token.alternatives]
            for token in response.tokens
        ]
    if response.HasField("correction"):
        document["correction"] = {
            "from_position": response.correction.from_position,
            "from_character": response.correction.from_character,
            "reason": response.correction.reason,
        }
    return document


def show_summary(view: AnswerView, say: Callable[[str], None]) -> None:
    """How the answer was made, for people."""
    finish = view.finish
    if finish is None:
        return
    counted = finish_json(finish)
    usage = counted["usage"]
    say("")
    say(f"  finished        {counted['finish_reason']}")
    say(f"  tokens          {usage['prompt_tokens']} prompt, {usage['completion_tokens']} answer")
    say(f"  first token     {view.ttft_ms:.0f} ms")
    say(f"  speed           {view.tokens_per_second:.1f} tokens/s")
    say(f"  route           {' → '.join(finish.route) or 'none'}")
    for name, count in sorted(finish.checks.items()):
        say(f"  {name.replace('_', ' '):<15} {count}")
    if view.checker is not None:
        say(
            f"  checked here    {view.checker.tokens_checked} token seals, "
            f"{view.checker.links_checked} chain links"
        )
    for one in counted["recoveries"]:
        say(
            f"  recovery        {one['cause']} on {one['worker'] or '?'}: {one['action']}, "
            f"{one['kept']} kept, {one['replayed']} computed again, {one['seconds']:.2f} s"
        )
    if not counted["recoveries"]:
        say("  recoveries      none")
