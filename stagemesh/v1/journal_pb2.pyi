from stagemesh.v1 import frame_pb2 as _frame_pb2
from stagemesh.v1 import generation_service_pb2 as _generation_service_pb2
from stagemesh.v1 import token_pb2 as _token_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalRecord(_message.Message):
    __slots__ = ("request", "tokens", "verified", "correction", "end", "resumed", "recovery")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    CORRECTION_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    request: JournalRequest
    tokens: JournalTokens
    verified: JournalVerified
    correction: JournalCorrection
    end: JournalEnd
    resumed: JournalResumed
    recovery: JournalRecovery
    def __init__(self, request: _Optional[_Union[JournalRequest, _Mapping]] = ..., tokens: _Optional[_Union[JournalTokens, _Mapping]] = ..., verified: _Optional[_Union[JournalVerified, _Mapping]] = ..., correction: _Optional[_Union[JournalCorrection, _Mapping]] = ..., end: _Optional[_Union[JournalEnd, _Mapping]] = ..., resumed: _Optional[_Union[JournalResumed, _Mapping]] = ..., recovery: _Optional[_Union[JournalRecovery, _Mapping]] = ...) -> None: ...

class JournalRequest(_message.Message):
    __slots__ = ("request", "prompt", "sampling", "max_tokens", "stop_token_ids", "deadline_unix_ns", "verification", "deliver_verified", "traceparent", "edge")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    VERIFICATION_FIELD_NUMBER: _ClassVar[int]
    DELIVER_VERIFIED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    prompt: _containers.RepeatedScalarFieldContainer[int]
    sampling: _frame_pb2.SamplingSpec
    max_tokens: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    deadline_unix_ns: int
    verification: int
    deliver_verified: bool
    traceparent: str
    edge: JournalEdge
    def __init__(self, request: _Optional[bytes] = ..., prompt: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_frame_pb2.SamplingSpec, _Mapping]] = ..., max_tokens: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., deadline_unix_ns: _Optional[int] = ..., verification: _Optional[int] = ..., deliver_verified: _Optional[bool] = ..., traceparent: _Optional[str] = ..., edge: _Optional[_Union[JournalEdge, _Mapping]] = ...) -> None: ...

class JournalEdge(_message.Message):
    __slots__ = ("stop", "parameters", "detach", "created_at_unix_ns", "tokenize_s", "trace_id")
    STOP_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DETACH_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZE_S_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    stop: _containers.RepeatedScalarFieldContainer[str]
    parameters: bytes
    detach: bool
    created_at_unix_ns: int
    tokenize_s: float
    trace_id: str
    def __init__(self, stop: _Optional[_Iterable[str]] = ..., parameters: _Optional[bytes] = ..., detach: _Optional[bool] = ..., created_at_unix_ns: _Optional[int] = ..., tokenize_s: _Optional[float] = ..., trace_id: _Optional[str] = ...) -> None: ...

class JournalTokens(_message.Message):
    __slots__ = ("first_index", "tokens", "verified_through", "accepted_at_unix_ns", "fingerprint")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_AT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_token_pb2.TokenChunk]
    verified_through: int
    accepted_at_unix_ns: int
    fingerprint: str
    def __init__(self, first_index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_token_pb2.TokenChunk, _Mapping]]] = ..., verified_through: _Optional[int] = ..., accepted_at_unix_ns: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class JournalVerified(_message.Message):
    __slots__ = ("verified_through",)
    VERIFIED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    verified_through: int
    def __init__(self, verified_through: _Optional[int] = ...) -> None: ...

class JournalCorrection(_message.Message):
    __slots__ = ("from_index", "reason")
    FROM_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    from_index: int
    reason: str
    def __init__(self, from_index: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class JournalRecovery(_message.Message):
    __slots__ = ("recovery",)
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    recovery: _generation_service_pb2.Recovery
    def __init__(self, recovery: _Optional[_Union[_generation_service_pb2.Recovery, _Mapping]] = ...) -> None: ...

class JournalEnd(_message.Message):
    __slots__ = ("finish",)
    FINISH_FIELD_NUMBER: _ClassVar[int]
    finish: _generation_service_pb2.Finish
    def __init__(self, finish: _Optional[_Union[_generation_service_pb2.Finish, _Mapping]] = ...) -> None: ...

class JournalResumed(_message.Message):
    __slots__ = ("after", "deadline_unix_ns")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    after: str
    deadline_unix_ns: int
    def __init__(self, after: _Optional[str] = ..., deadline_unix_ns: _Optional[int] = ...) -> None: ...
