from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ValidationStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VALIDATION_STATUS_UNSPECIFIED: _ClassVar[ValidationStatus]
    VALIDATION_STATUS_UNVERIFIED: _ClassVar[ValidationStatus]
    VALIDATION_STATUS_VALID: _ClassVar[ValidationStatus]
    VALIDATION_STATUS_CORRECTED: _ClassVar[ValidationStatus]
    VALIDATION_STATUS_SUSPECT: _ClassVar[ValidationStatus]
    VALIDATION_STATUS_REJECTED: _ClassVar[ValidationStatus]
VALIDATION_STATUS_UNSPECIFIED: ValidationStatus
VALIDATION_STATUS_UNVERIFIED: ValidationStatus
VALIDATION_STATUS_VALID: ValidationStatus
VALIDATION_STATUS_CORRECTED: ValidationStatus
VALIDATION_STATUS_SUSPECT: ValidationStatus
VALIDATION_STATUS_REJECTED: ValidationStatus

class StageMark(_message.Message):
    __slots__ = ("cache_length", "history_digest", "output_crc32c")
    CACHE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_CRC32C_FIELD_NUMBER: _ClassVar[int]
    cache_length: int
    history_digest: int
    output_crc32c: int
    def __init__(self, cache_length: _Optional[int] = ..., history_digest: _Optional[int] = ..., output_crc32c: _Optional[int] = ...) -> None: ...

class Alternative(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class TokenChunk(_message.Message):
    __slots__ = ("request", "position", "token_id", "epoch", "step", "logprob", "margin", "sampled_at_unix_ns", "source", "chain", "marks", "alternatives", "status", "checksum")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_AT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    request: bytes
    position: int
    token_id: int
    epoch: int
    step: int
    logprob: float
    margin: float
    sampled_at_unix_ns: int
    source: str
    chain: bytes
    marks: _containers.RepeatedCompositeFieldContainer[StageMark]
    alternatives: _containers.RepeatedCompositeFieldContainer[Alternative]
    status: ValidationStatus
    checksum: int
    def __init__(self, request: _Optional[bytes] = ..., position: _Optional[int] = ..., token_id: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., logprob: _Optional[float] = ..., margin: _Optional[float] = ..., sampled_at_unix_ns: _Optional[int] = ..., source: _Optional[str] = ..., chain: _Optional[bytes] = ..., marks: _Optional[_Iterable[_Union[StageMark, _Mapping]]] = ..., alternatives: _Optional[_Iterable[_Union[Alternative, _Mapping]]] = ..., status: _Optional[_Union[ValidationStatus, str]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("position", "token_id", "reference_token_id", "gap", "margin")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    position: int
    token_id: int
    reference_token_id: int
    gap: float
    margin: float
    def __init__(self, position: _Optional[int] = ..., token_id: _Optional[int] = ..., reference_token_id: _Optional[int] = ..., gap: _Optional[float] = ..., margin: _Optional[float] = ...) -> None: ...
