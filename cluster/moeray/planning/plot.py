"""A plan as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from moeray.planning.plan import Plan
from moeray.planning.spec import Task

COLOURS: Mapping[str, str] = {"split": "#1b6ca8", "tensor": "#c8553d", "data": "#3a7d44"}
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 400, 60, 40


def plot(task: Task, plan: Plan) -> str:
    """SVG: each topology that can be taken, cost per million tokens over devices, both logarithmic."""
    taken = [each for each in plan.candidates if each.cost is not None]
    title = escape(f"{task.shape.name}: cost per million tokens over devices")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">{title}</text>',
    ]
    costs = [each.cost.mean for each in taken if each.cost] or [1.0]
    low, high = math.log(min(costs) / 1.1), math.log(max(costs) * 1.1)
    most = math.log(2 * max((each.topology.devices for each in taken), default=1))
    for each in taken:
        cost = each.cost.mean if each.cost else 1.0
        x = LEFT + (WIDTH - LEFT - 20) * math.log(each.topology.devices * 1.2) / most
        y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 40) * (math.log(cost) - low) / (high - low)
        colour = COLOURS[each.topology.kind]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.6">'
            f"<title>{escape(each.topology.name)}: {cost:.3f}</title></circle>"
        )
    for value in (math.exp(low) * 1.1, math.exp(high) / 1.1):
        y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 40) * (math.log(value) - low) / (high - low)
        parts.append(f'<text x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{value:.3g}</text>')
    for devices in sorted({each.topology.devices for each in taken if each.topology.devices.bit_count() == 1}):
        x = LEFT + (WIDTH - LEFT - 20) * math.log(devices * 1.2) / most
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="middle">{devices}</text>')
    for number, (kind, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{WIDTH - 90}" y="{40 + 14 * number}" fill="{colour}">{kind}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
