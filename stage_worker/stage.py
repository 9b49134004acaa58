"""A stage: the part of a route that turns one step's frame into the next hop's frame.

`Stage` is called on one thread (see `runner`), does no I/O, and answers every step it is given with
exactly one frame: the same step, epoch, kind and rows, hop indices moved on by one, checksums left
to the link that sends it.

**Tensor layout**, the same for every kind and every hop: rank 2, ``[tokens of all rows, hidden]``,
rows packed in row order, one line per token id. A row that has failed keeps its lines, filled with
zeros, so that a row's place follows from the rows alone. The first stage receives no tensor and the
last sends none.

**Rows fail alone.** Whatever is wrong with one row (position, cache, budget, an exception in its
forward, a non-finite or outsized activation) is written into that row, and its neighbours go on. A
row that arrives failed passes through untouched and is not computed. If a batched forward raises,
all its rows are taken out of the batch as they were and computed one by one, so that only the
guilty one fails.

**What a row does to its request**, by kind:

* PREFILL and SCORE consume ``token_ids`` at ``first_position``, which must be the cache length. The
  first row of a request on a route carries the opening and starts at 0; a second opening starts
  over.
* DECODE consumes one token and always yields one. Rows whose caches can be laid side by side run as
  one batched forward.
* REWIND trims to ``first_position``. CLOSE forgets; closing what is not there is no error.
* PROBE runs a prefill on throw-away caches and samples greedily; requests and budget stay
  untouched.

**Scores.** The token at position p is judged by the logits behind position p-1, with the same
specification, history and noise as drawing there would use. A last stage keeps the logits behind a
row when the row was a SCORE, or a PREFILL that sampled or ended at ``prompt_length``; so after a
prefill of the prompt, the first SCORE row judges all its tokens. If they were not kept (after a
decode or a rewind), the row's first token has no score.

What a request has on this stage is kept, and put back when a row fails, by `held_requests`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from stage_worker import calibration, digests
from stage_worker.activation_checks import SizeCheck, came_so, check_marked
from stage_worker.answers import answer
from stage_worker.envelope import Envelope
from stage_worker.held_requests import HeldRequests
from stage_worker.hosting import SpanModel
from stage_worker.row_forward import RowForward, Work
from stage_worker.sessions import RowFault, Session
from stage_worker.step_account import StepAccount, StepTiming
from stage_worker.tensors import wire_dtype
from stagemesh.checksum import crc32c
from stagemesh.errors import EpochFenced, FrameMalformed, RouteRefused
from stagemesh.frame import BoundaryDigest, FrameKind, RowStatus, StepFrame, StepRow
from stagemesh.guards import Counters
from stagemesh.tensor import Tensor
from stagemesh.token import StageMark
from stagemesh.topology import COORDINATOR_HOP

log = logging.getLogger(__name__)

MEMORY_TIDY_STEPS = 256
"""Steps between two releases of mlx's pool of freed buffers, which otherwise keeps every odd
size."""
PADDING_ROOM_SHARE = 0.25
"""Part of the budget that a batch may take, padding included: with two microbatches under way,
padding adds at most half of the budget to what it counts."""


class Stage:
    """One stage of a route. Every method is for the compute thread; see the module's docstring.

    ``kv_budget_tokens`` bounds the sum of all reserves, in positions. ``clock_ns`` is the wall
    clock for people; ``timer_ns`` a monotonic one for durations, ``cpu_ns`` this thread's CPU time,
    for what a check costs. ``numeric`` checks every activation's size.
    """

    def __init__(
        self,
        model: SpanModel,
        *,
        name: str,
        kv_budget_tokens: int,
        clock_ns: Callable[[], int],
        numeric: bool = True,
        timer_ns: Callable[[], int] = time.perf_counter_ns,
        cpu_ns: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self.model = model
        self.name = name
        self.numeric = numeric
        self.epoch = 0
        self.stage_index = 0
        self.stage_count = 0
        self.envelope = Envelope()
        self.stage_counters = Counters()
        self.last_timings: StepTiming | None = None
        self.kv_tokens = 0
        """Positions cached over all requests. This and the next two are set at the end of each
        step, so that another thread may read them."""
        self.reserved_tokens = 0
        """Positions promised to requests."""
        self.requests = 0
        """Requests with a cache."""
        self._clock_ns = clock_ns
        self._account = StepAccount(self.stage_counters, clock_ns=clock_ns, timer_ns=timer_ns)
        self._held = HeldRequests(model, kv_budget_tokens)
        self._dtype = wire_dtype(model.dtype)
        self._sizes = SizeCheck(
            self.envelope, self._dtype, model.hidden_size, self.stage_counters, cpu_ns
        )
        self._batching = calibration.batching_agrees(model)
        self._forward = RowForward(
            model,
            self._held.caches,
            batching=self._batching,
            padding_room=int(kv_budget_tokens * PADDING_ROOM_SHARE),
        )
        if numeric and model.is_first and not model.is_last:
            calibration.learn_output(model, self.envelope)

    # -- what others may read ---------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[str]:
        """``batch``: decode rows run side by side; ``trim``: rewind works; ``score``: can be a
        shadow; ``boundaries``: can tell what leaves each of its layers."""
        claims = {
            "batch": self._batching,
            "trim": self.model.trimmable,
            "score": self.model.is_last,
            "boundaries": self.model.has_taps,
        }
        return frozenset(name for name, holds in claims.items() if holds)

    # -- epochs -----------------------------------------------------------------------------------

    def open(self, epoch: int, stage_index: int, stage_count: int) -> None:
        """Take a place on the route ``epoch``; everything of older epochs is freed. Opening the
        same place again changes nothing. Raises EpochFenced (not newer), RouteRefused (wrong place
        for this span)."""
        place = (stage_index, stage_count)
        if epoch < self.epoch or (
            epoch == self.epoch and place != (self.stage_index, self.stage_count)
        ):
            raise EpochFenced("route is not newer", epoch=epoch, current=self.epoch)
        is_first, is_last = stage_index == 0, stage_index == stage_count - 1
        fits = (is_first, is_last) == (self.model.is_first, self.model.is_last)
        if not (fits and 0 <= stage_index < stage_count):
            raise RouteRefused(
                "span does not fit its place on the route",
                span=self.model.span,
                stage_index=stage_index,
                stage_count=stage_count,
            )
        if epoch > self.epoch:
            self._forget_all()
        self.epoch, self.stage_index, self.stage_count = epoch, stage_index, stage_count

    def fence(self, epoch: int) -> None:
        """Refuse ``epoch`` and everything older from now on, and free what they hold."""
        if epoch >= self.epoch:
            self._forget_all()
            self.epoch, self.stage_index, self.stage_count = epoch, 0, 0

    def close(self) -> None:
        """Nothing was started that would outlive this object."""

    def _forget_all(self) -> None:
        self._held.clear()
        self._publish()
        mx.clear_cache()

    def _publish(self) -> None:
        sessions = self._held.sessions
        self.kv_tokens = sessions.kv_tokens
        self.reserved_tokens = sessions.reserved_tokens
        self.requests = len(sessions)

    # -- steps ------------------------------------------------------------------------------------

    def step(self, frame: StepFrame) -> StepFrame:
        """Compute one step. Raises EpochFenced or FrameMalformed for a frame that is not for this
        stage of this route; anything about a row is written into the row."""
        self._check_address(frame)
        self._account.begin()
        tensor = None
        if frame.kind is FrameKind.REWIND:
            rows = tuple(self._rewind(row) for row in frame.rows)
        elif frame.kind is FrameKind.CLOSE:
            rows = tuple(self._close(row) for row in frame.rows)
        else:
            rows, tensor = self._compute(frame)
        self.last_timings = self._account.close(frame, rows)
        self._publish()
        self._tidy()
        is_last = self.stage_index == self.stage_count - 1
        return replace(
            frame,
            hop_from=self.stage_index,
            hop_to=COORDINATOR_HOP if is_last else self.stage_index + 1,
            rows=rows,
            tensor=tensor,
            payload_crc32c=0,
            header_crc32c=0,
        )

    def _check_address(self, frame: StepFrame) -> None:
        if frame.epoch != self.epoch or self.stage_count == 0:
            self.stage_counters.count("frames_fenced")
            raise EpochFenced("step of another epoch", epoch=frame.epoch, current=self.epoch)
        if frame.hop_to != self.stage_index:
            raise FrameMalformed(
                "frame for another stage", hop_to=frame.hop_to, stage=self.stage_index
            )
        if frame.kind is FrameKind.UNSPECIFIED:
            raise FrameMalformed("frame without a kind", step=frame.step)

    def _tidy(self) -> None:
        self.stage_counters["batches_split"] = self._forward.batches_split
        if self.stage_counters["steps"] % MEMORY_TIDY_STEPS == 0:
            mx.clear_cache()

    # -- rows without a forward -------------------------------------------------------------------

    def _rewind(self, row: StepRow) -> StepRow:
        if row.status is not RowStatus.OK:
            return row
        try:
            session = self._held.rewind(row.request, row.first_position)
        except RowFault as fault:
            return self._failed(row, fault)
        return _marked(row, StageMark(session.length, session.digest, 0))

    def _close(self, row: StepRow) -> StepRow:
        self._held.forget(row.request)
        return row if row.status is not RowStatus.OK else _marked(row, StageMark(0, 0, 0))

    def _failed(self, row: StepRow, fault: RowFault, stage: int | None = None) -> StepRow:
        where = self.stage_index if stage is None else stage
        log.warning(
            "row failed request=%s status=%s stage=%d: %s",
            row.request.hex(),
            fault.status.name,
            where,
            fault.detail,
        )
        return row.failed(fault.status, stage=where, detail=fault.detail)

    # -- rows with a forward ----------------------------------------------------------------------

    def _compute(self, frame: StepFrame) -> tuple[tuple[StepRow, ...], Tensor | None]:
        rows = list(frame.rows)
        works = self._admit(frame, rows)
        hidden = self._received(frame, works)
        self._account.computing()
        self._account.computed(self._forward.run(frame.kind, works, hidden))
        if self.numeric and not self.model.is_last:
            self._check_sizes([work for work in works if work.fault is None], frame.kind)
        for work in works:
            rows[work.index] = self._settled(frame, work)
        return tuple(rows), self._packed(frame, works)

    def _admit(self, frame: StepFrame, rows: list[StepRow]) -> list[Work]:
        """The rows that can be computed, in row order; the others are marked in ``rows``."""
        works: list[Work] = []
        seen: set[bytes] = set()
        start = 0
        for index, row in enumerate(frame.rows):
            stop = start + len(row.token_ids)
            if row.status is RowStatus.OK:
                try:
                    session = self._session_for(frame.kind, row, seen)
                    works.append(Work(index, row, start, stop, session, judging=session.pending))
                except RowFault as fault:
                    rows[index] = self._failed(row, fault)
            start = stop
        return works

    def _session_for(self, kind: FrameKind, row: StepRow, seen: set[bytes]) -> Session:
        if row.request in seen:
            raise RowFault(RowStatus.INVALID, "a request has two rows in one step")
        seen.add(row.request)
        if not row.token_ids or (kind is FrameKind.DECODE and len(row.token_ids) != 1):
            raise RowFault(RowStatus.INVALID, f"{kind.name.lower()} of {row.token_count} tokens")
        if not 0 <= min(row.token_ids) <= max(row.token_ids) < self.model.vocab_size:
            raise RowFault(RowStatus.INVALID, f"token id not in 0…{self.model.vocab_size - 1}")
        return self._held.admit(kind, row)

    def _received(self, frame: StepFrame, works: Sequence[Work]) -> Tensor | None:
        """The received activation. Faults of its shape or contents are the sender's."""
        if self.model.is_first:
            return None
        tensor = frame.tensor
        expected = (frame.token_count, self.model.hidden_size)
        if tensor is None or tensor.shape != expected or tensor.dtype is not self._dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype.name} {tensor.shape}"
            detail = f"activation should be {self._dtype.name} {expected}, is {found}"
            for work in works:
                work.fault, work.fault_stage = RowFault(RowStatus.INVALID, detail), frame.hop_from
            return None
        check_marked(tensor, works, frame.hop_from)
        return tensor

    def _check_sizes(self, works: Sequence[Work], kind: FrameKind) -> None:
        if works:
            self._sizes.check(works, kind)

    def _settled(self, frame: StepFrame, work: Work) -> StepRow:
        """The row as it leaves: marked and answered, its tokens counted; or failed, its cache put
        back."""
        session = work.session
        try:
            if work.fault is not None:
                raise work.fault
            session.consume(work.row.token_ids)
            crc = crc32c(work.payload) if work.payload else 0
            mark = StageMark(session.length, session.digest, crc)
            if self.model.is_last:
                row = answer(frame, work, mark, source=self.name, now_unix_ns=self._clock_ns())
            else:
                row = _marked(work.row, mark)
            if row.boundaries:
                row = replace(row, digests=(*row.digests, *self._digests(work)))
        except RowFault as fault:
            if frame.kind is not FrameKind.PROBE and work.touched:
                self._held.put_back(work.row, work.session, fault)
            if fault.status is RowStatus.NON_FINITE and came_so(frame.tensor, work):
                work.fault_stage = frame.hop_from
            work.fault = fault
            return self._failed(work.row, fault, work.fault_stage)
        self.stage_counters["tokens_computed"] += len(work.row.token_ids)
        return row

    def _digests(self, work: Work) -> list[BoundaryDigest]:
        """What the row wants to know of activations inside or at the end of this span."""
        row, span = work.row, self.model.span
        found: list[BoundaryDigest] = []
        for layer, array in (work.taps or {}).items():
            if array is not None:
                found += digests.digests(array, layer, row.first_position)
        if not self.model.is_last and span.last in row.boundaries:
            tensor = Tensor(self._dtype, (row.token_count, self.model.hidden_size), work.payload)
            found += digests.of_payload(tensor, span.last, row.first_position)
        return found

    def _packed(self, frame: StepFrame, works: Sequence[Work]) -> Tensor | None:
        """All rows' lines in row order, zeros for failed rows; None from the last stage."""
        if self.model.is_last or frame.token_count == 0:
            return None
        good = {work.index: work.payload for work in works if work.fault is None}
        if len(good) == len(frame.rows) == 1:
            payload = good[0]
        else:
            blank = bytes(self.model.hidden_size * self._dtype.itemsize)
            payload = b"".join(
                good[index] if index in good else blank * row.token_count
                for index, row in enumerate(frame.rows)
            )
        return Tensor(self._dtype, (frame.token_count, self.model.hidden_size), payload)


def _marked(row: StepRow, mark: StageMark) -> StepRow:
    return replace(row, marks=(*row.marks, mark))
