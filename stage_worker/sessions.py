"""What a stage remembers of each request beside its KV cache: pure bookkeeping, no mlx.

A *session* begins with the opening row of a request on a route and ends with a close, a new
opening, or the end of the epoch. It holds every token id consumed, so that length, rolling digest,
penalty history and token chain can be recomputed for any earlier position after a rewind.

Invariants: ``length == len(tokens)`` equals the positions in the stage's KV cache between two
steps; ``digest`` is `history_digest` over ``tokens``; the sum of all reserves never exceeds the
budget, so that a request that was admitted cannot run the worker out of memory.

The chain. The opening carries the digest behind the last prefilled token, wherever the prefill is
cut. The first sampled position fixes where that is (``chain_base``). From there on the chain is a
function of the consumed tokens alone, so a rewind needs no special case.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from stagemesh.checksum import chain_next, chain_over, history_digest
from stagemesh.frame import RowStatus, StepRow
from stagemesh.sampling import RowOpening


class RowFault(Exception):
    """One row cannot be served; its neighbours can. ``status`` and ``detail`` go into the row."""

    def __init__(self, status: RowStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Session:
    """One request on one stage. ``pending`` is the last stage's business: the logits that will
    judge the token at position ``length``, when they were computed."""

    __slots__ = (
        "_chain",
        "_chain_end",
        "_link",
        "chain_base",
        "digest",
        "opening",
        "pending",
        "request",
        "reserve_tokens",
        "tokens",
    )

    def __init__(self, request: bytes, opening: RowOpening) -> None:
        self.request = request
        self.opening = opening
        self.reserve_tokens = opening.reserve_tokens
        self.tokens: array[int] = array("I")
        self.digest = 0
        self.pending: Any = None
        self.chain_base: int | None = None
        self._chain = opening.chain
        self._chain_end = 0
        self._link: tuple[bytes, int, int, bytes] | None = None
        """The last link made: chain before it, position, token, chain behind it."""

    @property
    def length(self) -> int:
        """Positions consumed: where the next token goes."""
        return len(self.tokens)

    def consume(self, token_ids: Sequence[int]) -> None:
        """Append token ids that are now in the cache."""
        self.digest = history_digest(token_ids, self.digest)
        self.tokens.extend(token_ids)
        self.pending = None

    def rewind(self, length: int) -> None:
        """Forget every token at position ``length`` and behind."""
        del self.tokens[length:]
        self.digest = history_digest(self.tokens)
        self.pending = None
        if self.chain_base is not None and self._chain_end > length:
            self._chain, self._chain_end = self.opening.chain, self.chain_base

    def chain_before(self, position: int) -> bytes:
        """Chain digest behind the token at ``position - 1``; ``position`` is at most ``length``.

        Raises RowFault for a position ahead of the prefill's end, of which the opening says
        nothing.
        """
        if self.chain_base is None:
            self.chain_base = self._chain_end = position
        if position < self._chain_end:
            raise RowFault(RowStatus.INVALID, f"no chain is known before position {position}")
        end, link = self._chain_end, self._link
        if link and position == end + 1 and link[:3] == (self._chain, end, self.tokens[end]):
            self._chain = link[3]  # what was drawn last has come back as the next step's token
        else:
            self._chain = chain_over(self._chain, end, self.tokens[end:position])
        self._chain_end = position
        return self._chain

    def chain_behind(self, position: int, token_id: int) -> bytes:
        """Chain digest behind a token that is drawn for ``position``. Raises as `chain_before`."""
        before = self.chain_before(position)
        behind = chain_next(before, position, token_id)
        self._link = (before, position, token_id, behind)
        return behind


class SessionTable:
    """All sessions of one epoch and the budget they share."""

    def __init__(self, kv_budget_tokens: int) -> None:
        self.kv_budget_tokens = kv_budget_tokens
        self.reserved_tokens = 0
        self._sessions: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions.values())

    @property
    def kv_tokens(self) -> int:
        """Positions cached over all requests."""
        return sum(session.length for session in self._sessions.values())

    def find(self, request: bytes) -> Session:
        """The session of ``request``. Raises RowFault (CACHE_LOST)."""
        session = self._sessions.get(request)
        if session is None:
            raise RowFault(RowStatus.CACHE_LOST, "no cache for this request on this stage")
        return session

    def open(self, row: StepRow, opening: RowOpening) -> Session:
        """Begin a request, forgetting an earlier session of it. Raises RowFault (POSITION_MISMATCH,
        CACHE_EXHAUSTED)."""
        self.close(row.request)
        if row.first_position != 0:
            raise RowFault(
                RowStatus.POSITION_MISMATCH, f"opens at position {row.first_position}, not 0"
            )
        session = Session(row.request, opening)
        session.reserve_tokens = 0
        self._reserve(session, max(opening.reserve_tokens, row.end_position))
        self._sessions[row.request] = session
        return session

    def admit(self, row: StepRow) -> Session:
        """The session of a row that follows its request's opening: the row starts where the cache
        ends and fits the budget. Raises RowFault (CACHE_LOST, POSITION_MISMATCH,
        CACHE_EXHAUSTED)."""
        session = self.find(row.request)
        if row.first_position != session.length:
            raise RowFault(
                RowStatus.POSITION_MISMATCH,
                f"row starts at {row.first_position}, cache holds {session.length}",
            )
        if row.end_position > session.reserve_tokens:
            self._reserve(session, row.end_position)
        return session

    def close(self, request: bytes) -> bool:
        """Forget a request; False if there was none."""
        session = self._sessions.pop(request, None)
        if session is None:
            return False
        self.reserved_tokens -= session.reserve_tokens
        return True

    def clear(self) -> None:
        """Forget everything (the epoch ended)."""
        self._sessions.clear()
        self.reserved_tokens = 0

    def _reserve(self, session: Session, tokens: int) -> None:
        growth = tokens - session.reserve_tokens
        room = self.kv_budget_tokens - self.reserved_tokens
        if growth > room:
            raise RowFault(
                RowStatus.CACHE_EXHAUSTED,
                f"needs {growth} more positions, {room} of {self.kv_budget_tokens} are free",
            )
        self.reserved_tokens += growth
        session.reserve_tokens = tokens
