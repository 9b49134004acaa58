"""From what somebody wrote (a TOML value or text) to a setting's value, or an error naming it.
``shown`` is the way back: text that is parsed to the same value.

Every parser takes the setting's name and the value, and raises InvalidConfiguration; ``shape`` is
how help texts show what it takes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from stagemesh.errors import InvalidConfiguration
from stagemesh.topology import Span

WORDS_TRUE = frozenset({"1", "true", "yes", "on"})
WORDS_FALSE = frozenset({"0", "false", "no", "off"})

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Parser(Generic[_Value]):
    """Turns what was written for a setting into its value."""

    shape: str
    parse: Callable[[str, object], _Value]

    def __call__(self, name: str, value: object) -> _Value:
        """The value. Raises InvalidConfiguration naming the setting."""
        return self.parse(name, value)


def fail(name: str, value: object, expected: str) -> InvalidConfiguration:
    return InvalidConfiguration(f"{name}: {value!r} is not {expected}", setting=name)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise fail(name, value, "text")
    return value


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in WORDS_TRUE:
        return True
    if word in WORDS_FALSE:
        return False
    raise fail(name, value, "true or false")


def whole(low: int, high: int) -> Parser[int]:
    def parse(name: str, value: object) -> int:
        expected = f"a whole number from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise fail(name, value, expected)
        try:
            number = int(value)
        except ValueError:
            raise fail(name, value, expected) from None
        if not low <= number <= high:
            raise fail(name, value, expected)
        return number

    return Parser("N", parse)


def seconds(low: float, high: float) -> Parser[float]:
    def parse(name: str, value: object) -> float:
        expected = f"a number of seconds from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise fail(name, value, expected)
        try:
            number = float(value)
        except ValueError:
            raise fail(name, value, expected) from None
        if not (math.isfinite(number) and low <= number <= high):
            raise fail(name, value, expected)
        return number

    return Parser("S", parse)


def number(low: float, high: float, what: str) -> Parser[float]:
    """A number from ``low`` to ``high``, of ``what``."""

    def parse(name: str, value: object) -> float:
        expected = f"a number from {low:g} to {high:g} ({what})"
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise fail(name, value, expected)
        try:
            found = float(value)
        except ValueError:
            raise fail(name, value, expected) from None
        if not (math.isfinite(found) and low <= found <= high):
            raise fail(name, value, expected)
        return found

    return Parser("X", parse)


def choice(*words: str) -> Parser[str]:
    def parse(name: str, value: object) -> str:
        if value not in words:
            raise fail(name, value, "one of " + ", ".join(words))
        return str(value)

    return Parser("|".join(words), parse)


def _span_or_all(name: str, value: object) -> Span | None:
    """``"0-12"``; empty or ``"all"`` means every layer."""
    found = _text(name, value).strip()
    if found in {"", "all"}:
        return None
    try:
        return Span.parse(found)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"{name}: {error.message}", setting=name) from None


def _spans(name: str, value: object) -> tuple[Span, ...]:
    """``"0-12,12-30"`` or a list of such; empty means that ``stages`` decides."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise fail(name, value, "spans such as 0-12,12-30")
    found = (_span_or_all(name, part) for part in parts if part != "")
    return tuple(span for span in found if span is not None)


def _address(name: str, value: object) -> str:
    """``HOST:PORT``; port 0 lets the system choose one; empty where a setting allows it."""
    found = _text(name, value).strip()
    host, colon, port = found.rpartition(":")
    if found and not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise fail(name, value, "HOST:PORT")
    return found


def _path(name: str, value: object) -> str:
    return os.path.expanduser(_text(name, value))


text = Parser("TEXT", _text)
flag = Parser("true|false", _flag)
span_or_all = Parser("A-B", _span_or_all)
spans = Parser("A-B,B-C", _spans)
address = Parser("HOST:PORT", _address)
path = Parser("FILE", _path)


def shown(value: object) -> str:
    """A setting's value as somebody would write it."""
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    if value is None:
        return "all"
    return str(value).lower() if isinstance(value, bool) else str(value)
