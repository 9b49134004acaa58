from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Topic(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOPIC_UNSPECIFIED: _ClassVar[Topic]
    TOPIC_MEMBERSHIP: _ClassVar[Topic]
    TOPIC_GENERATION: _ClassVar[Topic]
    TOPIC_INTEGRITY: _ClassVar[Topic]
    TOPIC_RECOVERY: _ClassVar[Topic]
    TOPIC_BARRIER: _ClassVar[Topic]
    TOPIC_DIAGNOSTICS: _ClassVar[Topic]
TOPIC_UNSPECIFIED: Topic
TOPIC_MEMBERSHIP: Topic
TOPIC_GENERATION: Topic
TOPIC_INTEGRITY: Topic
TOPIC_RECOVERY: Topic
TOPIC_BARRIER: Topic
TOPIC_DIAGNOSTICS: Topic

class Event(_message.Message):
    __slots__ = ("topic", "offset", "time_unix_ns", "type", "request_id", "worker", "attributes", "publisher", "sequence", "checksum")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    topic: Topic
    offset: int
    time_unix_ns: int
    type: str
    request_id: str
    worker: str
    attributes: _containers.ScalarMap[str, str]
    publisher: str
    sequence: int
    checksum: int
    def __init__(self, topic: _Optional[_Union[Topic, str]] = ..., offset: _Optional[int] = ..., time_unix_ns: _Optional[int] = ..., type: _Optional[str] = ..., request_id: _Optional[str] = ..., worker: _Optional[str] = ..., attributes: _Optional[_Mapping[str, str]] = ..., publisher: _Optional[str] = ..., sequence: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class PublishRequest(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: Event
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class PublishResponse(_message.Message):
    __slots__ = ("offset", "duplicate")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DUPLICATE_FIELD_NUMBER: _ClassVar[int]
    offset: int
    duplicate: bool
    def __init__(self, offset: _Optional[int] = ..., duplicate: _Optional[bool] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("topics", "from_offset")
    TOPICS_FIELD_NUMBER: _ClassVar[int]
    FROM_OFFSET_FIELD_NUMBER: _ClassVar[int]
    topics: _containers.RepeatedScalarFieldContainer[Topic]
    from_offset: int
    def __init__(self, topics: _Optional[_Iterable[_Union[Topic, str]]] = ..., from_offset: _Optional[int] = ...) -> None: ...

class SubscribeResponse(_message.Message):
    __slots__ = ("event", "gap")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    event: Event
    gap: Gap
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ..., gap: _Optional[_Union[Gap, _Mapping]] = ...) -> None: ...

class Gap(_message.Message):
    __slots__ = ("topic", "first_offset", "last_offset")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LAST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    topic: Topic
    first_offset: int
    last_offset: int
    def __init__(self, topic: _Optional[_Union[Topic, str]] = ..., first_offset: _Optional[int] = ..., last_offset: _Optional[int] = ...) -> None: ...
