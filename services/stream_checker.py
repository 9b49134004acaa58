"""What a client checks of an answer: seals, positions, links, and that nothing is contradicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.codec import token_from_pb
from stagemesh.checksum import chain_start
from stagemesh.errors import SequenceGap, TokenRejected
from stagemesh.sequence import End, Order, SequenceIntegrityChecker, SequenceReport
from stagemesh.v1 import generation_service_pb2 as pb


class StreamChecker:
    """Verifies one answer as it arrives, over any number of streams. Pure: no I/O.

    ``prompt``, when the caller has the token ids, binds the first link of the chain as well.
    ``first_index`` is where reading began. Invariant: ``token_ids`` and ``text`` are what the
    caller has been given and not told to withdraw.
    """

    def __init__(
        self, request: bytes, prompt: Sequence[int] | None = None, *, first_index: int = 0
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.text = ""
        self.verified_through = 0
        self.tokens_checked = 0
        self.links_checked = 0
        self._first_index = first_index
        self._base = None if prompt is None else len(prompt)
        self._links = [None if prompt is None else chain_start(request, prompt)]
        self._character = 0
        self._begins = 0
        """Character of the answer at which ``text`` begins, if there is some."""
        self._order = SequenceIntegrityChecker(first=first_index)

    @property
    def position(self) -> int:
        """Answer index of the next token wanted."""
        return self._order.next_number

    @property
    def link(self) -> bytes:
        """The chain's link of the last token; empty if it is not known."""
        return self._links[-1] or b""

    @property
    def order(self) -> SequenceReport:
        """How the tokens came: how many, how often again, how often with others missing."""
        return self._order.report

    def attach(self, *, from_start: bool) -> None:
        """A new stream follows, from the first token or from ``position``."""
        self._character = 0 if from_start else len(self.text)

    def check(self, response: pb.GenerateResponse) -> pb.GenerateResponse | None:
        """The response without what was seen before; None if nothing is left of it.

        Raises TokenRejected, SequenceGap.
        """
        if response.HasField("correction"):
            self._withdraw(response.correction)
        repeated = self._repeated(response.position, len(response.tokens))
        self._compare(response.position, response.tokens[:repeated])
        for message in response.tokens[repeated:]:
            self._take(message)
        if response.text and not self.text:
            self._begins = response.character
        seen = min(len(response.text), len(self.text) - self._character)
        if response.text[:seen] != self.text[self._character : self._character + seen]:
            raise TokenRejected("delivered text was contradicted", position=response.position)
        self._character += len(response.text)
        self.text += response.text[seen:]
        self.verified_through = max(self.verified_through, response.verified_through)
        if response.HasField("finish"):
            self._check_finish(response.finish)
        return self._fresh(response, repeated, seen)

    def _repeated(self, position: int, count: int) -> int:
        """How many of ``count`` tokens from ``position`` on were seen before. Raises
        SequenceGap."""
        due = self.position
        if position == due:
            return 0
        if self._order.observe(position, count=count) is Order.DUPLICATE:
            return min(count, due - position)
        missing = self._order.missing(position)
        raise SequenceGap("tokens are missing", expected=due, got=position, missing=missing)

    def _fresh(
        self, response: pb.GenerateResponse, repeated: int, seen: int
    ) -> pb.GenerateResponse | None:
        if not (repeated or seen):
            return response
        fresh = pb.GenerateResponse()
        fresh.CopyFrom(response)
        del fresh.tokens[:repeated]
        fresh.position += repeated
        fresh.text = response.text[seen:]
        has_news = fresh.tokens or fresh.text or fresh.HasField("finish")
        return fresh if has_news or fresh.HasField("correction") else None

    def _take(self, message: Any) -> None:
        chunk = token_from_pb(message)
        index = self.position
        if chunk.request != self.request:
            raise TokenRejected("a token of another request", position=index)
        if self._base is None:
            self._base = chunk.position - index
        if chunk.position != self._base + index:
            raise TokenRejected("a token at the wrong position", position=index)
        previous = self._links[-1]
        chunk.verify(previous_chain=previous)
        self.tokens_checked += 1
        self.links_checked += previous is not None
        self._links.append(chunk.chain)
        self.token_ids.append(chunk.token_id)
        self._order.observe(index)

    def _compare(self, position: int, messages: Sequence[Any]) -> None:
        for index, message in enumerate(messages, position - self._first_index):
            if message.token_id != self.token_ids[index]:
                raise TokenRejected("a delivered token was contradicted", position=index)

    def _withdraw(self, correction: pb.Correction) -> None:
        kept = correction.from_position
        if kept < self.verified_through:
            raise TokenRejected("a verified token was withdrawn", position=kept)
        if kept < self._first_index:
            raise SequenceGap("what was read before is withdrawn; read it again", position=kept)
        if kept <= self.position:
            self._order.rewind_to(kept)
        del self.token_ids[kept - self._first_index :]
        del self._links[kept - self._first_index + 1 :]
        self.text = self.text[: max(0, correction.from_character - self._begins)]
        self._character = min(self._character, len(self.text))

    def _check_finish(self, finish: pb.Finish) -> None:
        if finish.reason == pb.FINISH_REASON_ERROR:
            return
        end = self._order.finish(finish.completion_tokens - self._first_index)
        if end is not End.COMPLETE:
            raise SequenceGap(
                "the answer's end is not its end",
                end=end.value,
                expected=finish.completion_tokens,
                got=self.position,
            )
        last = self._links[-1]
        if self.token_ids and finish.chain and finish.chain != last:
            raise TokenRejected("the last link does not match", position=self.position)
