import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from stagemesh.v1 import generation_service_pb2 as _generation_service_pb2
from stagemesh.v1 import topology_pb2 as _topology_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GENERATION_STATE_UNSPECIFIED: _ClassVar[GenerationState]
    GENERATION_STATE_QUEUED: _ClassVar[GenerationState]
    GENERATION_STATE_PREFILLING: _ClassVar[GenerationState]
    GENERATION_STATE_DECODING: _ClassVar[GenerationState]
    GENERATION_STATE_RECOVERING: _ClassVar[GenerationState]
    GENERATION_STATE_FINISHED: _ClassVar[GenerationState]
    GENERATION_STATE_FAILED: _ClassVar[GenerationState]
    GENERATION_STATE_CANCELLED: _ClassVar[GenerationState]
GENERATION_STATE_UNSPECIFIED: GenerationState
GENERATION_STATE_QUEUED: GenerationState
GENERATION_STATE_PREFILLING: GenerationState
GENERATION_STATE_DECODING: GenerationState
GENERATION_STATE_RECOVERING: GenerationState
GENERATION_STATE_FINISHED: GenerationState
GENERATION_STATE_FAILED: GenerationState
GENERATION_STATE_CANCELLED: GenerationState

class GetMeshRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMeshResponse(_message.Message):
    __slots__ = ("workers", "routes", "running", "queued", "finished", "failed", "version", "uptime_s", "ready", "not_ready_reason", "environment", "pid")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_REASON_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    workers: _containers.RepeatedCompositeFieldContainer[_topology_pb2.WorkerStatus]
    routes: _containers.RepeatedCompositeFieldContainer[_topology_pb2.RouteStatus]
    running: int
    queued: int
    finished: int
    failed: int
    version: str
    uptime_s: float
    ready: bool
    not_ready_reason: str
    environment: _containers.ScalarMap[str, str]
    pid: int
    def __init__(self, workers: _Optional[_Iterable[_Union[_topology_pb2.WorkerStatus, _Mapping]]] = ..., routes: _Optional[_Iterable[_Union[_topology_pb2.RouteStatus, _Mapping]]] = ..., running: _Optional[int] = ..., queued: _Optional[int] = ..., finished: _Optional[int] = ..., failed: _Optional[int] = ..., version: _Optional[str] = ..., uptime_s: _Optional[float] = ..., ready: _Optional[bool] = ..., not_ready_reason: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ..., pid: _Optional[int] = ...) -> None: ...

class ListGenerationsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListGenerationsResponse(_message.Message):
    __slots__ = ("generations", "next_page_token")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    generations: _containers.RepeatedCompositeFieldContainer[Generation]
    next_page_token: str
    def __init__(self, generations: _Optional[_Iterable[_Union[Generation, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Generation(_message.Message):
    __slots__ = ("request_id", "state", "prompt_tokens", "completion_tokens", "verified_through", "epoch", "route", "recoveries", "created_at", "trace_id", "error_reason", "finish")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_THROUGH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_REASON_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    state: GenerationState
    prompt_tokens: int
    completion_tokens: int
    verified_through: int
    epoch: int
    route: _containers.RepeatedScalarFieldContainer[str]
    recoveries: _containers.RepeatedCompositeFieldContainer[_generation_service_pb2.Recovery]
    created_at: _timestamp_pb2.Timestamp
    trace_id: str
    error_reason: str
    finish: _generation_service_pb2.Finish
    def __init__(self, request_id: _Optional[str] = ..., state: _Optional[_Union[GenerationState, str]] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., verified_through: _Optional[int] = ..., epoch: _Optional[int] = ..., route: _Optional[_Iterable[str]] = ..., recoveries: _Optional[_Iterable[_Union[_generation_service_pb2.Recovery, _Mapping]]] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., trace_id: _Optional[str] = ..., error_reason: _Optional[str] = ..., finish: _Optional[_Union[_generation_service_pb2.Finish, _Mapping]] = ...) -> None: ...

class GetGenerationRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetGenerationResponse(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: Generation
    def __init__(self, generation: _Optional[_Union[Generation, _Mapping]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker", "timeout_s")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    worker: str
    timeout_s: int
    def __init__(self, worker: _Optional[str] = ..., timeout_s: _Optional[int] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("worker",)
    WORKER_FIELD_NUMBER: _ClassVar[int]
    worker: _topology_pb2.WorkerStatus
    def __init__(self, worker: _Optional[_Union[_topology_pb2.WorkerStatus, _Mapping]] = ...) -> None: ...

class GetDiagnosticsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDiagnosticsResponse(_message.Message):
    __slots__ = ("counters", "workers", "barriers")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BARRIERS_FIELD_NUMBER: _ClassVar[int]
    counters: _containers.ScalarMap[str, int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerCounters]
    barriers: _containers.RepeatedCompositeFieldContainer[BarrierStatus]
    def __init__(self, counters: _Optional[_Mapping[str, int]] = ..., workers: _Optional[_Iterable[_Union[WorkerCounters, _Mapping]]] = ..., barriers: _Optional[_Iterable[_Union[BarrierStatus, _Mapping]]] = ...) -> None: ...

class WorkerCounters(_message.Message):
    __slots__ = ("worker", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    counters: _containers.ScalarMap[str, int]
    def __init__(self, worker: _Optional[str] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class BarrierStatus(_message.Message):
    __slots__ = ("name", "epoch", "generation", "state", "participants", "absent", "age_ms", "detail", "arrived", "culprits", "cause", "last_progress", "remaining_ms")
    class LastProgressEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANTS_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    ARRIVED_FIELD_NUMBER: _ClassVar[int]
    CULPRITS_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    LAST_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    generation: int
    state: str
    participants: _containers.RepeatedScalarFieldContainer[str]
    absent: _containers.RepeatedScalarFieldContainer[str]
    age_ms: int
    detail: str
    arrived: _containers.RepeatedScalarFieldContainer[str]
    culprits: _containers.RepeatedScalarFieldContainer[str]
    cause: str
    last_progress: _containers.ScalarMap[str, str]
    remaining_ms: int
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., state: _Optional[str] = ..., participants: _Optional[_Iterable[str]] = ..., absent: _Optional[_Iterable[str]] = ..., age_ms: _Optional[int] = ..., detail: _Optional[str] = ..., arrived: _Optional[_Iterable[str]] = ..., culprits: _Optional[_Iterable[str]] = ..., cause: _Optional[str] = ..., last_progress: _Optional[_Mapping[str, str]] = ..., remaining_ms: _Optional[int] = ...) -> None: ...

class GetTraceRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class GetTraceResponse(_message.Message):
    __slots__ = ("traces",)
    TRACES_FIELD_NUMBER: _ClassVar[int]
    traces: bytes
    def __init__(self, traces: _Optional[bytes] = ...) -> None: ...
