"""Values that rows, reports and client streams carry: protobuf ↔ the mesh's own types, field by
field.

Nothing that came from outside is trusted: what has no counterpart raises FrameMalformed, and
nothing else is raised. Indices that may be -1 travel as index + 1, since 0 is protobuf's "unset".
"""

from __future__ import annotations

from typing import TypeVar

from stagemesh.errors import FrameMalformed, InvalidConfiguration
from stagemesh.frame import BoundaryDigest, Score
from stagemesh.sampling import RowOpening, SamplingSpec
from stagemesh.token import StageMark, TokenChunk, ValidationStatus
from stagemesh.topology import Span, WorkerInfo, WorkerName
from stagemesh.transport import HopFault
from stagemesh.v1 import frame_pb2, token_pb2, topology_pb2, worker_service_pb2

_Member = TypeVar("_Member")

_VALIDATIONS = {int(status): status for status in ValidationStatus}


def member(members: dict[int, _Member], value: int, field: str) -> _Member:
    """The enum member on the wire; proto3 lets any number through."""
    member = members.get(value)
    if member is None:
        raise FrameMalformed(f"unknown {field}", value=value)
    return member


def mark_to_pb(mark: StageMark) -> token_pb2.StageMark:
    return token_pb2.StageMark(
        cache_length=mark.cache_length,
        history_digest=mark.history_digest,
        output_crc32c=mark.output_crc32c,
    )


def mark_from_pb(message: token_pb2.StageMark) -> StageMark:
    return StageMark(message.cache_length, message.history_digest, message.output_crc32c)


def score_to_pb(score: Score) -> token_pb2.Score:
    return token_pb2.Score(
        position=score.position,
        token_id=score.token_id,
        reference_token_id=score.reference_token_id,
        gap=score.gap,
        margin=score.margin,
    )


def score_from_pb(message: token_pb2.Score) -> Score:
    return Score(
        message.position,
        message.token_id,
        message.reference_token_id,
        message.gap,
        message.margin,
    )


def digest_to_pb(digest: BoundaryDigest) -> frame_pb2.BoundaryDigest:
    return frame_pb2.BoundaryDigest(
        layer=digest.layer,
        position=digest.position,
        crc32c=digest.crc32c,
        rms=digest.rms,
        projection=digest.projection,
    )


def digest_from_pb(message: frame_pb2.BoundaryDigest) -> BoundaryDigest:
    return BoundaryDigest(
        message.layer, message.position, message.crc32c, message.rms, message.projection
    )


def token_to_pb(token: TokenChunk) -> token_pb2.TokenChunk:
    """A chunk for a frame, for the client's stream, or for the journal."""
    return token_pb2.TokenChunk(
        request=token.request,
        position=token.position,
        token_id=token.token_id,
        epoch=token.epoch,
        step=token.step,
        logprob=token.logprob,
        margin=token.margin,
        sampled_at_unix_ns=token.sampled_at_unix_ns,
        source=token.source,
        chain=token.chain,
        marks=[mark_to_pb(mark) for mark in token.marks],
        alternatives=[
            token_pb2.Alternative(token_id=token_id, logprob=logprob)
            for token_id, logprob in token.alternatives
        ],
        status=int(token.status),  # type: ignore[arg-type]
        checksum=token.checksum,
    )


def token_from_pb(message: token_pb2.TokenChunk) -> TokenChunk:
    """Raises FrameMalformed for a status that does not exist; checksums are for ``verify``."""
    return TokenChunk(
        message.request,
        message.position,
        message.token_id,
        message.epoch,
        message.step,
        message.logprob,
        message.margin,
        message.sampled_at_unix_ns,
        message.source,
        message.chain,
        tuple([mark_from_pb(mark) for mark in message.marks]),
        tuple([(item.token_id, item.logprob) for item in message.alternatives]),
        member(_VALIDATIONS, message.status, "validation status"),
        message.checksum,
    )


def sampling_to_pb(spec: SamplingSpec) -> frame_pb2.SamplingSpec:
    return frame_pb2.SamplingSpec(
        temperature=spec.temperature,
        top_p=spec.top_p,
        min_p=spec.min_p,
        top_k=spec.top_k,
        repetition_penalty=spec.repetition_penalty,
        repetition_context=spec.repetition_context,
        frequency_penalty=spec.frequency_penalty,
        presence_penalty=spec.presence_penalty,
        logit_bias=[
            frame_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in spec.logit_bias
        ],
        seed=spec.seed,
        logprobs=spec.logprobs,
    )


def sampling_from_pb(message: frame_pb2.SamplingSpec) -> SamplingSpec:
    return SamplingSpec(
        temperature=message.temperature,
        top_p=message.top_p,
        min_p=message.min_p,
        top_k=message.top_k,
        repetition_penalty=message.repetition_penalty,
        repetition_context=message.repetition_context,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        seed=message.seed,
        logprobs=message.logprobs,
    )


def opening_to_pb(opening: RowOpening) -> frame_pb2.RowOpening:
    return frame_pb2.RowOpening(
        sampling=sampling_to_pb(opening.sampling),
        prompt_length=opening.prompt_length,
        chain=opening.chain,
        reserve_tokens=opening.reserve_tokens,
    )


def opening_from_pb(message: frame_pb2.RowOpening) -> RowOpening:
    return RowOpening(
        sampling=sampling_from_pb(message.sampling),
        prompt_length=message.prompt_length,
        chain=message.chain,
        reserve_tokens=message.reserve_tokens,
    )


# ---------------------------------------------------------------- workers and faults


def worker_to_pb(worker: WorkerInfo, *, protocol_version: int = 0) -> topology_pb2.Worker:
    """What a worker says of itself; ``environment`` is the caller's to fill."""
    return topology_pb2.Worker(
        name=worker.name,
        address=worker.address,
        span_first=worker.span.first,
        span_last=worker.span.last,
        layer_count=worker.layer_count,
        fingerprint=worker.fingerprint,
        span_fingerprint=worker.span_fingerprint,
        dtype=worker.dtype,
        pid=worker.pid,
        instance=worker.instance,
        kv_budget_tokens=worker.kv_budget_tokens,
        memory_bytes=worker.memory_bytes,
        capabilities=sorted(worker.capabilities),
        protocol_version=protocol_version,
    )


def worker_from_pb(message: topology_pb2.Worker) -> WorkerInfo:
    """Raises FrameMalformed for an impossible span."""
    try:
        span = Span(message.span_first, message.span_last)
    except InvalidConfiguration as error:
        raise FrameMalformed("worker with an impossible span", worker=message.name) from error
    return WorkerInfo(
        name=WorkerName(message.name),
        address=message.address,
        span=span,
        layer_count=message.layer_count,
        fingerprint=message.fingerprint,
        span_fingerprint=message.span_fingerprint,
        dtype=message.dtype,
        pid=message.pid,
        instance=message.instance,
        kv_budget_tokens=message.kv_budget_tokens,
        memory_bytes=message.memory_bytes,
        capabilities=frozenset(message.capabilities),
    )


def fault_to_pb(fault: HopFault) -> worker_service_pb2.HopFault:
    return worker_service_pb2.HopFault(
        epoch=fault.epoch,
        step=fault.step,
        hop_from_plus_one=fault.hop_from + 1,
        hop_to_plus_one=fault.hop_to + 1,
        reason=fault.reason,
        detail=fault.detail,
        fatal=fault.fatal,
    )


def fault_from_pb(message: worker_service_pb2.HopFault, *, peer: str = "") -> HopFault:
    """``peer``: the worker that reported it is known from its stream, not from the message."""
    return HopFault(
        epoch=message.epoch,
        step=message.step,
        hop_from=message.hop_from_plus_one - 1,
        hop_to=message.hop_to_plus_one - 1,
        reason=message.reason,
        detail=message.detail,
        fatal=message.fatal,
        peer=peer,
    )
