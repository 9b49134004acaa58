"""What readers saw, as they saw it, and nothing else. Pure.

An ``Answer`` is one request: every message that reached its client, before any client code has
smoothed it over, with the clock reading of its arrival. ``verdict`` judges it later; the same
history can be judged again by a better judge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Line:
    """One message. ``at``: seconds since the run began. ``position``: answer index of its first
    token. ``stream``: how many times the client had attached before. ``withdrawn_from``: everything
    from there on is withdrawn first; -1 is nothing."""

    at: float
    position: int
    token_ids: tuple[int, ...] = ()
    epoch: int = 0
    stream: int = 0
    withdrawn_from: int = -1
    verified_through: int = 0


@dataclass(frozen=True, slots=True)
class Repair:
    """A recovery as the finish tells it. ``seconds``: from the first sign to the next token."""

    cause: str
    action: str
    worker: str
    from_route: tuple[str, ...]
    to_route: tuple[str, ...]
    epoch: int
    kept: int
    replayed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """A terminal message."""

    at: float
    reason: str
    completion_tokens: int
    prompt_tokens: int = 0
    repairs: tuple[Repair, ...] = ()


@dataclass(slots=True)
class Answer:
    """One request. ``error``: the reason constant it failed with, as its client saw it.
    ``attached``: where each stream began reading, the first included. ``again``: the tokens that a
    second reading from the start gave, once it was over; None if it was not read again."""

    number: int
    question: int
    request_id: str
    asked_at: float
    lines: list[Line] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    attached: list[int] = field(default_factory=lambda: [0])
    error: str = ""
    detail: str = ""
    ended_at: float | None = None
    again: tuple[int, ...] | None = None

    @property
    def tokens(self) -> list[int]:
        """What a reader that heeds withdrawals and skips what it has holds in the end."""
        held: list[int] = []
        for line in self.lines:
            if line.withdrawn_from >= 0:
                del held[line.withdrawn_from :]
            fresh = max(0, len(held) - line.position)
            held += line.token_ids[fresh:]
        return held

    @property
    def heard_at(self) -> float:
        """When its client last heard anything of it; when it was asked, if never."""
        return self.lines[-1].at if self.lines else self.asked_at

    def arrivals(self) -> Iterator[tuple[float, int]]:
        """(when, how many new tokens)."""
        held = 0
        for line in self.lines:
            if line.withdrawn_from >= 0:
                held = min(held, line.withdrawn_from)
            behind = line.position + len(line.token_ids)
            if behind > held:
                yield line.at, behind - held
                held = behind


@dataclass(frozen=True, slots=True)
class Mark:
    """A fault as it was carried out. ``fired``: it met what it was for; ``evidence``: how that is
    known. ``path``: how the mesh was seen to answer it; empty if it was not."""

    number: int
    fault: str
    place: str
    due_at: float
    at: float
    ended_at: float
    fired: bool
    evidence: str
    path: str = ""


def to_lines(answers: Iterable[Answer], marks: Sequence[Mark]) -> Iterator[str]:
    """JSON lines: every answer, then every fault."""
    for answer in answers:
        yield json.dumps({"answer": asdict(answer)})
    for mark in marks:
        yield json.dumps({"fault": asdict(mark)})


def from_lines(lines: Iterable[str]) -> tuple[list[Answer], list[Mark]]:
    """What ``to_lines`` wrote. Raises ValueError, KeyError or TypeError for what it did not."""
    answers: list[Answer] = []
    marks: list[Mark] = []
    for text in lines:
        found: dict[str, Any] = json.loads(text)
        if "fault" in found:
            marks.append(Mark(**found["fault"]))
        else:
            answers.append(_answer(found["answer"]))
    return answers, marks


def _answer(facts: dict[str, Any]) -> Answer:
    lines = [Line(**{**one, "token_ids": tuple(one["token_ids"])}) for one in facts["lines"]]
    again = facts["again"]
    return Answer(
        **{
            **facts,
            "lines": lines,
            "ends": [_end(one) for one in facts["ends"]],
            "again": None if again is None else tuple(again),
        }
    )


def _end(facts: dict[str, Any]) -> End:
    repairs = tuple(
        Repair(
            **{
                **one,
                "from_route": tuple(one["from_route"]),
                "to_route": tuple(one["to_route"]),
            }
        )
        for one in facts["repairs"]
    )
    return End(**{**facts, "repairs": repairs})
