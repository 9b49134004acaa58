"""Does a returned frame carry the rows of the step it answers; and if not, where were they changed?

Every checksum of such a frame holds, so it was changed where none is: in a process, before it was
sealed. Rows travel on from stage to stage as they arrived, so the last stage, who brings them, need
not be the one who changed them. A stage that had no use for what it got said so in the row
(``fault_stage``). One that consumed other tokens than were sent has another history digest in its
mark, and so has each behind it. So the first stage of either kind received rows that were changed
already, and the hop it received them on is where it happened: its sender is to blame, if that was a
stage. If all were content, it happened behind the last one's forward.

Pure.
"""

from __future__ import annotations

from coordinator.step_book import SentRow, SentStep
from stagemesh.frame import RowStatus, StepFrame, StepRow
from stagemesh.topology import COORDINATOR_HOP


def answers(frame: StepFrame, sent: SentStep) -> bool:
    """Whether a frame has the rows of the step it claims to answer."""
    if frame.kind is not sent.kind or len(frame.rows) != len(sent.rows):
        return False
    return all(
        row.request == asked.row.request and row.token_ids == asked.row.token_ids
        for row, asked in zip(frame.rows, sent.rows, strict=True)
    )


def changed_ahead_of(frame: StepFrame, sent: SentStep, stage_count: int) -> int:
    """Index of the first stage that received other rows than were sent; ``stage_count`` if all
    received the right ones."""
    pairs = zip(frame.rows, sent.rows, strict=False)
    reached = [_reached(row, asked, frame.step, stage_count) for row, asked in pairs]
    return min(reached, default=stage_count)


def hop_behind(stage: int, stage_count: int) -> str:
    """The hop on which ``stage`` (-1: the coordinator) sends on, as events name it."""
    return f"{stage}→{stage + 1 if stage + 1 < stage_count else COORDINATOR_HOP}"


def _reached(row: StepRow, asked: SentRow, step: int, stage_count: int) -> int:
    if (row.request, row.token_ids) == (asked.row.request, asked.row.token_ids):
        return stage_count
    if row.status is not RowStatus.OK and 0 <= row.fault_stage < stage_count:
        return row.fault_stage
    digest = asked.digest if asked.session is None else asked.session.stream.expected_digest(step)
    marks = row.marks[:stage_count]
    other = (stage for stage, mark in enumerate(marks) if mark.history_digest != digest)
    return next(other, stage_count)
