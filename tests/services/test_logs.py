"""Log lines can be found again by request and trace, and say nothing of what was asked."""

import asyncio
import io
import json
import logging
import uuid

import pytest

from services import logs, tracing
from services.telemetry import Role, Telemetry

REQUEST = uuid.UUID("7f3a0c12-0000-4000-8000-000000000000")
log = logging.getLogger("tests.logs")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logs._request.set(None)  # what other tests left in this thread's context
    tracing.current_call.set(None)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_where_there_is_no_terminal_and_text_where_there_is():
    plain, terminal = io.StringIO(), Terminal()
    logs.configure(stream=plain, service="coordinator")
    log.info("route %d is open", 3)
    logs.configure(stream=terminal, worker="stage-0")
    log.info("loaded")
    (line,) = lines(plain)
    assert line["message"] == "route 3 is open"
    assert (line["level"], line["service"]) == ("info", "coordinator")
    assert str(line["time"]).endswith("Z")
    assert "INFO" in terminal.getvalue()
    assert "stage-0" in terminal.getvalue()


def test_the_request_is_on_every_line_inside_and_on_none_outside():
    stream = io.StringIO()
    logs.configure(stream=stream)
    with logs.bind(REQUEST.bytes):
        log.info("inside")
    log.info("outside")
    log.info("given", extra={"request": REQUEST.bytes, "worker": "stage-1"})
    inside, outside, given = lines(stream)
    assert inside["request_id"] == given["request_id"] == str(REQUEST)
    assert "request_id" not in outside
    assert given["worker"] == "stage-1"


def test_the_trace_of_the_call_is_on_every_line_of_its_task():
    stream = io.StringIO()
    logs.configure(stream=stream)
    telemetry = Telemetry(Role("coordinator"))

    async def handle(number: int) -> str:
        call = telemetry.rpc.rpc_started("/a.v1.B/C", {}, "ipv4:127.0.0.1:1")
        request = uuid.UUID(int=number).bytes
        traceparent = telemetry.requests.request_received(request, {}, "tiny")
        await asyncio.sleep(0)
        log.info("call %d", number)
        telemetry.rpc.rpc_ended(call, "OK", None)
        return traceparent.split("-")[1]

    async def both() -> list[str]:
        return await asyncio.gather(handle(1), handle(2))

    traces = asyncio.run(both())
    found = lines(stream)
    assert [line["trace_id"] for line in found] == traces
    assert [line["request_id"] for line in found] == [str(uuid.UUID(int=n)) for n in (1, 2)]
    telemetry.shutdown()


def test_an_exception_stays_in_its_line():
    stream = io.StringIO()
    logs.configure(stream=stream)
    try:
        raise ValueError("no such layer")
    except ValueError:
        log.exception("loading failed")
    (line,) = lines(stream)
    assert "no such layer" in str(line["exception"])


def test_a_library_that_repeats_itself_is_heard_once_and_we_always():
    stream = io.StringIO()
    logs.configure(stream=stream)
    library = logging.getLogger("opentelemetry.exporter")
    for _ in range(5):
        library.warning("collector unreachable")
        log.warning("stage is late")
    heard = [str(line["message"]) for line in lines(stream)]
    assert heard.count("collector unreachable") == 1
    assert heard.count("stage is late") == 5


def test_configuring_again_replaces_and_levels_hold():
    first, second = io.StringIO(), io.StringIO()
    logs.configure(stream=first)
    logs.configure(stream=second, level="warning")
    log.info("quiet")
    log.warning("loud")
    assert not first.getvalue()
    assert [line["message"] for line in lines(second)] == ["loud"]


def test_a_line_that_names_a_request_carries_that_requests_trace_whoever_called():
    stream = io.StringIO()
    logs.configure(stream=stream)
    telemetry = Telemetry(Role("test"))
    try:
        traceparent = telemetry.requests.request_received(REQUEST.bytes, {}, "tiny")
        log.info("handled between calls", extra={"request": REQUEST.bytes})
        log.info("of a request nobody follows", extra={"request": bytes(16)})
    finally:
        telemetry.shutdown()
    known, unknown = lines(stream)
    assert known["trace_id"] == traceparent.split("-")[1]
    assert "trace_id" not in unknown
