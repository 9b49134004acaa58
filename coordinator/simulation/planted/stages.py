"""Bugs of a stage: caches that are not what was asked for, draws that depend on history, fences
that nobody heeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coordinator import echo
from coordinator.echo import EchoCache, EchoStage
from coordinator.simulation.planted.bug import Bug
from coordinator.simulation.runner import SimRunner
from coordinator.simulation.worker import SimWorker
from stagemesh.checksum import chain_next
from stagemesh.frame import FrameKind, RowStatus, StepFrame, StepRow

_echo_row = EchoStage._row


def _any_position(self: EchoStage, frame: StepFrame, row: StepRow, hidden: list[int] | None) -> Any:
    cache = self.caches.get(row.request)
    if cache is not None and row.status is RowStatus.OK and frame.kind in _CONSUMING:
        while cache.length > row.first_position:
            cache.trim(cache.length - 1)
        cache.token_ids += [0] * (row.first_position - cache.length)
    return _echo_row(self, frame, row, hidden)


_CONSUMING = frozenset({FrameKind.PREFILL, FrameKind.DECODE})


def _no_trim(self: EchoCache, length: int) -> None:
    """The cache stays as it is."""


_echo_sample = EchoStage._sample


def _draws_counted(
    self: EchoStage, frame: StepFrame, row: StepRow, cache: EchoCache, hidden: int
) -> StepRow:
    """The generator is advanced per draw since the request was opened here, as a library's would
    be."""
    cache.reserved = (cache.reserved or cache.prompt_length) + 1
    token_id, margin = echo.draw(hidden, cache.sampling, cache.reserved - 1)
    done = _echo_sample(self, frame, row, cache, hidden)
    chain = chain_next(cache.chain_before, row.end_position, token_id)
    cache.chain = chain
    if done.token is None:
        return done
    token = replace(done.token, token_id=token_id, margin=margin, chain=chain).sealed()
    return replace(done, token=token)


def _no_worker_fence(self: SimWorker, epoch: int) -> None:
    """The order to fence is not heeded."""


def _any_step(self: SimRunner, stage: EchoStage, frame: StepFrame) -> bool:
    return True


STAGES = (
    Bug("no position check", ((EchoStage, "_row", _any_position),)),
    Bug("generator not keyed by position", ((EchoStage, "_sample", _draws_counted),)),
    Bug(
        "rewind does not trim, position not checked",
        ((EchoCache, "trim", _no_trim), (EchoStage, "_row", _any_position)),
        pair=True,
    ),
    Bug(
        "a worker does not heed fences, nor looks at the epoch",
        ((SimWorker, "fence", _no_worker_fence), (SimRunner, "may_compute", _any_step)),
        pair=True,
    ),
)
