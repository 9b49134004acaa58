from stagemesh.v1 import token_pb2 as _token_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_F32: _ClassVar[DType]
    DTYPE_F16: _ClassVar[DType]
    DTYPE_BF16: _ClassVar[DType]
    DTYPE_I32: _ClassVar[DType]
    DTYPE_U32: _ClassVar[DType]
    DTYPE_I64: _ClassVar[DType]
    DTYPE_U8: _ClassVar[DType]
    DTYPE_I8: _ClassVar[DType]
    DTYPE_I16: _ClassVar[DType]
    DTYPE_U16: _ClassVar[DType]

class FrameKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_KIND_UNSPECIFIED: _ClassVar[FrameKind]
    FRAME_KIND_PREFILL: _ClassVar[FrameKind]
    FRAME_KIND_DECODE: _ClassVar[FrameKind]
    FRAME_KIND_REWIND: _ClassVar[FrameKind]
    FRAME_KIND_SCORE: _ClassVar[FrameKind]
    FRAME_KIND_CLOSE: _ClassVar[FrameKind]
    FRAME_KIND_PROBE: _ClassVar[FrameKind]

class RowStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_STATUS_UNSPECIFIED: _ClassVar[RowStatus]
    ROW_STATUS_POSITION_MISMATCH: _ClassVar[RowStatus]
    ROW_STATUS_CACHE_LOST: _ClassVar[RowStatus]
    ROW_STATUS_CACHE_EXHAUSTED: _ClassVar[RowStatus]
    ROW_STATUS_NON_FINITE: _ClassVar[RowStatus]
    ROW_STATUS_COMPUTE_FAILED: _ClassVar[RowStatus]
    ROW_STATUS_OUT_OF_ENVELOPE: _ClassVar[RowStatus]
    ROW_STATUS_INVALID: _ClassVar[RowStatus]
    ROW_STATUS_CORRUPTED: _ClassVar[RowStatus]
DTYPE_UNSPECIFIED: DType
DTYPE_F32: DType
DTYPE_F16: DType
DTYPE_BF16: DType
DTYPE_I32: DType
DTYPE_U32: DType
DTYPE_I64: DType
DTYPE_U8: DType
DTYPE_I8: DType
DTYPE_I16: DType
DTYPE_U16: DType
FRAME_KIND_UNSPECIFIED: FrameKind
FRAME_KIND_PREFILL: FrameKind
FRAME_KIND_DECODE: FrameKind
FRAME_KIND_REWIND: FrameKind
FRAME_KIND_SCORE: FrameKind
FRAME_KIND_CLOSE: FrameKind
FRAME_KIND_PROBE: FrameKind
ROW_STATUS_UNSPECIFIED: RowStatus
ROW_STATUS_POSITION_MISMATCH: RowStatus
ROW_STATUS_CACHE_LOST: RowStatus
ROW_STATUS_CACHE_EXHAUSTED: RowStatus
ROW_STATUS_NON_FINITE: RowStatus
ROW_STATUS_COMPUTE_FAILED: RowStatus
ROW_STATUS_OUT_OF_ENVELOPE: RowStatus
ROW_STATUS_INVALID: RowStatus
ROW_STATUS_CORRUPTED: RowStatus

class SamplingSpec(_message.Message):
    __slots__ = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty", "repetition_context", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    repetition_penalty: float
    repetition_context: int
    frequency_penalty: float
    presence_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    seed: int
    logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., top_k: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., repetition_context: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., seed: _Optional[int] = ..., logprobs: _Optional[int] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token_id", "bias")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    bias: float
    def __init__(self, token_id: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class RowOpening(_message.Message):
    __slots__ = ("sampling", "prompt_length", "chain", "reserve_tokens")
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sampling: SamplingSpec
    prompt_length: int
    chain: bytes
    reserve_tokens: int
    def __init__(self, sampling: _Optional[_Union[SamplingSpec, _Mapping]] = ..., prompt_length: _Optional[int] = ..., chain: _Optional[bytes] = ..., reserve_tokens: _Optional[int] = ...) -> None: ...

class BoundaryDigest(_message.Message):
    __slots__ = ("layer", "position", "crc32c", "rms", "projection")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    RMS_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    layer: int
    position: int
    crc32c: int
    rms: float
    projection: float
    def __init__(self, layer: _Optional[int] = ..., position: _Optional[int] = ..., crc32c: _Optional[int] = ..., rms: _Optional[float] = ..., projection: _Optional[float] = ...) -> None: ...

class StepRow(_message.Message):
    __slots__ = ("request", "first_position", "token_ids", "samples", "opening", "status", "fault_stage_plus_one", "fault_detail", "marks", "token", "scores", "traceparent", "boundaries", "digests")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    FIRST_POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OPENING_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FAULT_STAGE_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    FAULT_DETAIL_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    BOUNDARIES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    first_position: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    samples: bool
    opening: RowOpening
    status: RowStatus
    fault_stage_plus_one: int
    fault_detail: str
    marks: _containers.RepeatedCompositeFieldContainer[_token_pb2.StageMark]
    token: _token_pb2.TokenChunk
    scores: _containers.RepeatedCompositeFieldContainer[_token_pb2.Score]
    traceparent: str
    boundaries: _containers.RepeatedScalarFieldContainer[int]
    digests: _containers.RepeatedCompositeFieldContainer[BoundaryDigest]
    def __init__(self, request: _Optional[bytes] = ..., first_position: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., samples: _Optional[bool] = ..., opening: _Optional[_Union[RowOpening, _Mapping]] = ..., status: _Optional[_Union[RowStatus, str]] = ..., fault_stage_plus_one: _Optional[int] = ..., fault_detail: _Optional[str] = ..., marks: _Optional[_Iterable[_Union[_token_pb2.StageMark, _Mapping]]] = ..., token: _Optional[_Union[_token_pb2.TokenChunk, _Mapping]] = ..., scores: _Optional[_Iterable[_Union[_token_pb2.Score, _Mapping]]] = ..., traceparent: _Optional[str] = ..., boundaries: _Optional[_Iterable[int]] = ..., digests: _Optional[_Iterable[_Union[BoundaryDigest, _Mapping]]] = ...) -> None: ...

class StepFrame(_message.Message):
    __slots__ = ("version", "kind", "fingerprint", "epoch", "step", "hop_from_plus_one", "hop_to_plus_one", "rows", "dtype", "shape", "payload_length", "payload_crc32c", "header_crc32c", "payload", "part_count", "traceparent", "tracestate")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HOP_FROM_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    HOP_TO_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_LENGTH_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC32C_FIELD_NUMBER: _ClassVar[int]
    HEADER_CRC32C_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    version: int
    kind: FrameKind
    fingerprint: bytes
    epoch: int
    step: int
    hop_from_plus_one: int
    hop_to_plus_one: int
    rows: _containers.RepeatedCompositeFieldContainer[StepRow]
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    payload_length: int
    payload_crc32c: int
    header_crc32c: int
    payload: bytes
    part_count: int
    traceparent: str
    tracestate: str
    def __init__(self, version: _Optional[int] = ..., kind: _Optional[_Union[FrameKind, str]] = ..., fingerprint: _Optional[bytes] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., hop_from_plus_one: _Optional[int] = ..., hop_to_plus_one: _Optional[int] = ..., rows: _Optional[_Iterable[_Union[StepRow, _Mapping]]] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., payload_length: _Optional[int] = ..., payload_crc32c: _Optional[int] = ..., header_crc32c: _Optional[int] = ..., payload: _Optional[bytes] = ..., part_count: _Optional[int] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class FramePart(_message.Message):
    __slots__ = ("epoch", "step", "index", "offset", "data", "data_crc32c")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    DATA_CRC32C_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    index: int
    offset: int
    data: bytes
    data_crc32c: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., index: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., data_crc32c: _Optional[int] = ...) -> None: ...
