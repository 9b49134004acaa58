"""One answer between the mesh and its readers.

The driver pushes tokens, watermarks, corrections and exactly one end into an `Answer`; any number
of readers follow it, each at its own pace, from any position. Nothing is queued per reader: a
reader holds a cursor and takes what lies behind it, so a slow client costs no memory and gets
larger pieces. Text is derived here and nowhere else. A stop string is found here too: the mesh is
told with StopMatched, and tokens behind the match are dropped. When the answer has ended, its
text is looked at once (`coordinator.text_signals`): what that finds is counted and shown on the
trace, and changes nothing.

Everything here runs on the event loop's thread; only `Answer.read` and `Answer.ended` wait.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from coordinator.events import Event, StopMatched
from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
    RequestSummary,
)
from coordinator.ports import ClientInstruction
from coordinator.text_signals import WINDOW_CHARACTERS, WINDOW_TOKENS, TextSignals
from services.detokenizer import Detokenizer
from services.request_ids import show_id
from services.stop_strings import StopStrings
from stagemesh.errors import InvalidRequest, MeshError
from stagemesh.guards import Counters
from stagemesh.token import TokenChunk

PIECE_TOKENS_MAX = 64
"""Tokens in one response: a reader that attaches late gets many responses, not one huge one."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Tokens from ``from_index`` and text from ``from_character`` on were wrong."""

    from_index: int
    from_character: int
    reason: str
    links: tuple[bytes, ...] = ()
    """The chain's links of what was withdrawn, by which a reader who missed this is known."""


@dataclass(frozen=True, slots=True)
class End:
    """How an answer ended. reason: stop | length | cancelled | error (then ``error`` is set)."""

    reason: str
    summary: RequestSummary
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What a reader gets next. ``position`` is the answer index of the first of ``chunks``,
    ``character`` that of the beginning of ``text``."""

    position: int
    chunks: tuple[TokenChunk, ...] = ()
    text: str = ""
    verified_through: int = 0
    accepted_at_unix_ns: int = 0
    withdrawal: Withdrawal | None = None
    end: End | None = None
    character: int = 0

    @property
    def epoch(self) -> int:
        """Route generation of the tokens; a piece never mixes two."""
        return self.chunks[0].epoch if self.chunks else 0


class Answer:
    """The TokenSink of one request. ``silent`` token ids end the answer and yield no text;
    ``counters`` count what was noticed about the text.

    Invariants: ``len(tokens) == len(_text_ends) == len(_accepted_at)``; ``_text_ends`` never falls
    and its last entry is at most ``len(text)``; after ``end`` nothing changes, unless it is a
    failure that is gone on from (``reopen``).
    """

    def __init__(
        self,
        request: bytes,
        *,
        make_detokenizer: Callable[[], Detokenizer],
        stops: Sequence[str] = (),
        silent: frozenset[int] = frozenset(),
        feed: Callable[[Event], None],
        wall_clock_ns: Callable[[], int],
        counters: Counters | None = None,
    ) -> None:
        self.request = request
        self.request_id = show_id(request)
        self.tokens: list[TokenChunk] = []
        self.text = ""
        self.verified_through = 0
        self.end: End | None = None
        self.withdrawals: list[Withdrawal] = []
        self.advice: tuple[str, ...] = ()
        """Signals about the text of an answer that went well; telemetry, never a verdict."""
        self._counters = Counters() if counters is None else counters
        self._make_detokenizer = make_detokenizer
        self._stop_strings = tuple(stops)
        self._silent = silent
        self._feed = feed
        self._wall_clock_ns = wall_clock_ns
        self._text_ends: list[int] = []
        self._accepted_at: list[int] = []
        self._waiting: set[asyncio.Future[None]] = set()
        """Readers that have seen everything."""
        self._restart_text()

    # -- what the driver calls ---------------------------------------------------------------------

    def accept(self, instruction: AcceptTokens) -> None:
        """Take consecutive tokens; those known already (a repeat) or behind a stop are dropped."""
        if self.end is not None:
            return
        for index, chunk in enumerate(instruction.chunks, instruction.first_index):
            if index == len(self.tokens) and not self._matched:
                self._take(chunk)
        self._verify_through(instruction.verified_through)
        self._wake()

    def advance(self, instruction: AdvanceVerified) -> None:
        """The verified watermark moved."""
        if self.end is None:
            self._verify_through(instruction.verified_through)
            self._wake()

    def _verify_through(self, count: int) -> None:
        """The mesh may have verified tokens that are behind a stop string."""
        self.verified_through = max(self.verified_through, min(count, len(self.tokens)))

    def correct(self, instruction: CorrectTokens) -> None:
        """Withdraw tokens and the text they made; readers who saw them are told."""
        first = instruction.from_index
        if self.end is not None or first >= len(self.tokens):
            return
        kept = self.tokens[:first]
        from_character = self._text_ends[first - 1] if first else 0
        links = tuple(chunk.chain for chunk in self.tokens[first:])
        self.withdrawals.append(Withdrawal(first, from_character, instruction.reason, links))
        self.tokens, self.text = [], ""
        del self._text_ends[:]
        accepted_at, self._accepted_at = self._accepted_at, []
        self.verified_through = min(self.verified_through, first)
        self._restart_text()
        for chunk in kept:
            self._take(chunk)
        self._accepted_at = accepted_at[:first]
        self._wake()

    def finish(self, instruction: FinishRequest) -> None:
        """The one end of an answer that went well.

        An answer that its stop string has ended ends there, even if the mesh, which hears of it a
        moment later, came to another end first.
        """
        if self.end is not None:
            return
        self._release(self._detokenizer.finish())
        last = self._stops.finish()
        self.text += last.text
        reason, summary = instruction.reason, instruction.summary
        matched = self._matched or last.matched
        if matched and self.tokens:
            reason = "stop"
            summary = replace(
                summary,
                matched_stop=summary.matched_stop or matched,
                completion_tokens=len(self.tokens),
                chain=self.tokens[-1].chain,
            )
        self.end = End(reason, summary)
        self._look_at_text()
        self._wake()

    def _look_at_text(self) -> None:
        signals = TextSignals()
        recent = [chunk.token_id for chunk in self.tokens[-WINDOW_TOKENS:]]
        signals.observe(self.text[-WINDOW_CHARACTERS:], recent)
        self.advice = signals.read().signals
        for name in self.advice:
            self._counters.count(f"text_signals.{name}")

    def fail(self, instruction: FailRequest) -> None:
        """The one end of an answer that could not go on, at the token that readers have got to:
        the mesh may have been further, with tokens that could not be kept."""
        if self.end is None:
            instruction.error.metadata["position"] = str(len(self.tokens))
            summary = replace(instruction.summary, completion_tokens=len(self.tokens))
            self.end = End("error", summary, instruction.error)
            self._wake()

    def reopen(self) -> list[Event]:
        """Go on behind a failure: everything so far stands, and another end will come. Returns what
        the mesh has to be told once it knows the request again."""
        self.end = None
        return self._standing_stop()

    def restore(self, kept: Iterable[tuple[ClientInstruction, int]]) -> list[Event]:
        """Take what a journal kept, in order, each with its wall clock (ns). Returns what the mesh
        has to be told once it knows the request: a stop string that was found and still stands."""
        live = self._feed, self._wall_clock_ns, self._counters
        self._feed, self._counters = _hear_nothing, Counters()  # an end was counted when it came
        try:
            for instruction, at_ns in kept:
                self._wall_clock_ns = functools.partial(int, at_ns)
                self._restored(instruction)
        finally:
            self._feed, self._wall_clock_ns, self._counters = live
        return self._standing_stop()

    def _restored(self, instruction: ClientInstruction) -> None:
        match instruction:
            case AcceptTokens():
                self.accept(instruction)
            case AdvanceVerified():
                self.advance(instruction)
            case CorrectTokens():
                self.correct(instruction)
            case FinishRequest():
                self.finish(instruction)
            case FailRequest():
                self.fail(instruction)

    # -- text --------------------------------------------------------------------------------------

    def _restart_text(self) -> None:
        self._detokenizer = self._make_detokenizer()
        self._stops = StopStrings(self._stop_strings)
        self._matched = ""

    def _take(self, chunk: TokenChunk) -> None:
        self.tokens.append(chunk)
        if chunk.token_id not in self._silent:
            self._release(self._detokenizer.add(chunk.token_id))
        self._text_ends.append(len(self.text))
        self._accepted_at.append(self._wall_clock_ns())

    def _release(self, text: str) -> None:
        if not self._stop_strings:
            self.text += text
            return
        released = self._stops.feed(text)
        self.text += released.text
        if released.matched and not self._matched:
            self._matched = released.matched
            self._feed(self._stop())

    def _standing_stop(self) -> list[Event]:
        return [self._stop()] if self._matched else []

    def _stop(self) -> StopMatched:
        """What the mesh is told of the stop string that was found behind the last token."""
        last = self.tokens[-1].chain if self.tokens else b""
        return StopMatched(self.request, len(self.tokens), self._matched, last)

    # -- readers -----------------------------------------------------------------------------------

    async def read(self, from_index: int = 0, link: bytes = b"") -> AsyncGenerator[Piece, None]:
        """Everything from token ``from_index`` on, live, up to and including the piece with the
        end; first of all the withdrawals that a reader has missed whose last token has ``link``.

        Raises InvalidRequest if the answer ends before ``from_index``.
        """
        told = self._told(from_index, link)
        if told == len(self.withdrawals):
            await self._reach(from_index)
            told = len(self.withdrawals)
        known = min(from_index, len(self.tokens))
        reader = _Reader(self, from_index, self._text_ends[known - 1] if known else 0, told)
        while True:
            piece = reader.next_piece()
            if piece is None:
                await self._change()
                continue
            yield piece
            if piece.end is not None:
                return

    def has_missed(self, from_index: int, link: bytes) -> bool:
        """Whether a reader whose token before ``from_index`` has ``link`` has missed a withdrawal
        of it."""
        return self._told(from_index, link) < len(self.withdrawals)

    def _told(self, from_index: int, link: bytes) -> int:
        """How many withdrawals a reader knows of whose token before ``from_index`` has ``link``."""
        everything = len(self.withdrawals)
        is_here = 0 < from_index <= len(self.tokens) and self.tokens[from_index - 1].chain == link
        if not link or is_here:
            return everything
        for number in reversed(range(everything)):
            one = self.withdrawals[number]
            at = from_index - 1 - one.from_index
            if 0 <= at < len(one.links) and one.links[at] == link:
                return number
        return everything

    async def _reach(self, from_index: int) -> None:
        while self.end is None and len(self.tokens) < from_index:
            await self._change()
        if len(self.tokens) < from_index:
            raise InvalidRequest(
                f"the answer has {len(self.tokens)} tokens", field="from_position", value=from_index
            )

    async def ended(self) -> End:
        """Wait for the end."""
        while self.end is None:
            await self._change()
        return self.end

    async def _change(self) -> None:
        changed = asyncio.get_running_loop().create_future()
        self._waiting.add(changed)
        try:
            await changed
        finally:
            self._waiting.discard(changed)

    def _wake(self) -> None:
        for changed in self._waiting:
            if not changed.done():
                changed.set_result(None)

    def piece_at(self, index: int, character: int) -> Piece | None:
        """Tokens of one epoch from ``index`` on, and the text they made certain; None: none."""
        if index >= len(self.tokens):
            return None
        epoch = self.tokens[index].epoch
        last = index
        while (
            last + 1 < min(len(self.tokens), index + PIECE_TOKENS_MAX)
            and self.tokens[last + 1].epoch == epoch
        ):
            last += 1
        return Piece(
            position=index,
            chunks=tuple(self.tokens[index : last + 1]),
            text=self.text[character : self._text_ends[last]],
            verified_through=self.verified_through,
            accepted_at_unix_ns=self._accepted_at[last],
            character=character,
        )


def _hear_nothing(event: Event) -> None:
    """In the place of the mesh, while what it once knew is read back."""


class _Reader:
    """One cursor: the next token, the next character, the withdrawals it has seen."""

    __slots__ = ("_answer", "_character", "_index", "_verified", "_withdrawals")

    def __init__(self, answer: Answer, index: int, character: int, told: int) -> None:
        self._answer = answer
        self._index = index
        self._character = character
        self._verified = answer.verified_through
        self._withdrawals = told

    def next_piece(self) -> Piece | None:
        """What this reader has not seen yet; None: nothing for now."""
        answer = self._answer
        withdrawn = self._withdrawn()
        if withdrawn is not None:
            return withdrawn
        piece = answer.piece_at(self._index, self._character)
        if piece is not None:
            self._index += len(piece.chunks)
            self._character += len(piece.text)
            self._verified = piece.verified_through
            return piece
        if answer.end is not None:
            begins = self._character
            text = answer.text[begins:]
            self._character += len(text)
            return Piece(
                self._index,
                text=text,
                verified_through=answer.verified_through,
                end=answer.end,
                character=begins,
            )
        if answer.verified_through > self._verified:
            self._verified = answer.verified_through
            return Piece(self._index, verified_through=self._verified)
        return None

    def _withdrawn(self) -> Piece | None:
        answer = self._answer
        seen, self._withdrawals = self._withdrawals, len(answer.withdrawals)
        missed = answer.withdrawals[seen:]
        if not missed:
            return None
        index = min(one.from_index for one in missed)
        character = min(one.from_character for one in missed)
        if self._index <= index and self._character <= character:
            return None  # This reader had not come that far: nothing it saw was wrong.
        self._index, self._character = min(self._index, index), min(self._character, character)
        withdrawal = Withdrawal(self._index, self._character, missed[-1].reason)
        return Piece(self._index, verified_through=answer.verified_through, withdrawal=withdrawal)
