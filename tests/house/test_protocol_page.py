"""docs/protocol.md says what the code says: state tables, counters, layouts, constants."""

from __future__ import annotations

import importlib.util
import re
import struct
from pathlib import Path

from coordinator import topics
from coordinator.route import RoutePhase
from stagemesh import frame, token
from stagemesh.errors import by_reason
from stagemesh.frame import FrameKind, RowStatus

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")


def script():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "generate_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_state_table_and_diagram_is_the_codes_own() -> None:
    tables = script()
    assert tables.rendered(PAGE) == PAGE
    assert {found[2] for found in tables.PIECE.finditer(PAGE)} == set(tables.pieces())


def test_who_may_send_what_is_said_of_every_state_of_a_route_with_its_epoch() -> None:
    rows = dict(
        re.findall(r"^\| (\w+) \| (.+) \|$", layout("| state | who may send"), re.MULTILINE)
    )
    assert list(rows) == [phase.value for phase in RoutePhase]
    for phase, said in rows.items():
        assert "*e*" in said, f"{phase}: at which epoch?"


def test_every_kind_and_every_row_status_is_explained() -> None:
    for kind in FrameKind:
        assert kind is FrameKind.UNSPECIFIED or f"| {kind.name} |" in PAGE
    stages = (ROOT / "docs" / "stages.md").read_text(encoding="utf-8")
    for status in RowStatus:
        assert status is RowStatus.OK or f"`{status.name}`" in stages


def test_reasons_on_the_page_are_constants_of_the_error_tree() -> None:
    known = set(by_reason()) | {status.name for status in RowStatus}
    named = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", PAGE))
    assert named <= known


def bytes_of(rows: str) -> int:
    """Bytes of the fixed rows of a layout table."""
    sizes = {"u8": 1, "u16": 2, "i16": 2, "u32": 4, "f32": 4, "u64": 8}
    total = 0
    for cell in re.findall(r"^\| ([^|]+) \|", rows, re.MULTILINE):
        count, _, unit = cell.strip().rpartition("×")
        if unit.isdecimal():
            total += int(unit)
        elif unit in sizes:
            total += int(count or 1) * sizes[unit]
    return total


def layout(title: str) -> str:
    """The first table behind a line that begins with ``title``."""
    behind = PAGE[PAGE.index(title) :]
    return behind[behind.index("|---") :].partition("\n\n")[0]


def test_the_layouts_are_as_long_as_the_codes() -> None:
    assert bytes_of(layout("All integers little-endian.")) == frame._FIXED.size
    row = layout("then each row:")
    assert bytes_of(row) == frame._ROW.size
    assert bytes_of(layout("A token chunk is packed as")) == token._layout(0, 0, 0).size
    assert bytes_of(layout("An event is packed as")) == topics._FIXED.size
    assert struct.calcsize("<III") == token._MARK.size
