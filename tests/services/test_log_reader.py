"""Lines of log files that name a request, each at the time it was written."""

from __future__ import annotations

import datetime as dt
import json
import logging
from pathlib import Path

import pytest

from services.log_reader import LogLine, read_logs, time_of
from services.logs import JsonFormatter, TextFormatter

SECOND = 1_000_000_000
NEAR = 1_790_000_000 * SECOND + 123_000_000


def record(at_ns: int) -> logging.LogRecord:
    one = logging.LogRecord("x", logging.WARNING, "x.py", 1, "stage is late", (), None)
    one.created, one.msecs = at_ns / 1e9, at_ns // 1_000_000 % 1000
    return one


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
@pytest.mark.parametrize("apart_s", [0, 3, -3, 40_000, -40_000])
def test_both_formats_are_read_to_the_millisecond_also_over_midnight(
    formatter: logging.Formatter, apart_s: int
) -> None:
    written = NEAR + apart_s * SECOND
    assert time_of(formatter.format(record(written)), NEAR) == written


@pytest.mark.parametrize(
    "line", ["", "Traceback", "99:99:99.999 no", '{"time": 3}', '{"time": "soon"}', "{", "[1]"]
)
def test_a_line_without_a_time_has_none(line: str) -> None:
    assert time_of(line, NEAR) == 0


def test_only_lines_that_name_it_are_read_and_in_the_order_of_time(tmp_path: Path) -> None:
    def line(apart_s: int, text: str) -> str:
        moment = dt.datetime.fromtimestamp(NEAR / 1e9 + apart_s, dt.UTC)
        return json.dumps({"time": moment.isoformat(), "level": "info", "message": text})

    (tmp_path / "a.log").write_text(
        "\n".join(["early trace=ff", line(2, "trace=ff second"), "y", "  trace=ff behind it"])
    )
    (tmp_path / "b.log").write_text(line(1, "trace=ff first") + "\n" + line(3, "another"))
    (tmp_path / "c.txt").write_text("trace=ff")
    found = read_logs(tmp_path, {"ff"}, NEAR)
    assert [(one.file, one.line, one.said) for one in found] == [
        ("a.log", 1, "early trace=ff"),
        ("b.log", 1, "info trace=ff first"),
        ("a.log", 2, "info trace=ff second"),
        ("a.log", 4, "  trace=ff behind it"),
    ]
    assert [one.at_ns for one in found] == [
        0, NEAR + SECOND, NEAR + 2 * SECOND, NEAR + 2 * SECOND
    ]  # fmt: skip


def test_what_is_no_line_of_ours_is_told_as_it_is() -> None:
    assert LogLine("a.log", 1, 0, '{"level": "info"}').said == '{"level": "info"}'
