"""A fixture for property tests: every way to alter one field of a frozen dataclass, nested ones
included, a single bit at a time."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest


def altered(value: Any, *, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """(path of the altered field, altered copy) for a dataclass; ``skip`` are field names left
    alone."""
    for item in fields(value):
        if item.name in skip:
            continue
        held = getattr(value, item.name)
        if held is not None and "None" in str(item.type):
            yield f"{item.name}=None", replace(value, **{item.name: None})
        for path, other in _variants(held, skip):
            yield f"{item.name}{path}", replace(value, **{item.name: other})


def _variants(value: Any, skip: frozenset[str]) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        for path, other in altered(value, skip=skip):
            yield f".{path}", other
    elif isinstance(value, bool):
        yield "", not value
    elif isinstance(value, enum.IntEnum):
        yield from (("", other) for other in type(value) if other is not value)
    elif isinstance(value, int):
        yield from ((f"^bit{bit}", value ^ (1 << bit)) for bit in range(64))
    elif isinstance(value, float):
        yield from _float_variants(value)
    elif isinstance(value, bytes):
        yield from _bytes_variants(value)
    elif isinstance(value, str):
        yield from (
            ("+", value + "x"),
            ("-", value[:-1] if value else "y"),
            ("~", value.upper() + "é"),
        )
    elif isinstance(value, tuple):
        yield from _tuple_variants(value, skip)


def _float_variants(value: float) -> Iterator[tuple[str, float]]:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    for bit in range(32):
        (other,) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))
        yield f"^bit{bit}", other


def _bytes_variants(value: bytes) -> Iterator[tuple[str, bytes]]:
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"^bit{bit}", bytes(damaged)
    yield "-", value[:-1]
    yield "+", value + b"\0"


def _tuple_variants(value: tuple[Any, ...], skip: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for index, item in enumerate(value):
        yield f"[drop {index}]", value[:index] + value[index + 1 :]
        yield f"[repeat {index}]", value[: index + 1] + value[index:]
        if index and value[index - 1] != item:
            swapped = (*value[: index - 1], item, value[index - 1], *value[index + 1 :])
            yield f"[swap {index}]", swapped
        for path, other in _variants(item, skip):
            yield f"[{index}]{path}", (*value[:index], other, *value[index + 1 :])


@pytest.fixture(name="altered")
def altered_fixture():
    """The function ``altered`` above."""
    return altered
