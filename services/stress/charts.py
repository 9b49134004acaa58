"""Small SVG charts: a line over time with marks, and a distribution. Pure; no library."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 900, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 34
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#7f7f7f")
TICKS = 5


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y), x ascending."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Flag:
    """A vertical mark at ``x``; ``loud`` ones are drawn stronger."""

    x: float
    text: str
    loud: bool = False


def over_time(title: str, unit: str, series: Sequence[Series], flags: Sequence[Flag] = ()) -> str:
    """Lines over seconds, with faults as vertical marks. A complete SVG document."""
    xs = [x for one in series for x, _y in one.points] + [flag.x for flag in flags]
    ys = [y for one in series for _x, y in one.points]
    frame = _Frame(0.0, max(xs, default=1.0) or 1.0, max(ys, default=1.0) or 1.0)
    parts = [_head(title), *frame.axes(unit, "s")]
    for flag in flags:
        x = frame.x(flag.x)
        colour, width = ("#d62728", 1.4) if flag.loud else ("#e9a3a3", 0.8)
        parts.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{colour}" '
            f'stroke-width="{width}"><title>{html.escape(flag.text)}</title></line>'
        )
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one.points)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{path}"/>'
        )
        if len(series) > 1:
            parts.append(_text(LEFT + 8 + 120 * index, TOP - 4, one.name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def distribution(title: str, unit: str, values: Sequence[float]) -> str:
    """How often each value or less was seen: an empirical distribution function."""
    ordered = sorted(values)
    points = [(value, (at + 1) / len(ordered)) for at, value in enumerate(ordered)]
    frame = _Frame(0.0, max(ordered, default=1.0) or 1.0, 1.0)
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in [(0.0, 0.0), *points])
    line = f'<polyline fill="none" stroke="{COLOURS[0]}" stroke-width="1.5" points="{path}"/>'
    return "\n".join([_head(title), *frame.axes("share", unit), line, "</svg>", ""])


@dataclass(frozen=True, slots=True)
class _Frame:
    x_min: float
    x_max: float
    y_max: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - value / self.y_max * (HEIGHT - TOP - BOTTOM)

    def axes(self, y_unit: str, x_unit: str) -> Iterable[str]:
        base = HEIGHT - BOTTOM
        yield f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}" stroke="#333"/>'
        yield f'<line x1="{LEFT}" y1="{TOP}" x2="{LEFT}" y2="{base}" stroke="#333"/>'
        for step in range(TICKS + 1):
            x_value = self.x_min + (self.x_max - self.x_min) * step / TICKS
            y_value = self.y_max * step / TICKS
            yield _text(self.x(x_value) - 8, base + 14, f"{x_value:.3g}")
            yield _text(6, self.y(y_value) + 4, f"{y_value:.3g}")
        yield _text(WIDTH - RIGHT - 24, HEIGHT - 4, x_unit)
        yield _text(6, TOP - 16, y_unit)


def _head(title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" '
        f'fill="white"/>{_text(LEFT + 200, 14, title, size=13)}'
    )


def _text(x: float, y: float, text: str, *, colour: str = "#333", size: int = 11) -> str:
    escaped = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}">{escaped}</text>'
