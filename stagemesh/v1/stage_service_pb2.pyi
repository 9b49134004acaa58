from stagemesh.v1 import frame_pb2 as _frame_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExchangeRequest(_message.Message):
    __slots__ = ("open", "frame", "part")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    open: LinkOpen
    frame: _frame_pb2.StepFrame
    part: _frame_pb2.FramePart
    def __init__(self, open: _Optional[_Union[LinkOpen, _Mapping]] = ..., frame: _Optional[_Union[_frame_pb2.StepFrame, _Mapping]] = ..., part: _Optional[_Union[_frame_pb2.FramePart, _Mapping]] = ...) -> None: ...

class ExchangeResponse(_message.Message):
    __slots__ = ("opened", "ack", "nack")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    NACK_FIELD_NUMBER: _ClassVar[int]
    opened: LinkOpened
    ack: FrameAck
    nack: FrameNack
    def __init__(self, opened: _Optional[_Union[LinkOpened, _Mapping]] = ..., ack: _Optional[_Union[FrameAck, _Mapping]] = ..., nack: _Optional[_Union[FrameNack, _Mapping]] = ...) -> None: ...

class LinkOpen(_message.Message):
    __slots__ = ("epoch", "hop_from_plus_one", "hop_to_plus_one", "fingerprint", "version", "worker")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HOP_FROM_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    HOP_TO_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    hop_from_plus_one: int
    hop_to_plus_one: int
    fingerprint: bytes
    version: int
    worker: str
    def __init__(self, epoch: _Optional[int] = ..., hop_from_plus_one: _Optional[int] = ..., hop_to_plus_one: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., version: _Optional[int] = ..., worker: _Optional[str] = ...) -> None: ...

class LinkOpened(_message.Message):
    __slots__ = ("next_step", "inflight_frames_max", "inflight_bytes_max", "crc32c")
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_FRAMES_MAX_FIELD_NUMBER: _ClassVar[int]
    INFLIGHT_BYTES_MAX_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    inflight_frames_max: int
    inflight_bytes_max: int
    crc32c: int
    def __init__(self, next_step: _Optional[int] = ..., inflight_frames_max: _Optional[int] = ..., inflight_bytes_max: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class FrameAck(_message.Message):
    __slots__ = ("step", "epoch", "duplicate", "crc32c")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    duplicate: bool
    crc32c: int
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., duplicate: _Optional[bool] = ..., crc32c: _Optional[int] = ...) -> None: ...

class FrameNack(_message.Message):
    __slots__ = ("epoch", "next_step", "reason", "detail", "retransmit", "crc32c")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRANSMIT_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    next_step: int
    reason: str
    detail: str
    retransmit: bool
    crc32c: int
    def __init__(self, epoch: _Optional[int] = ..., next_step: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., retransmit: _Optional[bool] = ..., crc32c: _Optional[int] = ...) -> None: ...
