"""What a stage holds of each request: its session and its KV cache, which change together.

`sessions` knows the positions consumed and keeps to the budget, without mlx; `kv_cache` holds the
arrays. A request has both or neither, and between two steps both are equally long: every way in,
back and out (an opening, a rewind, a failed row, a close, the end of an epoch) is taken for both
here. What is refused is raised as a RowFault and leaves the request as it was; but one that opens
again starts over, and is no longer held if that is refused.

**Failed computation.** A row that fails after its forward is trimmed back to ``first_position``
where the cache allows, and forgotten otherwise (its next row then finds CACHE_LOST).
"""

from __future__ import annotations

from stage_worker import calibration
from stage_worker.hosting import SpanModel
from stage_worker.kv_cache import CacheStore
from stage_worker.sessions import RowFault, Session, SessionTable
from stagemesh.frame import FrameKind, RowStatus, StepRow


class HeldRequests:
    """See the module. ``caches`` may be lent to whoever runs a forward (`row_forward`).
    ``kv_budget_tokens`` bounds the sum of all reserves, in positions."""

    def __init__(self, model: SpanModel, kv_budget_tokens: int) -> None:
        self.sessions = SessionTable(kv_budget_tokens)
        self.caches = CacheStore(model)

    def admit(self, kind: FrameKind, row: StepRow) -> Session:
        """The session that this row goes on with or opens; a probe's is thrown away. Raises
        RowFault."""
        if kind is FrameKind.PROBE:
            return _probe_session(row)
        if row.opening is None:
            return self.sessions.admit(row)
        if kind is FrameKind.DECODE:
            raise RowFault(RowStatus.INVALID, "a decode row cannot open a request")
        self.caches.drop(row.request)
        session = self.sessions.open(row, row.opening)
        self.caches.open(row.request)
        return session

    def rewind(self, request: bytes, target: int) -> Session:
        """Trim a request to ``target`` positions. Raises RowFault (CACHE_LOST, POSITION_MISMATCH,
        INVALID where this model's caches cannot be trimmed)."""
        session = self.sessions.find(request)
        if target > session.length:
            raise RowFault(
                RowStatus.POSITION_MISMATCH, f"rewind to {target}, cache holds {session.length}"
            )
        if target == session.length:
            return session
        if not self.caches.trim(request, session.length, target):
            raise RowFault(RowStatus.INVALID, "this model's cache cannot be trimmed")
        session.rewind(target)
        return session

    def put_back(self, row: StepRow, session: Session, fault: RowFault) -> None:
        """Undo what a failed row did to its request; forget the request if that cannot be done."""
        if session.length > row.first_position:
            session.rewind(row.first_position)
        broken = fault.status is RowStatus.COMPUTE_FAILED or row.request not in self.caches
        if broken or not self.caches.trim(row.request, session.length, session.length):
            self.forget(row.request)

    def forget(self, request: bytes) -> None:
        """Free what is held of a request, if anything is."""
        self.sessions.close(request)
        self.caches.drop(request)

    def clear(self) -> None:
        """Forget everything (the epoch ended)."""
        self.sessions.clear()
        self.caches.clear()


def _probe_session(row: StepRow) -> Session:
    if row.first_position != 0:
        raise RowFault(RowStatus.POSITION_MISMATCH, "a probe starts at position 0")
    return Session(row.request, row.opening or calibration.probe_opening(row.token_count))
