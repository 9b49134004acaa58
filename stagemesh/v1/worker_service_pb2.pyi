from stagemesh.v1 import topology_pb2 as _topology_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("register", "progress", "arrival", "result", "fault", "telemetry", "leave")
    REGISTER_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    register: _topology_pb2.Worker
    progress: ProgressReport
    arrival: BarrierArrival
    result: CommandResult
    fault: HopFault
    telemetry: TelemetryBatch
    leave: Leave
    def __init__(self, register: _Optional[_Union[_topology_pb2.Worker, _Mapping]] = ..., progress: _Optional[_Union[ProgressReport, _Mapping]] = ..., arrival: _Optional[_Union[BarrierArrival, _Mapping]] = ..., result: _Optional[_Union[CommandResult, _Mapping]] = ..., fault: _Optional[_Union[HopFault, _Mapping]] = ..., telemetry: _Optional[_Union[TelemetryBatch, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("registered", "open_route", "fence", "drain", "reinitialise", "barrier")
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    OPEN_ROUTE_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    REINITIALISE_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    registered: Registered
    open_route: OpenRoute
    fence: FenceEpoch
    drain: Drain
    reinitialise: Reinitialise
    barrier: BarrierOutcome
    def __init__(self, registered: _Optional[_Union[Registered, _Mapping]] = ..., open_route: _Optional[_Union[OpenRoute, _Mapping]] = ..., fence: _Optional[_Union[FenceEpoch, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., reinitialise: _Optional[_Union[Reinitialise, _Mapping]] = ..., barrier: _Optional[_Union[BarrierOutcome, _Mapping]] = ...) -> None: ...

class Registered(_message.Message):
    __slots__ = ("epoch", "report_interval_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REPORT_INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    report_interval_ms: int
    def __init__(self, epoch: _Optional[int] = ..., report_interval_ms: _Optional[int] = ...) -> None: ...

class OpenRoute(_message.Message):
    __slots__ = ("epoch", "stage_index", "stage_count", "successor_address", "successor_name", "fingerprint", "barrier", "generation", "timeout_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    STAGE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    stage_index: int
    stage_count: int
    successor_address: str
    successor_name: str
    fingerprint: str
    barrier: str
    generation: int
    timeout_ms: int
    def __init__(self, epoch: _Optional[int] = ..., stage_index: _Optional[int] = ..., stage_count: _Optional[int] = ..., successor_address: _Optional[str] = ..., successor_name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., barrier: _Optional[str] = ..., generation: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class FenceEpoch(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("timeout_ms", "barrier", "epoch", "generation")
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    BARRIER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    barrier: str
    epoch: int
    generation: int
    def __init__(self, timeout_ms: _Optional[int] = ..., barrier: _Optional[str] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Reinitialise(_message.Message):
    __slots__ = ("reason", "command_id")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    reason: str
    command_id: str
    def __init__(self, reason: _Optional[str] = ..., command_id: _Optional[str] = ...) -> None: ...

class BarrierArrival(_message.Message):
    __slots__ = ("name", "epoch", "generation", "facts", "refusal")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    generation: int
    facts: _containers.ScalarMap[str, str]
    refusal: str
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., facts: _Optional[_Mapping[str, str]] = ..., refusal: _Optional[str] = ...) -> None: ...

class BarrierOutcome(_message.Message):
    __slots__ = ("name", "epoch", "generation", "complete", "absent")
    NAME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    epoch: int
    generation: int
    complete: bool
    absent: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., epoch: _Optional[int] = ..., generation: _Optional[int] = ..., complete: _Optional[bool] = ..., absent: _Optional[_Iterable[str]] = ...) -> None: ...

class ProgressReport(_message.Message):
    __slots__ = ("epoch", "accepted_step", "computed_step", "acknowledged_step", "queued", "kv_tokens", "requests", "compute_us", "computing_ms", "rss_bytes", "counters", "computing_step", "starved_us")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_STEP_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_STEP_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_STEP_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_MS_FIELD_NUMBER: _ClassVar[int]
    RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTING_STEP_FIELD_NUMBER: _ClassVar[int]
    STARVED_US_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    accepted_step: int
    computed_step: int
    acknowledged_step: int
    queued: int
    kv_tokens: int
    requests: int
    compute_us: int
    computing_ms: int
    rss_bytes: int
    counters: _containers.ScalarMap[str, int]
    computing_step: int
    starved_us: int
    def __init__(self, epoch: _Optional[int] = ..., accepted_step: _Optional[int] = ..., computed_step: _Optional[int] = ..., acknowledged_step: _Optional[int] = ..., queued: _Optional[int] = ..., kv_tokens: _Optional[int] = ..., requests: _Optional[int] = ..., compute_us: _Optional[int] = ..., computing_ms: _Optional[int] = ..., rss_bytes: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., computing_step: _Optional[int] = ..., starved_us: _Optional[int] = ...) -> None: ...

class CommandResult(_message.Message):
    __slots__ = ("command_id", "ok", "detail", "worker")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    command_id: str
    ok: bool
    detail: str
    worker: _topology_pb2.Worker
    def __init__(self, command_id: _Optional[str] = ..., ok: _Optional[bool] = ..., detail: _Optional[str] = ..., worker: _Optional[_Union[_topology_pb2.Worker, _Mapping]] = ...) -> None: ...

class HopFault(_message.Message):
    __slots__ = ("epoch", "step", "hop_from_plus_one", "hop_to_plus_one", "reason", "detail", "fatal")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    HOP_FROM_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    HOP_TO_PLUS_ONE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    hop_from_plus_one: int
    hop_to_plus_one: int
    reason: str
    detail: str
    fatal: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., hop_from_plus_one: _Optional[int] = ..., hop_to_plus_one: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., fatal: _Optional[bool] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class TelemetryBatch(_message.Message):
    __slots__ = ("traces", "dropped")
    TRACES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    traces: bytes
    dropped: int
    def __init__(self, traces: _Optional[bytes] = ..., dropped: _Optional[int] = ...) -> None: ...
