"""Log files of a mesh's processes: the lines that name a request, with the time each was written.

Both formats of ``services.logs`` are read. A JSON line has its time; a line of text has only a time
of day, of the machine that wrote it, and gets the day on which it is nearest to the request. A line
without any time (of a traceback, of a library) has that of the line before it in its file.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from dataclasses import dataclass
from pathlib import Path

LINES_MAX = 2000
BYTES_MAX = 64 << 20
"""Of one file, from its end."""
_CLOCK = re.compile(r"(\d\d):(\d\d):(\d\d)\.(\d\d\d) ")
_DAY = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class LogLine:
    """``at_ns``: nanoseconds since 1970; 0 if nothing in the file before it has a time."""

    file: str
    line: int
    at_ns: int
    text: str

    @property
    def said(self) -> str:
        """Level and message, without what stands beside every line of a story anyway."""
        document = _as_json(self.text)
        if "message" not in document:
            return self.text
        return f"{document.get('level', '')} {document['message']}".strip()


def read_logs(folder: Path, names: set[str], near_ns: int) -> list[LogLine]:
    """Lines of ``*.log`` in ``folder`` that contain one of ``names``, in the order of time."""
    found: list[LogLine] = []
    for file in sorted(folder.glob("*.log")):
        last_ns = 0
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - BYTES_MAX))
            for number, raw in enumerate(stream, 1):
                line = raw.decode(errors="replace").rstrip()
                last_ns = time_of(line, near_ns) or last_ns
                if any(name in line for name in names):
                    found.append(LogLine(file.name, number, last_ns, line))
                    if len(found) >= LINES_MAX:
                        return _in_order(found)
    return _in_order(found)


def _in_order(lines: list[LogLine]) -> list[LogLine]:
    return sorted(lines, key=lambda one: one.at_ns)


def time_of(line: str, near_ns: int) -> int:
    """When a line was written, nanoseconds since 1970; 0 if it does not say."""
    if clock := _CLOCK.match(line):
        return _on_the_nearest_day([int(one) for one in clock.groups()], near_ns)
    try:
        moment = dt.datetime.fromisoformat(str(_as_json(line)["time"]))
    except (KeyError, ValueError):
        return 0
    return _nanoseconds(moment)


def _on_the_nearest_day(clock: list[int], near_ns: int) -> int:
    hour, minute, second, millisecond = clock
    near = dt.datetime.fromtimestamp(near_ns / 1e9, dt.UTC).astimezone()
    try:
        same = near.replace(hour=hour, minute=minute, second=second, microsecond=1000 * millisecond)
    except ValueError:
        return 0  # 99:99:99 is nobody's time
    days = (same - _DAY, same, same + _DAY)
    return _nanoseconds(min(days, key=lambda one: abs(one - near)))


def _nanoseconds(moment: dt.datetime) -> int:
    return round(moment.timestamp() * 1000) * 1_000_000


def _as_json(line: str) -> dict[str, object]:
    if not line.startswith("{"):
        return {}
    try:
        document = json.loads(line)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
