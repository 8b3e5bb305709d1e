"""What a run found: as text, and as one HTML file without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

ROWS = (
    ("requests/s", "requests_per_s", "{:.2f}"), ("goodput, requests/s", "goodput_per_s", "{:.2f}"),
    ("answer tokens/s", "answer_tokens_per_s", "{:.0f}"), ("all tokens/s", "total_tokens_per_s", "{:.0f}"),
)  # fmt: skip
TIMES = (
    ("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2e_ms"),
    ("TTFT from when it was due", "ttft_from_due_ms"), ("E2E from when it was due", "e2e_from_due_ms"),
)  # fmt: skip

Found = Mapping[str, Any]
"""As `outcome.summary` gives it."""


def text(named: Sequence[tuple[str, Found]]) -> str:
    """One block per target; with two, the second over the first."""
    blocks = [_block(name, found) for name, found in named]
    if len(named) == 2:
        blocks.append(_ratios(*named))
    return "\n\n".join(blocks)


def _block(name: str, found: Found) -> str:
    lines = [f"{name}: {found['completed']} of {found['requests']} requests in {found['duration_s']:.1f} s"]
    lines += [f"  {kind}: {count}" for kind, count in found["errors"].items()]
    lines += [f"  {label:26} {form.format(found[key])}" for label, key, form in ROWS]
    lines.append(f"  {'ms':26} {'mean':>9} {'p50':>9} {'p95':>9} {'p99':>9}")
    lines += [f"  {label:26} {_times(found[key])}" for label, key in TIMES]
    return "\n".join(lines)


def _times(spread: Mapping[str, float | None]) -> str:
    return " ".join(f"{'-' if value is None else f'{value:.1f}':>9}" for value in spread.values())


def _ratios(first: tuple[str, Found], second: tuple[str, Found]) -> str:
    lines = [f"{second[0]} over {first[0]}:"]
    for label, key, _ in ROWS:
        if first[1][key]:
            lines.append(f"  {label:26} {second[1][key] / first[1][key]:.3f}")
    for label, key in TIMES[:4]:
        pairs = [(name, first[1][key][name], second[1][key][name]) for name in ("mean", "p50", "p95", "p99")]
        known = [f"{name} {b / a:.3f}" for name, a, b in pairs if a and b is not None]
        if known:
            lines.append(f"  {label:26} {'  '.join(known)}")
    return "\n".join(lines)


WIDTH, HEIGHT = 560, 180
COLOURS = ("#1b6ca8", "#c8553d")


def html(named: Sequence[tuple[str, Found, Sequence[tuple[float, float]]]], title: str) -> str:
    """The text, and each request's time to first token over the run's seconds."""
    plain = escape(text([(name, found) for name, found, _ in named]))
    points = [point for *_, own in named for point in own]
    longest = max((at for at, _ in points), default=1.0) or 1.0
    most = max((value for _, value in points), default=1.0) or 1.0
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{COLOURS[number % 2]}" fill-opacity="0.6"/>'
        for number, (*_, own) in enumerate(named)
        for at, value in own
        for x, y in [(50 + at / longest * (WIDTH - 70), HEIGHT - 30 - value / most * (HEIGHT - 50))]
    ]
    labels = [
        f'<text x="{50 + 160 * number}" y="14" fill="{COLOURS[number % 2]}">{escape(name)}</text>'
        for number, (name, *_) in enumerate(named)
    ]
    axes = f'<text x="2" y="24">{most:.0f} ms</text><text x="{WIDTH - 60}" y="{HEIGHT - 8}">{longest:.0f} s</text>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="time to first token of each request" '
        f'width="{WIDTH}" height="{HEIGHT}" font-size="11">{"".join(labels)}{axes}{"".join(dots)}</svg>'
    )
    style = "body{font-family:sans-serif;margin:2em;color-scheme:light dark}pre{overflow-x:auto}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
        f"<h1>{escape(title)}</h1><pre>{plain}</pre><h2>Time to first token, ms over s</h2>{svg}</html>\n"
    )
