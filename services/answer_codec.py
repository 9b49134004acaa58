"""Answers as protobuf messages."""

from __future__ import annotations

from collections.abc import Sequence

from coordinator.instructions import RecoveryRecord, RequestSummary
from services.answer import End, Piece
from services.codec import token_to_pb
from services.rpc_errors import from_proto, to_proto
from stagemesh.token import TokenChunk, ValidationStatus
from stagemesh.topology import WorkerName
from stagemesh.v1 import generation_service_pb2 as pb
from stagemesh.v1 import token_pb2

FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "error": pb.FINISH_REASON_ERROR,
}
"""The words the project uses, and the wire's constants for them."""


def recovery_to_proto(record: RecoveryRecord) -> pb.Recovery:
    """One recovery; ``seconds`` stays 0 while no token has followed it."""
    return pb.Recovery(
        cause=record.cause,
        action=record.action,
        worker=record.worker,
        from_route=record.from_route,
        to_route=record.to_route,
        epoch=record.epoch,
        kept=record.kept,
        replayed=record.replayed,
        seconds=record.seconds or 0.0,
    )


def finish_to_proto(end: End, *, tokenize_s: float = 0.0) -> pb.Finish:
    """How an answer ended, with an error's status if it failed."""
    summary = end.summary
    after_first_s = summary.total_s - summary.time_to_first_token_s
    decoded = summary.completion_tokens - summary.tokens_before - 1
    rate = decoded / after_first_s if decoded > 0 and after_first_s > 0 else 0.0
    finish = pb.Finish(
        reason=FINISH_REASONS[end.reason],
        prompt_tokens=summary.prompt_tokens,
        completion_tokens=summary.completion_tokens,
        matched_stop=summary.matched_stop,
        route=summary.route,
        recoveries=[recovery_to_proto(record) for record in summary.recoveries],
        timings=pb.Timings(
            queue_s=summary.queue_s,
            tokenize_s=tokenize_s,
            time_to_first_token_s=summary.time_to_first_token_s,
            total_s=summary.total_s,
            tokens_per_second=rate,
        ),
        chain=summary.chain,
        checks=summary.checks,
    )
    if end.error is not None:
        finish.error.CopyFrom(to_proto(end.error))
    return finish


def recovery_from_proto(message: pb.Recovery) -> RecoveryRecord:
    """The opposite of ``recovery_to_proto``."""
    return RecoveryRecord(
        cause=message.cause,
        action=message.action,
        worker=message.worker,
        from_route=tuple(WorkerName(name) for name in message.from_route),
        to_route=tuple(WorkerName(name) for name in message.to_route),
        epoch=message.epoch,
        kept=message.kept,
        replayed=message.replayed,
        seconds=message.seconds or None,
    )


def end_from_proto(finish: pb.Finish) -> End:
    """The opposite of ``finish_to_proto``, for an end that was kept."""
    reasons = {number: word for word, number in FINISH_REASONS.items()}
    timings = finish.timings
    after_first_s = timings.total_s - timings.time_to_first_token_s
    decoded = round(timings.tokens_per_second * after_first_s)
    summary = RequestSummary(
        prompt_tokens=finish.prompt_tokens,
        completion_tokens=finish.completion_tokens,
        route=tuple(WorkerName(name) for name in finish.route),
        recoveries=tuple(recovery_from_proto(one) for one in finish.recoveries),
        queue_s=finish.timings.queue_s,
        time_to_first_token_s=finish.timings.time_to_first_token_s,
        total_s=finish.timings.total_s,
        chain=finish.chain,
        matched_stop=finish.matched_stop,
        checks=dict(finish.checks),
        tokens_before=max(0, finish.completion_tokens - decoded - 1),
    )
    error = from_proto(finish.error) if finish.HasField("error") else None
    return End(reasons.get(finish.reason, "error"), summary, error)


def piece_to_proto(
    request_id: str, piece: Piece, *, tokenize_s: float = 0.0
) -> pb.GenerateResponse:
    """One response of a stream."""
    response = pb.GenerateResponse(
        request_id=request_id,
        position=piece.position,
        tokens=[token_to_pb(chunk) for chunk in piece.chunks],
        text=piece.text,
        epoch=piece.epoch,
        verified_through=piece.verified_through,
        accepted_at_unix_ns=piece.accepted_at_unix_ns,
        status=_STATUS_NAMES[_lowest(piece.chunks)],
        character=piece.character,
    )
    if piece.withdrawal is not None:
        response.correction.from_position = piece.withdrawal.from_index
        response.correction.from_character = piece.withdrawal.from_character
        response.correction.reason = piece.withdrawal.reason
    if piece.end is not None:
        response.finish.CopyFrom(finish_to_proto(piece.end, tokenize_s=tokenize_s))
    return response


_TRUST = (
    ValidationStatus.REJECTED,
    ValidationStatus.UNSPECIFIED,
    ValidationStatus.SUSPECT,
    ValidationStatus.UNVERIFIED,
    ValidationStatus.CORRECTED,
    ValidationStatus.VALID,
)
"""From the least to the most trusted."""
_STATUS_NAMES = {number: name for name, number in token_pb2.ValidationStatus.items()}


def _lowest(chunks: Sequence[TokenChunk]) -> int:
    if len(chunks) == 1:  # what nearly every response carries
        return int(chunks[0].status)
    lowest = min((chunk.status for chunk in chunks), key=_TRUST.index, default=None)
    return 0 if lowest is None else int(lowest)
