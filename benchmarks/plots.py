"""Plots of the results as SVG, written by hand: a browser shows them and no package is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from records import Record

from moeray.autoscaling.simulator import Outcome

WIDTH, HEIGHT = 340, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 36
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8a5a9e", "#d9a441", "#555555", "#2a9d8f", "#b5179e")

Line = tuple[str, list[tuple[float, float]]]
"""(name, points)"""


def hop(found: Sequence[Record], file: Path) -> None:
    """One panel per width: p50 over the batch, every transport and floor a line; both axes logarithmic."""
    panels = []
    for hidden in sorted({each["hidden"] for each in found}):
        lines = _lines([each for each in found if each["hidden"] == hidden], "transport", "p50_us")
        panels.append(_panel(f"hidden {hidden}: p50 of a layer call, us", lines))
    _write(file, panels)


def step(found: Sequence[Record], file: Path) -> None:
    """One panel per model: throughput against the monolithic engine over the batch."""
    panels = []
    for model in dict.fromkeys(each["model"] for each in found):
        lines = _lines([each for each in found if each["model"] == model], "topology", "throughput_ratio")
        panels.append(_panel(f"{model}: throughput / monolithic", lines))
    _write(file, panels)


def over_time(title: str, ours: Outcome, theirs: Outcome, file: Path) -> None:
    """Processes over the hours of a trace, of two policies; linear."""
    wide, end_s = 2 * WIDTH, float(ours.at_s[-1])
    most = max(float((each.shards + each.groups).max()) for each in (ours, theirs))

    def points(outcome: Outcome) -> str:
        every = max(1, len(outcome.at_s) // wide)
        across = LEFT + outcome.at_s[::every] / end_s * (wide - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (outcome.shards + outcome.groups)[::every] / most * (HEIGHT - TOP - BOTTOM)
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}: shards and groups over hours</text>']
    for share in (0.0, 0.5, 1.0):
        y = HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{wide - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{share * most:.0f}</text>')
        x = LEFT + share * (wide - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{share * end_s / 3600:.1f}</text>')
    for number, (name, outcome) in enumerate((("goals", ours), ("queue length", theirs))):
        parts.append(
            f'<polyline points="{points(outcome)}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.5"/>'
            f'<text x="{LEFT + 6}" y="{TOP + 10 + 12 * number}" fill="{COLOURS[number]}">{name}</text>'
        )
    _write(file, ["\n".join(parts)], wide)


def _lines(found: Iterable[Record], name: str, value: str) -> list[Line]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for each in found:
        lines.setdefault(each[name], []).append((each["batch"], each[value]))
    return [(name, sorted(points)) for name, points in lines.items()]


def _panel(title: str, lines: Sequence[Line]) -> str:
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    low, high = _decade(min(ys), math.floor), _decade(max(ys), math.ceil)
    if max(ys) / min(ys) < 10:
        low, high = min(0.5, min(ys) * 0.9), max(ys) * 1.1

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / min(xs)) / (math.log(max(xs) / min(xs)) or 1.0)
        up = math.log(y / low) / math.log(high / low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for tick in _ticks(low, high):
        x0, y = place(min(xs), tick)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 - 5}" y="{y + 3:.1f}" text-anchor="end">{tick:g}</text>')
    below = HEIGHT - BOTTOM + 14
    parts += [
        f'<text x="{place(x, low)[0]:.1f}" y="{below}" text-anchor="middle">{x:g}</text>' for x in sorted(set(xs))
    ]
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">batch</text>')
    for number, (name, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{TOP + 10 + 12 * number}" fill="{colour}">{escape(name)}</text>')
    return "\n".join(parts)


def _decade(value: float, rounding: Callable[[float], int]) -> float:
    return 10.0 ** rounding(math.log10(value))


def _ticks(low: float, high: float) -> list[float]:
    candidates = [
        base * 10**exponent
        for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for base in ((1,) if high / low >= 10 else (1, 2, 3, 4, 5, 6, 7, 8, 9))
    ]
    return [tick for tick in candidates if low <= tick <= high]


def _write(file: Path, panels: Sequence[str], width: int = WIDTH) -> None:
    groups = "\n".join(f'<g transform="translate({width * i},0)">\n{panel}\n</g>' for i, panel in enumerate(panels))
    size = f'width="{width * len(panels)}" height="{HEIGHT}"'
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="10">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{groups}\n</svg>\n',
        encoding="utf-8",
    )
