"""The last stage's answers: a row's logits become a token chunk, or scores.

Called when the row's tokens have been consumed by its session, so that ``session.length`` is the
position being decided and ``session.tokens`` everything before it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from stage_worker import sampling
from stage_worker.row_forward import Work
from stage_worker.sampling import Draw
from stage_worker.sessions import RowFault
from stage_worker.tensors import Floats
from stagemesh.frame import FrameKind, RowStatus, Score, StepFrame, StepRow
from stagemesh.token import StageMark, TokenChunk


def answer(
    frame: StepFrame, work: Work, mark: StageMark, *, source: str, now_unix_ns: int
) -> StepRow:
    """The row with this stage's ``mark``, and its token or its scores where its kind has any.

    Raises RowFault: NON_FINITE logits, or INVALID for a sample ahead of the prefill's end.
    """
    row = work.row
    marks = (*row.marks, mark)
    if frame.kind is FrameKind.SCORE:
        # Scored tokens stand behind what the opening's chain covers: a later draw goes on from
        # here.
        work.session.chain_before(row.first_position)
        return replace(row, marks=marks, scores=_scores(work))
    if frame.kind is FrameKind.PREFILL:
        work.session.pending = None if work.logits is None else work.logits[-1]
        if not row.samples:
            return replace(row, marks=marks)
    drawn = work.draw or _drawn(frame.kind, work)
    if not drawn.finite:
        raise RowFault(RowStatus.NON_FINITE, "logits hold NaN or infinity")
    token = _chunk(frame, work, marks, drawn, source, now_unix_ns)
    return replace(row, marks=marks, token=token)


def _drawn(kind: FrameKind, work: Work) -> Draw:
    if work.logits is None:
        raise RowFault(RowStatus.COMPUTE_FAILED, "no logits to draw from")
    session, opening = work.session, work.session.opening
    if work.is_plain:
        return sampling.greedy(work.logits[-1:])[0]
    spec = opening.sampling
    if kind is FrameKind.PROBE:
        spec = replace(spec, temperature=0.0)
    return sampling.draw(
        work.logits[-1], spec, session.length, session.tokens, opening.prompt_length
    )


def _chunk(
    frame: StepFrame,
    work: Work,
    marks: tuple[StageMark, ...],
    drawn: Draw,
    source: str,
    now_unix_ns: int,
) -> TokenChunk:
    position = work.row.end_position
    return TokenChunk(
        request=work.row.request,
        position=position,
        token_id=drawn.token_id,
        epoch=frame.epoch,
        step=frame.step,
        logprob=drawn.logprob,
        margin=drawn.margin,
        sampled_at_unix_ns=now_unix_ns,
        source=source,
        chain=work.session.chain_behind(position, drawn.token_id),
        marks=marks,
        alternatives=drawn.alternatives,
    ).sealed()


def _scores(work: Work) -> tuple[Score, ...]:
    """Judge each token by the logits behind its predecessor; keep the last logits for the next
    row."""
    row, logits = work.row, work.logits
    if logits is None or logits.shape[0] != row.token_count:
        raise RowFault(RowStatus.COMPUTE_FAILED, "no logits to score with")
    scores: list[Score] = []
    for index, token_id in enumerate(row.token_ids):
        before = logits[index - 1] if index else work.judging
        if before is not None:
            scores.append(_score(work, before, row.first_position + index, token_id))
    if not math.isfinite(float(logits[-1].max())):
        raise RowFault(RowStatus.NON_FINITE, "logits hold NaN or infinity")
    work.session.pending = logits[-1].copy()
    return tuple(scores)


def _score(work: Work, logits: Floats, position: int, token_id: int) -> Score:
    opening = work.session.opening
    history = work.session.tokens[:position] if sampling.adjusts(opening.sampling) else ()
    verdict = sampling.judge(
        logits, opening.sampling, position, history, opening.prompt_length, token_id
    )
    if verdict is None:
        raise RowFault(RowStatus.NON_FINITE, f"logits before position {position} are not finite")
    return Score(position, token_id, verdict.reference_token_id, verdict.gap, verdict.margin)
