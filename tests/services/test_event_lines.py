"""Events as log lines: everything an operator asks for the day after, nothing per token, and
bounded."""

from __future__ import annotations

import io
import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.instructions import PublishEvent
from coordinator.token_facts import TokenFacts
from coordinator.topics import Topic
from services import logs
from services.event_lines import (
    LEVELS,
    LINES_AT_ONCE,
    LINES_PER_S,
    VALUE_CHARACTERS_MAX,
    EventLines,
)
from services.event_service import EventHub
from stagemesh.token import TokenChunk
from tests.house.test_operations_page import documented

REQUEST = uuid.UUID(int=9).bytes
RECOVERED = PublishEvent(
    "recovery",
    "RecoveryFinished",
    REQUEST,
    "stage-1",
    {
        "cause": "STAGE_UNREACHABLE",
        "action": "reroute",
        "from_route": "stage-0 stage-1",
        "to_route": "full",
    },
)


class Heard:
    """A hub whose log is read, at a time that stands still."""

    def __init__(self, level: str = "info") -> None:
        self.now = 100.0
        self._stream = io.StringIO()
        logs.configure(stream=self._stream, service="coordinator", level=level)
        self.hub = EventHub(clock=lambda: self.now)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logs._request.set(None)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_every_event_has_a_level_but_that_of_a_token() -> None:
    topics = documented(Path(__file__).parents[2])
    assert set(LEVELS) == topics.keys() - {"ChunkGenerated"}
    quiet = {event for event, level in LEVELS.items() if level < logging.INFO}
    assert {topics[event] for event in quiet} == {"generation", "barrier", "diagnostics"}
    assert LEVELS["GenerationFailed"] == LEVELS["BarrierBroken"] == logging.WARNING


def test_a_recovery_is_a_line_with_its_class_the_workers_and_what_was_done() -> None:
    heard = Heard()
    heard.hub.publish(RECOVERED)
    (line,) = heard.lines()
    assert line["message"] == (
        "RecoveryFinished worker=stage-1 cause=STAGE_UNREACHABLE action=reroute "
        'from_route="stage-0 stage-1" to_route=full'
    )
    assert (line["level"], line["topic"]) == ("warning", "recovery")
    assert (line["worker"], line["request_id"]) == ("stage-1", str(uuid.UUID(int=9)))


def test_a_worker_that_fails_warns_and_one_that_joins_informs() -> None:
    heard = Heard()
    for kind in ("WorkerFailed", "WorkerJoined", "WorkerGivenUp"):
        heard.hub.publish(PublishEvent("membership", kind, b"", "stage-0", {"evidence": "silent"}))
    assert [line["level"] for line in heard.lines()] == ["warning", "info", "error"]
    assert all("evidence=silent" in str(line["message"]) for line in heard.lines())


@pytest.mark.parametrize("level", ["info", "debug"])
def test_nothing_is_logged_of_a_token(level: str) -> None:
    heard = Heard(level)
    chunk = TokenChunk(REQUEST, 7, 1, 1, 42, 0.0, 0.0, 0, "s", bytes(16))
    facts = TokenFacts(chunk, 0, 0)
    heard.hub.publish(PublishEvent("generation", "ChunkGenerated", REQUEST, "s", facts))
    assert heard.lines() == []
    assert heard.hub.router.read(Topic.GENERATION, 1)


def test_a_flood_is_bounded_by_type_and_what_was_left_out_is_said() -> None:
    heard = Heard()
    fault = PublishEvent("integrity", "HopFault", b"", "stage-1", {"reason": "CHECKSUM_MISMATCH"})
    for _ in range(LINES_AT_ONCE + 500):
        heard.hub.publish(fault)
    heard.hub.publish(RECOVERED)
    assert len(heard.lines()) == LINES_AT_ONCE + 1, "another type has room of its own"
    heard.now += 2 / LINES_PER_S
    for _ in range(5):
        heard.hub.publish(fault)
    last = [str(line["message"]) for line in heard.lines()][LINES_AT_ONCE + 1 :]
    assert len(last) == 2
    assert last[0].endswith("(500 more of these were not logged)")
    assert "more of these" not in last[1]
    assert heard.hub.router.next_offset(Topic.INTEGRITY) == LINES_AT_ONCE + 506


def test_what_a_peer_says_stays_on_one_line_and_has_an_end() -> None:
    said = "a\nWARNING forged\x1b[2J" + "x" * 1000
    line = EventLines().line(PublishEvent("membership", "WorkerRefused", b"", said), 0.0)
    assert line.isprintable()
    assert len(line) < VALUE_CHARACTERS_MAX + 50
