"""Log lines that can be found again: each carries the request id and the trace id it belongs to.

``configure`` once per process. Text for people when the stream is a terminal, one JSON object a
line otherwise (or as ``log_format`` says). Inside a call the ids come from context variables that
the telemetry sets; where there is no call (the driver, the compute thread) give them yourself:

    log.warning("stage is late", extra={"request": key, "worker": name})

Log lines never contain prompt or answer text: log ids, positions, counts and digests.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TextIO

from services.request_ids import show_id
from services.tracing import current_call, trace_id_of

REPEAT_S = 60.0
"""The same complaint of a library (an unreachable collector) is printed once in this time."""
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

TraceOf = Callable[[bytes], str]
"""The trace id of a request, hex; empty if it is not known."""

_traces: list[TraceOf] = []
"""At most one: this process's telemetry."""
_request: ContextVar[bytes | None] = ContextVar("stagemesh_log_request", default=None)


def find_traces(trace_of: TraceOf) -> None:
    """Lines that name a request get its trace id from here: the event of one request is often
    handled inside the call of another, or inside none."""
    _traces[:] = [trace_of]


@contextlib.contextmanager
def bind(request: bytes) -> Iterator[None]:
    """Lines logged inside carry this request. Not across a yield of an async generator."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)


def note_request(request: bytes) -> None:
    """Lines of the rest of this task carry this request."""
    _request.set(request)


class _Identify(logging.Filter):
    """Puts ``request_id``, ``trace_id``, ``service`` and ``worker`` on every record."""

    def __init__(self, service: str, worker: str) -> None:
        super().__init__()
        self._service, self._worker = service, worker

    def filter(self, record: logging.LogRecord) -> bool:
        request = getattr(record, "request", None) or _request.get()
        found = ""
        if isinstance(request, bytes) and len(request) == 16:
            found = _traces[0](request) if _traces else ""
            request = show_id(request)
        record.request_id = request if isinstance(request, str) else ""
        call = current_call.get()
        given = getattr(record, "trace_id", "") or found
        record.trace_id = given or (trace_id_of(call.span.get_span_context()) if call else "")
        record.service = self._service
        record.worker = getattr(record, "worker", "") or self._worker
        return True


class _OnceInAWhile(logging.Filter):
    """Lets one line per place through in REPEAT_S seconds; for libraries that repeat themselves."""

    def __init__(self, repeat_s: float = REPEAT_S) -> None:
        super().__init__()
        self._repeat_s = repeat_s
        self._last: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), time.monotonic()
        if not record.name.startswith("opentelemetry"):
            return True
        if now - self._last.get(place, -self._repeat_s) < self._repeat_s:
            return False
        self._last[place] = now
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, ids, and what ``extra`` gave."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {
            name: value
            for name, value in vars(record).items()
            if name not in _STANDARD and name != "request" and value is not None and value != ""
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """``12:34:56.789 INFO  stage-0 message  request=7f3a0c12 trace=9b1c…``."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created).astimezone()
        who = getattr(record, "worker", "") or getattr(record, "service", "")
        clock = moment.strftime("%H:%M:%S.") + f"{int(record.msecs):03d}"
        text = f"{clock} {record.levelname:<7} {who:<12} {record.getMessage()}"
        if request := getattr(record, "request_id", ""):
            text += f"  request={request}"
        if trace := getattr(record, "trace_id", ""):
            text += f" trace={trace}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def configure(
    *,
    level: str = "info",
    log_format: str = "auto",
    service: str = "",
    worker: str = "",
    stream: TextIO | None = None,
) -> logging.Handler:
    """Send all log lines of this process to ``stream`` (standard error). Replaces earlier handlers.

    ``log_format``: text, json, or auto (text on a terminal, JSON elsewhere).
    """
    target = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(target)
    as_text = log_format == "text" or (log_format == "auto" and target.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    handler.addFilter(_OnceInAWhile())
    handler.addFilter(_Identify(service, worker))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("asyncio", "urllib3", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    return handler
