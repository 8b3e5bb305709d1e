"""What a benchmark leaves behind: a list of records, and beside it where the numbers come from.

`--json FILE` gets the list alone, because that is what a tool reads; machine, commit, command and noise lie beside it
in FILE with `.facts.json` for its suffix.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


def write(file: Path, records: Sequence[Record], **facts: Any) -> None:
    """Write the records, and the facts beside them.

    Args:
        facts: what this run knows about itself, beside what `where_from` finds out.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(" " + json.dumps(record) for record in records)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    facts_file(file).write_text(json.dumps({**where_from(), **facts}, indent=1) + "\n", encoding="utf-8")


def facts_file(file: Path) -> Path:
    return file.with_suffix(".facts.json")


def read(file: Path) -> tuple[list[Record], dict[str, Any]]:
    """Records and facts as `write` left them."""
    beside = facts_file(file)
    return json.loads(file.read_text(encoding="utf-8")), json.loads(beside.read_text(encoding="utf-8"))


def where_from() -> dict[str, Any]:
    """Machine, commit, command and time; `load`: runnable processes of the last minute, before this one's are felt."""
    return {
        "machine": f"{_cpu_name()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain") else ""),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 2),
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """A median with its noise."""
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
