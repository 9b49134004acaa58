"""A run as pictures: SVG written by hand, no library."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.bench.report import figure, title_of

COLOURS = ("#24527a", "#7fa8c9", "#b8562f", "#e0a184", "#7f7f7f")


def plot(document: Mapping[str, Any], directory: Path) -> list[Path]:
    """Ratios, samples, and one picture a comparison, written into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    results = document["results"]
    pictures = {
        "ratios": _bars([one for one in results if one["ratio"] is not None]),
        "samples": _dots([one for one in results if one.get("samples")]),
    }
    for index, one in enumerate(document.get("side_by_side", ())):
        pictures[f"side-by-side-{index + 1}"] = _beside(one)
    written = []
    for name, text in pictures.items():
        path = directory / f"{name}.svg"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


_WIDTH, _LABEL, _ROW_HEIGHT = 860, 360, 26


def _svg(rows: int, body: Sequence[str]) -> str:
    height = rows * _ROW_HEIGHT + 50
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">'
    )
    paper = f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, paper, *body, "</svg>"]) + "\n"


def _label(name: str, y: int) -> str:
    return f'<text x="10" y="{y}">{html.escape(title_of(name))}</text>'


def _bars(results: Sequence[Mapping[str, Any]]) -> str:
    """One bar per ratio; the line is equality with mlx-lm."""
    top = max([1.5, *(one["ratio"] for one in results)])
    scale = (_WIDTH - _LABEL - 70) / top
    body = ['<text x="10" y="24">ours ÷ baseline (line: equal)</text>']
    for index, one in enumerate(results):
        y = 40 + index * _ROW_HEIGHT
        better = (one["ratio"] >= 1) is one["higher_is_better"]
        colour = "#3a7d44" if better else "#b8562f"
        width = one["ratio"] * scale
        body += [
            _label(one["name"], y + 14),
            f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>',
            f'<text x="{_LABEL + width + 6:.1f}" y="{y + 14}">{figure(one["ratio"])}</text>',
        ]
    equal = _LABEL + scale
    bottom = 40 + len(results) * _ROW_HEIGHT
    body.append(f'<path d="M{equal:.1f} 34V{bottom}" stroke="black" stroke-dasharray="4 3"/>')
    return _svg(len(results), body)


def _dots(results: Sequence[Mapping[str, Any]]) -> str:
    """Every sample, relative to the median of ours: how much a figure moved within the run. Those
    of thousands that lie on one another are one dot."""
    body = ['<text x="10" y="24">samples ÷ median of ours (hollow: baseline)</text>']
    scale = (_WIDTH - _LABEL - 40) / 2.0
    for index, one in enumerate(results):
        y = 40 + index * _ROW_HEIGHT + 9
        body.append(_label(one["name"], y + 5))
        for side, fill in (("ours", "#24527a"), ("baseline", "none")):
            shares = (
                min(2.0, value / one["ours"]) if one["ours"] else 0.0
                for value in one["samples"].get(side, ())
            )
            body += [
                f'<circle cx="{x}" cy="{y}" r="4" fill="{fill}" stroke="#24527a"/>'
                for x in sorted({round(_LABEL + max(0.0, share) * scale) for share in shares})
            ]
    return _svg(len(results), body)


def _beside(comparison: Mapping[str, Any]) -> str:
    """For every task a bar a side, as long as its share of the fastest side's figure."""
    body = [f'<text x="10" y="24">{html.escape(comparison["label"])}</text>']
    scale = _WIDTH - _LABEL - 90
    line = 0
    for row in comparison["rows"]:
        top = max(row["values"].values()) or 1.0
        for index, side in enumerate(comparison["sides"]):
            y = 40 + line * _ROW_HEIGHT
            value = row["values"][side]
            width = value / top * scale
            text = html.escape(f"{row['title']}: {side}")
            colour = COLOURS[index % len(COLOURS)]
            body += [
                f'<text x="10" y="{y + 14}">{text}</text>',
                f'<rect x="{_LABEL}" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>',
                f'<text x="{_LABEL + width + 6:.1f}" y="{y + 14}">{figure(value)}</text>',
            ]
            line += 1
        line += 1
    return _svg(line, body)
