"""Where a chat's time goes between client and engine: microseconds by layer, from what `traced.py` noted."""

from __future__ import annotations

import json
import statistics
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from callers import Answer
from records import Record
from traced import POINTS, QUIET_S

CLIENT = "HTTP out"
FROM_ENGINE = "engine and its IPC"
"""The layers after this one are gone through for every token."""
_NAMES = [name for name, *_ in POINTS]

Marks = dict[str, list[float]]


def read_marks(folder: Path, titles: Iterable[str], since: float) -> Marks:
    """What these processes noted from this time on, by layer; waits until they have written it."""
    marks: Marks = {name: [] for name in _NAMES}
    for title in titles:
        file = folder / f"{title}.json"
        time.sleep(3 * QUIET_S)
        for name, at in json.loads(file.read_text()):
            if at >= since:
                marks[name].append(at)
    return {name: sorted(times) for name, times in marks.items()}


def layers(door: str, answers: Sequence[Answer], marks: Marks) -> Record:
    """Medians in microseconds: of the way to the first token, and of that from the engine of each later one."""
    firsts = [_way(answer.began, answer.first, marks) for answer in answers]
    later = [gap for answer in answers for gap in _later(answer, marks)]
    return {
        "door": door,
        "first_token_us": _medians([each for each in firsts if each is not None]),
        "later_token_us": _medians(later),
    }


def _way(began: float, ended: float, marks: Marks) -> dict[str, float] | None:
    """Layer -> seconds, of one chat; None where a point was not passed before the end."""
    found, at = {}, began
    for name in _NAMES:
        if not marks[name]:
            continue  # this door has no such layer
        reached = _next(marks[name], at)
        if reached is None or reached > ended:
            return None
        found[name], at = reached - at, reached
    return {**found, CLIENT: ended - at}


def _later(answer: Answer, marks: Marks) -> Iterable[dict[str, float]]:
    """From each step of the engine to the bytes that leave for the client, where the step's token is shown at once."""
    steps = marks[FROM_ENGINE]
    begin = bisect_left(steps, answer.first)
    for step, next_step in pairwise(steps[begin : begin + answer.tokens - 1]):
        found, at = {}, step
        for name in _NAMES[_NAMES.index(FROM_ENGINE) + 1 :]:
            if marks[name]:
                reached = _next(marks[name], at)
                if reached is None or reached > next_step:
                    break
                found[name], at = reached - at, reached
        else:
            yield found


def _next(times: Sequence[float], at: float) -> float | None:
    index = bisect_left(times, at)
    return times[index] if index < len(times) else None


def _medians(ways: Sequence[dict[str, float]]) -> dict[str, int]:
    names = [name for name in [*_NAMES, CLIENT] if any(name in way for way in ways)]
    found = {name: round(1e6 * statistics.median(way[name] for way in ways if name in way)) for name in names}
    found["all"] = round(1e6 * statistics.median(sum(way.values()) for way in ways)) if ways else 0
    return found
