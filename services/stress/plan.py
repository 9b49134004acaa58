"""What a stress run does: which faults, how often, and what the readers ask for. Pure.

A plan is a small TOML or JSON file; every key may be left out.

    every_s = 5.0              seconds from one fault to the next, on average
    hold_s = 4.0               how long a stopped process, a black hole or a slow reader lasts
    settle_s = 60.0            after the last fault no client waits longer for its next token

    [workload]
    prompt_tokens = [4, 96]    shortest and longest prompt
    answer_tokens = [16, 48]   shortest and longest answer
    answers = 24               different questions; asked again and again
    sampled = 0.5              share of them that is drawn at temperature 0.8
    shadow = 0.25              share that asks for shadow verification

    [faults]                   name = weight; a fault of weight 2 comes twice as often
    drop = 2
    sigkill = 1

The names of faults are those of ``FaultName``. ``all`` is every one of them, once a round.
"""

from __future__ import annotations

import enum
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from stagemesh.errors import InvalidConfiguration

ALL = "all"
WEIGHT_MAX = 100
EVERY_S_DEFAULT = 5.0
EVERY_S_LEAST = 0.05


class FaultName(enum.Enum):
    """Every fault there is. Values are what plans and reports call them."""

    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    CORRUPT = "corrupt"
    """A bit of a header or an activation, or two blocks that change places."""
    TRUNCATE = "truncate"
    GARBAGE = "garbage"
    """Bytes that are no message."""
    STALE = "stale-epoch"
    """A frame of the epoch before comes again."""
    LOST_ANSWER = "lost-answer"
    """Acknowledgements do not arrive until a frame is sent again."""
    RESET = "reset"
    HALF_OPEN = "half-open"
    BLACK_HOLE = "black-hole"
    SLOW_READER = "slow-reader"
    SWIZZLE_CLOG = "swizzle-clog"
    """Some wires stop one after the other and come back in another order."""
    CLIENT_CUT = "client-cut"
    """Every client's connection breaks."""
    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    OTHER_WEIGHTS = "other-weights"
    """A stage is killed and comes back with other weights."""
    COORDINATOR_KILL = "coordinator-kill"


FRAME_FAULTS = frozenset(
    {
        FaultName.DROP,
        FaultName.DELAY,
        FaultName.DUPLICATE,
        FaultName.REORDER,
        FaultName.CORRUPT,
        FaultName.TRUNCATE,
        FaultName.GARBAGE,
        FaultName.STALE,
        FaultName.LOST_ANSWER,
    }
)
"""Happen to single frames of one hop."""
BETWEEN_STAGES = frozenset({FaultName.TRUNCATE})
"""Need an activation, so a hop between two stages."""
DISRUPTIVE = frozenset(
    {
        FaultName.HALF_OPEN,
        FaultName.BLACK_HOLE,
        FaultName.SLOW_READER,
        FaultName.SWIZZLE_CLOG,
        FaultName.SIGKILL,
        FaultName.SIGSTOP,
        FaultName.OTHER_WEIGHTS,
        FaultName.COORDINATOR_KILL,
    }
)
"""May close a route: one at a time, and only into a mesh that is whole."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What readers ask for. Ranges are inclusive; shares are between 0 and 1."""

    prompt_tokens: tuple[int, int] = (4, 96)
    answer_tokens: tuple[int, int] = (16, 48)
    answers: int = 24
    sampled: float = 0.5
    shadow: float = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module. ``faults``: weights, in the order of ``FaultName``."""

    faults: Mapping[FaultName, int]
    every_s: float = EVERY_S_DEFAULT
    hold_s: float = 4.0
    settle_s: float = 60.0
    workload: Workload = field(default_factory=Workload)

    def possible(self, stages: int, faults: Iterable[FaultName] = FaultName) -> Plan:
        """Without what a mesh of so many stages has no place for, on a network that can do
        ``faults``."""
        able = set(faults)
        kept = {
            name: weight
            for name, weight in self.faults.items()
            if name in able and (stages > 1 or name not in BETWEEN_STAGES)
        }
        return Plan(kept, self.every_s, self.hold_s, self.settle_s, self.workload)


def builtin(text: str) -> Plan | None:
    """``all``, ``none``, or names separated by commas; None if ``text`` is none of these."""
    names = [part.strip() for part in text.split(",")]
    if names == [ALL]:
        return Plan(dict.fromkeys(FaultName, 1))
    if names == ["none"]:
        return Plan({})
    known = {one.value: one for one in FaultName}
    if all(name in known for name in names):
        return Plan({one: 1 for one in FaultName if one.value in names})
    return None


def parse(text: str, *, is_json: bool) -> Plan:
    """A plan file's content. Raises InvalidConfiguration naming the key that cannot be used."""
    try:
        document = json.loads(text) if is_json else tomllib.loads(text)
    except ValueError as error:
        raise InvalidConfiguration(f"the plan cannot be read: {error}", setting="faults") from None
    if not isinstance(document, dict):
        raise InvalidConfiguration("a plan is a table", setting="faults")
    known = {"every_s", "hold_s", "settle_s", "workload", "faults"}
    _refuse_unknown(document, known, "plan")
    numbers = {
        name: _number(document[name], name, 0.05, 3600.0)
        for name in ("every_s", "hold_s", "settle_s")
        if name in document
    }
    return Plan(
        faults=_weights(document.get("faults", {ALL: 1})),
        workload=_workload(document.get("workload", {})),
        **numbers,
    )


def _weights(table: Any) -> dict[FaultName, int]:
    known = {one.value: one for one in FaultName}
    if not isinstance(table, dict):
        raise InvalidConfiguration("[faults] gives weights by name", setting="faults")
    _refuse_unknown(table, {ALL, *known}, "[faults]")
    everything = _weight(table.get(ALL, 0), ALL)
    found = {one: _weight(table.get(one.value, everything), one.value) for one in FaultName}
    return {one: weight for one, weight in found.items() if weight}


def _weight(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= WEIGHT_MAX:
        raise InvalidConfiguration(
            f"the weight of {name} is a whole number from 0 to {WEIGHT_MAX}", setting=name
        )
    return value


def _workload(table: Any) -> Workload:
    if not isinstance(table, dict):
        raise InvalidConfiguration("[workload] is a table", setting="workload")
    _refuse_unknown(table, {one.name for one in fields(Workload)}, "[workload]")
    usual = Workload()
    return Workload(
        prompt_tokens=_range(table.get("prompt_tokens", usual.prompt_tokens), "prompt_tokens"),
        answer_tokens=_range(table.get("answer_tokens", usual.answer_tokens), "answer_tokens"),
        answers=int(_number(table.get("answers", usual.answers), "answers", 1, 10_000)),
        sampled=_number(table.get("sampled", usual.sampled), "sampled", 0.0, 1.0),
        shadow=_number(table.get("shadow", usual.shadow), "shadow", 0.0, 1.0),
    )


def _range(value: Any, name: str) -> tuple[int, int]:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if (
        not is_pair
        or not all(isinstance(one, int) for one in value)
        or not (1 <= value[0] <= value[1])
    ):
        raise InvalidConfiguration(f"{name} is [shortest, longest], from 1", setting=name)
    return (value[0], value[1])


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidConfiguration(f"{name} is between {low:g} and {high:g}", setting=name)
    return float(value)


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise InvalidConfiguration(
                f"{where}: unknown key {key!r}; there are {', '.join(sorted(known))}", setting=key
            )
