"""What the journal says in records, and back: requests and instructions ↔ ``journal.proto``.

Times that the mesh counts on its own monotonic clock are kept as wall-clock times, because the
clock starts anew with the process.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.events import Delivery, GenerationRequested, Verification
from coordinator.instructions import (
    AcceptTokens,
    AdvanceVerified,
    CorrectTokens,
    FailRequest,
    FinishRequest,
    RecoveryEnded,
    RecoveryRecord,
)
from coordinator.ports import ClientInstruction
from services.answer import End
from services.answer_codec import (
    end_from_proto,
    finish_to_proto,
    recovery_from_proto,
    recovery_to_proto,
)
from services.codec_values import sampling_from_pb, sampling_to_pb, token_from_pb, token_to_pb
from services.journal_rows import StoredGeneration
from stagemesh.errors import FrameMalformed, JournalError
from stagemesh.v1 import journal_pb2 as pb


def request_record(request: GenerationRequested, *, now: float, wall_ns: int) -> pb.JournalRecord:
    """A request's first record. ``now`` and ``wall_ns`` are the same moment on both clocks."""
    record = pb.JournalRecord()
    opening = record.request
    opening.request = request.request
    opening.prompt.extend(request.prompt)
    opening.sampling.CopyFrom(sampling_to_pb(request.sampling))
    opening.max_tokens = request.max_tokens
    opening.stop_token_ids.extend(sorted(request.stop_token_ids))
    opening.deadline_unix_ns = _on_the_wall(request.deadline, now, wall_ns)
    opening.verification = int(request.verification)
    opening.deliver_verified = request.delivery is Delivery.VERIFIED
    opening.traceparent = request.traceparent
    opening.edge.MergeFromString(request.context)
    return record


def resumed_record(request: GenerationRequested, *, now: float, wall_ns: int) -> pb.JournalRecord:
    """The record of a request that had failed and is gone on with."""
    record = pb.JournalRecord()
    record.resumed.after = request.resumed_after
    record.resumed.deadline_unix_ns = _on_the_wall(request.deadline, now, wall_ns)
    return record


def _on_the_wall(deadline: float | None, now: float, wall_ns: int) -> int:
    return 0 if deadline is None else max(1, wall_ns + int((deadline - now) * 1e9))


def instruction_record(
    instruction: ClientInstruction, *, wall_ns: int, fingerprint: str = ""
) -> pb.JournalRecord:
    """An instruction's record. ``fingerprint`` goes with a generation's first tokens."""
    record = pb.JournalRecord()
    match instruction:
        case AcceptTokens():
            record.tokens.first_index = instruction.first_index
            record.tokens.tokens.extend(token_to_pb(chunk) for chunk in instruction.chunks)
            record.tokens.verified_through = instruction.verified_through
            record.tokens.accepted_at_unix_ns = wall_ns
            record.tokens.fingerprint = fingerprint
        case AdvanceVerified():
            record.verified.verified_through = instruction.verified_through
        case CorrectTokens():
            record.correction.from_index = instruction.from_index
            record.correction.reason = instruction.reason
        case RecoveryEnded():
            record.recovery.recovery.CopyFrom(recovery_to_proto(instruction.record))
        case FinishRequest():
            end = End(instruction.reason, instruction.summary)
            record.end.finish.CopyFrom(finish_to_proto(end))
        case FailRequest():
            end = End("error", instruction.summary, instruction.error)
            record.end.finish.CopyFrom(finish_to_proto(end))
    return record


def is_end(instruction: ClientInstruction) -> bool:
    """Whether nothing follows it."""
    return isinstance(instruction, FinishRequest | FailRequest)


def instructions_of(stored: StoredGeneration) -> Iterator[tuple[ClientInstruction, int]]:
    """Everything behind the first record that still counts, each with the wall clock at its
    acceptance (ns; 0 where none is kept). Raises JournalError."""
    request, known, last = stored.request, 0, stored.records[-1]
    for record in stored.records[1:]:
        kind = record.WhichOneof("record")
        if kind == "tokens":
            tokens = record.tokens
            if tokens.first_index != known:
                raise JournalError("the journal misses tokens", request_id=request.hex())
            known += len(tokens.tokens)
            yield _accepted(request, tokens), tokens.accepted_at_unix_ns
        elif kind == "verified":
            yield AdvanceVerified(request, record.verified.verified_through), 0
        elif kind == "correction":
            known = min(known, record.correction.from_index)
            yield CorrectTokens(request, known, record.correction.reason), 0
        elif kind == "end" and record is last:
            yield _ended(request, record.end), 0
        elif kind in ("end", "resumed", "recovery"):
            continue  # it had failed, and was gone on with; or it is told with the end
        else:
            raise JournalError("an unknown record in the journal", request_id=request.hex())


def _accepted(request: bytes, tokens: pb.JournalTokens) -> AcceptTokens:
    try:
        chunks = tuple(token_from_pb(token) for token in tokens.tokens)
    except FrameMalformed as error:
        raise JournalError(f"a token in the journal makes no sense: {error}") from error
    return AcceptTokens(request, tokens.first_index, chunks, tokens.verified_through)


def _ended(request: bytes, record: pb.JournalEnd) -> FinishRequest | FailRequest:
    end = end_from_proto(record.finish)
    if end.error is not None:
        return FailRequest(request, end.error, end.summary)
    return FinishRequest(request, end.reason, end.summary)


def accepted_tokens(stored: StoredGeneration) -> tuple[int, ...]:
    """Ids of the answer's tokens so far."""
    found: list[int] = []
    for instruction, _ in instructions_of(stored):
        if isinstance(instruction, AcceptTokens):
            found += [chunk.token_id for chunk in instruction.chunks]
        elif isinstance(instruction, CorrectTokens):
            del found[instruction.from_index :]
    return tuple(found)


def fingerprint_of(stored: StoredGeneration) -> str:
    """The weights that made its tokens; "" if it has none."""
    return next((one.tokens.fingerprint for one in stored.records if one.tokens.fingerprint), "")


def demand_of(stored: StoredGeneration, *, now: float, wall_ns: int) -> GenerationRequested:
    """What to ask of the mesh so that it goes on where the journal ends. Raises JournalError."""
    opening = stored.opening
    try:
        verification = Verification(opening.verification)
    except ValueError:
        raise JournalError("a request in the journal makes no sense") from None
    deadline, deadline_ns = None, opening.deadline_unix_ns
    recoveries: tuple[RecoveryRecord, ...] = ()
    for record in stored.records:
        if record.HasField("resumed"):
            deadline_ns = record.resumed.deadline_unix_ns
        elif record.HasField("recovery"):
            recoveries = (*recoveries, recovery_from_proto(record.recovery.recovery))
        elif record.HasField("end"):
            recoveries = end_from_proto(record.end.finish).summary.recoveries
    if deadline_ns:
        deadline = now + (deadline_ns - wall_ns) / 1e9
    return GenerationRequested(
        request=stored.request,
        prompt=tuple(opening.prompt),
        sampling=sampling_from_pb(opening.sampling),
        max_tokens=opening.max_tokens,
        stop_token_ids=frozenset(opening.stop_token_ids),
        deadline=deadline,
        verification=verification,
        delivery=Delivery.VERIFIED if opening.deliver_verified else Delivery.IMMEDIATE,
        traceparent=opening.traceparent,
        accepted=accepted_tokens(stored),
        recovered=True,
        fingerprint=fingerprint_of(stored),
        context=opening.edge.SerializeToString(),
        recoveries=recoveries,
    )
