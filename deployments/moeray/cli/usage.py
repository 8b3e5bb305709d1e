"""`moeray usage`: who used how much, from the usage records. Needs no running cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moeray.cli.errors import CommandError
from moeray.cli.tenancy_store import placed, usage_lines
from moeray.config import load_config
from moeray.tenancy import By, UsageReport, summarise

HEAD = ("requests", "failed", "prompt", "cached", "completion", "mean s")


def usage(file: Path | None, *, by: By, since: float | None, until: float | None, as_json: bool) -> int:
    """Print sums by group.

    Args:
        since, until: seconds since 1970; from the beginning, and to the end, where None.
    Raises:
        CommandError: the records cannot be read (1), or the times are the wrong way round (2).
    """
    first, last = float("-inf") if since is None else since, float("inf") if until is None else until
    if first >= last:
        raise CommandError("--since is not before --until", status=2)
    try:
        report = summarise(usage_lines(placed(load_config(file)), first), by, since=first, until=last)
    except OSError as error:
        raise CommandError(f"usage records cannot be read: {error}") from error
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print("\n".join(_table(report, by)))
    for number, what in ((report.lost, "records could not be kept"), (report.torn, "lines cannot be read")):
        if number:
            print(f"moeray: {number} {what}: the sums are too low", file=sys.stderr)
    return 0


def _table(report: UsageReport, by: By) -> list[str]:
    width = max(len(by), *map(len, report.rows), 1) if report.rows else len(by)
    lines = [f"{by:{width}}" + "".join(f"  {name:>12}" for name in HEAD)]
    for name, row in report.rows.items():
        numbers = (row.requests, row.failed, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        mean = f"  {row.total_s / row.requests:>12.3f}"
        lines.append(f"{name:{width}}" + "".join(f"  {number:>12}" for number in numbers) + mean)
    return lines
