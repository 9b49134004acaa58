"""The checks of a decode step, replaced by nothing in every other step. *Benchmarks only.*

The product has no such switch, and gets none: nothing here is imported by anything but
`switched`, a process that a benchmark starts, and the objects of that process alone are changed. In
it, `CheckSwitch.installed` puts a *turnstile* in the place of each function in `CHECKS`. A
turnstile counts the call and passes it on: to the function itself while the step is checked, to one
that only does what the stream cannot go on without while it is bare. It costs the same either way,
so it cancels out of a difference.

A step begins where the coordinator works out what its row must look like when it returns. Whatever
belongs to a numbered step (a frame, its acknowledgement, its token) goes by the mode of *that*
step, however late it comes: what was sealed is verified, what was not is not. What has no number
goes by the step under way. A bare step leaves rolling digests and the chain as they were, at both
ends; so the checked step behind it finds them equal, and is checked as always.

Not in the table, so paid by both: the order of a hop's steps and the account of what is expected
(without them nothing moves), what decoding a message checks by itself, and the comparison of labels
when a frame is offered to its link.
"""

# ruff: noqa: SLF001 - what is replaced is the inside of things

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator import core, synchronizer
from coordinator.synchronizer import TokenStreamSynchronizer
from services import codec
from services.stage_service import HopEndpoint
from stage_worker import sampling, sessions, stage
from stage_worker.row_forward import RowForward
from stage_worker.sampling import Draw
from stage_worker.sessions import SessionTable
from stage_worker.stage import Stage
from stagemesh import checksum, hop_receiver
from stagemesh.errors import MeshError
from stagemesh.frame import StepFrame
from stagemesh.hop_receiver import Ack, HopReceiver
from stagemesh.sequence import Order
from stagemesh.token import TokenChunk

Plan = Sequence[bool]
"""For each decode step of a stream, whether it is checked."""

_ACKNOWLEDGEMENT = b"SMA1"


class SwitchFailed(MeshError):
    """A check did not run where it had to, or ran where it must not: there is no figure."""

    reason = "SWITCH_FAILED"


@dataclass(frozen=True, slots=True)
class Check:
    """``attribute`` of ``owner``, and what stands in for it in a bare step. ``step``: index of the
    argument whose step decides (itself a number, or something with one); None: the step under way.
    ``every_step``: there is no step without it; else one call may stand for several steps, and
    chance decides whether the last of them is bare."""

    name: str
    owner: Any
    attribute: str
    bare: Callable[..., Any]
    step: int | None = 0
    every_step: bool = True


def _nothing(*_args: object, **_options: object) -> None:
    """What a check leaves behind."""


def _as_it_is(thing: Any) -> Any:
    return thing


def _encoded(frame: StepFrame, **_options: object) -> Iterator[bytes]:
    return _encode(frame)


def _judged_bare(endpoint: HopEndpoint, data: bytes) -> Any:
    return endpoint.receiver.receive(codec.decode_request(data))  # type: ignore[arg-type]


def _label_unread(receiver: HopReceiver, frame: StepFrame) -> Order:
    """Only what a copy, sent because a timer was early, must not slip past."""
    if frame.step == receiver.next_step:
        return Order.NEXT
    return receiver._gate.judge(frame.epoch, frame.step)


def _found(table: SessionTable, row: Any) -> Any:
    return table._sessions[row.request]


def _cache_found(forward: RowForward, _kind: Any, work: Any) -> Any:
    return forward._caches.single(work.row.request, work.session.length)


def _activation(one: Stage, frame: StepFrame, _works: Any) -> Any:
    return None if one.model.is_first else frame.tensor


def _largest(logits: Any) -> list[Draw]:
    return [Draw(int(row.argmax()), 0.0) for row in logits]


def _labelled(token: TokenChunk, status: Any, marks: Any) -> TokenChunk:
    return TokenChunk(
        token.request,
        token.position,
        token.token_id,
        token.epoch,
        token.step,
        token.logprob,
        token.margin,
        token.sampled_at_unix_ns,
        token.source,
        token.chain,
        marks,
        token.alternatives,
        status,
    )


def _taken(stream: TokenStreamSynchronizer, _row: Any, _epoch: int, step: int) -> Any:
    return stream._expected.pop(step)


def _unread(stream: TokenStreamSynchronizer, _row: Any, expected: Any, _now: float) -> None:
    stream.confirmed = expected.end_position


def _unmoved(_token_ids: Any, value: int = 0) -> int:
    return value


def _unlinked(previous: bytes, *_token: int) -> bytes:
    return previous


_encode = codec.encode_frame

CHECKS: tuple[Check, ...] = (
    Check("frame sealed", StepFrame, "sealed", _as_it_is),
    Check("frame proved", codec, "encode_frame", _encoded),
    Check("checks timed", HopEndpoint, "_judge", _judged_bare, None),
    Check("limits", hop_receiver, "check_limits", _nothing),
    Check("header", hop_receiver, "check_header", _nothing),
    Check("label and order", HopReceiver, "_judge_label", _label_unread, 1),
    Check("payload", hop_receiver, "check_payload", _nothing),
    Check("content", HopReceiver, "_check_content", _nothing, 1),
    Check("acknowledgement", Ack, "checksum", lambda _ack: 0, every_step=False),
    Check("address", Stage, "_check_address", _nothing, 1),
    Check("row admitted", SessionTable, "admit", _found, None),
    Check("cache length", RowForward, "_cache_for", _cache_found, None),
    Check("activation received", Stage, "_received", _activation, 1),
    Check("size on leaving", Stage, "_check_sizes", _nothing, None),
    Check("logits", sampling, "greedy", _largest, None),
    Check("stage's digest", sessions, "history_digest", _unmoved, None),
    Check("activation marked", stage, "crc32c", lambda *_data: 0, None),
    Check("token chained", sessions, "chain_next", _unlinked, None),
    Check("token sealed", TokenChunk, "sealed", _as_it_is),
    Check("rows of the step", core, "answers", lambda _frame, _sent: True),
    Check("row awaited", TokenStreamSynchronizer, "_take", _taken, 3),
    Check("row and token", TokenStreamSynchronizer, "_check", _unread, 2),
    Check("token sealed again", TokenChunk, "judged", _labelled),
    Check("outgoing row", TokenStreamSynchronizer, "_check_outgoing", _nothing, 1),
    Check("expected digest", synchronizer, "history_digest", _unmoved, None),
)


@dataclass(slots=True)
class Calls:
    """How often a check's turnstile was passed."""

    checked: int = 0
    bare: int = 0

    def count(self, *, checked: bool) -> None:
        """One more, in a step that is checked or bare."""
        if checked:
            self.checked += 1
        else:
            self.bare += 1


@dataclass(slots=True)
class CheckSwitch:
    """One switch. ``on_step(checked)`` is called as each decode step of the plan begins, and once
    with the first behind it."""

    on_step: Callable[[bool], None] = lambda _checked: None
    calls: dict[str, Calls] = field(default_factory=dict)
    checksums: Calls = field(default_factory=Calls)
    """CRC32C computed while `witnessed`, acknowledgements aside: they may be a step late."""
    expected: Calls = field(default_factory=Calls)
    """Rows that the coordinator awaited."""
    _checked: bool = True
    _bare_steps: set[int] = field(default_factory=set)
    _plan: Plan = ()
    _prompt_tokens: int = 0

    def follow(self, plan: Plan, prompt_tokens: int) -> None:
        """The next stream: what is behind the plan's end is checked."""
        self._plan, self._prompt_tokens = plan, prompt_tokens

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Turnstiles in the place of every check, taken away again behind the block."""
        with contextlib.ExitStack() as stack:
            for check in CHECKS:
                self.calls[check.name] = Calls()
                real = getattr(check.owner, check.attribute)
                turnstile = self._turnstile(check, real)
                stack.enter_context(_replaced(check.owner, check.attribute, turnstile))
            expect = self._expecting(TokenStreamSynchronizer.expect)
            stack.enter_context(_replaced(TokenStreamSynchronizer, "expect", expect))
            yield

    @contextlib.contextmanager
    def witnessed(self) -> Iterator[None]:
        """Count every CRC32C that is computed, by mode: it sees what the table has forgotten."""
        compute, counted = checksum._crc32c, self.checksums  # type: ignore[attr-defined]

        def count(data: Any, value: int = 0) -> int:
            if data[:4] != _ACKNOWLEDGEMENT:
                counted.count(checked=self._checked)
            return int(compute(data, value))

        with _replaced(checksum, "_crc32c", count):
            yield

    def require_honest(self, checked: int, bare: int) -> None:
        """Raise SwitchFailed unless every turnstile was passed in each of so many checked steps and
        in each of so many bare ones: what is not on the path of a step cannot be its cost."""
        for check in CHECKS:
            calls = self.calls[check.name]
            least = (checked, bare) if check.every_step else (1, 0)
            if calls.checked < least[0] or calls.bare < least[1]:
                raise SwitchFailed(
                    f"the check {check.name!r} was met {calls.checked} times in {checked} checked "
                    f"steps and {calls.bare} times in {bare} bare ones"
                )

    def require_witnessed(self) -> None:
        """Raise SwitchFailed unless CRC32C was computed in checked steps and in no bare one."""
        seen = self.checksums
        if seen.bare or not seen.checked:
            raise SwitchFailed(
                f"CRC32C was computed {seen.bare} times in bare steps, {seen.checked} in checked"
            )

    # -- inside -----------------------------------------------------------------------------------

    def _turnstile(self, check: Check, real: Callable[..., Any]) -> Callable[..., Any]:
        counted, bare = self.calls[check.name], check.bare
        is_checked = self._rule(check.step)

        @functools.wraps(real)
        def turnstile(*args: Any, **options: Any) -> Any:
            if is_checked(args):
                counted.checked += 1
                return real(*args, **options)
            counted.bare += 1
            return bare(*args, **options)

        return turnstile

    def _rule(self, place: int | None) -> Callable[[tuple[Any, ...]], bool]:
        """Whether a call is of a checked step, from its arguments."""
        bare_steps = self._bare_steps
        if place is None:
            return lambda _args: self._checked

        def by_number(args: tuple[Any, ...]) -> bool:
            thing = args[place]
            return (thing if isinstance(thing, int) else thing.step) not in bare_steps

        return by_number

    def _expecting(self, expect: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(expect)
        def expecting(
            stream: Any, step: int, epoch: int, first_position: int, token_ids: Sequence[int]
        ) -> Any:
            self._begin(step, first_position)
            return expect(stream, step, epoch, first_position, token_ids)

        return expecting

    def _begin(self, step: int, first_position: int) -> None:
        place = first_position - self._prompt_tokens
        within = 0 <= place < len(self._plan)
        checked = self._plan[place] if within else True
        if not checked:
            self._bare_steps.add(step)
        self._checked = checked
        self.expected.count(checked=checked)
        if within or place == len(self._plan):
            self.on_step(checked)


@contextlib.contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)
