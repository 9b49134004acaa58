from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_JOINING: _ClassVar[WorkerState]
    WORKER_STATE_READY: _ClassVar[WorkerState]
    WORKER_STATE_SUSPECT: _ClassVar[WorkerState]
    WORKER_STATE_FAILED: _ClassVar[WorkerState]
    WORKER_STATE_QUARANTINED: _ClassVar[WorkerState]
    WORKER_STATE_DRAINING: _ClassVar[WorkerState]

class RouteState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROUTE_STATE_UNSPECIFIED: _ClassVar[RouteState]
    ROUTE_STATE_OPENING: _ClassVar[RouteState]
    ROUTE_STATE_PROBING: _ClassVar[RouteState]
    ROUTE_STATE_OPEN: _ClassVar[RouteState]
    ROUTE_STATE_DRAINING: _ClassVar[RouteState]
    ROUTE_STATE_CLOSED: _ClassVar[RouteState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_JOINING: WorkerState
WORKER_STATE_READY: WorkerState
WORKER_STATE_SUSPECT: WorkerState
WORKER_STATE_FAILED: WorkerState
WORKER_STATE_QUARANTINED: WorkerState
WORKER_STATE_DRAINING: WorkerState
ROUTE_STATE_UNSPECIFIED: RouteState
ROUTE_STATE_OPENING: RouteState
ROUTE_STATE_PROBING: RouteState
ROUTE_STATE_OPEN: RouteState
ROUTE_STATE_DRAINING: RouteState
ROUTE_STATE_CLOSED: RouteState

class Worker(_message.Message):
    __slots__ = ("name", "address", "span_first", "span_last", "layer_count", "fingerprint", "span_fingerprint", "dtype", "pid", "instance", "kv_budget_tokens", "memory_bytes", "capabilities", "protocol_version", "environment")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SPAN_FIRST_FIELD_NUMBER: _ClassVar[int]
    SPAN_LAST_FIELD_NUMBER: _ClassVar[int]
    LAYER_COUNT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SPAN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    KV_BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    address: str
    span_first: int
    span_last: int
    layer_count: int
    fingerprint: str
    span_fingerprint: str
    dtype: str
    pid: int
    instance: str
    kv_budget_tokens: int
    memory_bytes: int
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    protocol_version: int
    environment: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., address: _Optional[str] = ..., span_first: _Optional[int] = ..., span_last: _Optional[int] = ..., layer_count: _Optional[int] = ..., fingerprint: _Optional[str] = ..., span_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ..., pid: _Optional[int] = ..., instance: _Optional[str] = ..., kv_budget_tokens: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., capabilities: _Optional[_Iterable[str]] = ..., protocol_version: _Optional[int] = ..., environment: _Optional[_Mapping[str, str]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "state", "stage_index_plus_one", "epoch", "in_flight", "kv_tokens", "idle_ms", "evidence")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    worker: Worker
    state: WorkerState
    stage_index_plus_one: int
    epoch: int
    in_flight: int
    kv_tokens: int
    idle_ms: int
    evidence: str
    def __init__(self, worker: _Optional[_Union[Worker, _Mapping]] = ..., state: _Optional[_Union[WorkerState, str]] = ..., stage_index_plus_one: _Optional[int] = ..., epoch: _Optional[int] = ..., in_flight: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., idle_ms: _Optional[int] = ..., evidence: _Optional[str] = ...) -> None: ...

class RouteStatus(_message.Message):
    __slots__ = ("epoch", "workers", "state", "step", "in_flight", "requests", "full_worker")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FULL_WORKER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    workers: _containers.RepeatedScalarFieldContainer[str]
    state: RouteState
    step: int
    in_flight: int
    requests: int
    full_worker: bool
    def __init__(self, epoch: _Optional[int] = ..., workers: _Optional[_Iterable[str]] = ..., state: _Optional[_Union[RouteState, str]] = ..., step: _Optional[int] = ..., in_flight: _Optional[int] = ..., requests: _Optional[int] = ..., full_worker: _Optional[bool] = ...) -> None: ...
