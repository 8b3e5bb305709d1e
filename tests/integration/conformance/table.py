"""Writes the table of docs/api.md from the features: `python tests/integration/conformance/table.py [--write]`.

What the table says holds because `test_conformance.py` has one test for each way of each feature.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from conformance.features import CHAT, COMPLETIONS, REASONING, SAMPLING, STRUCTURED, TOOL_CALLS, Feature, _cached
from conformance.more_features import BATCHES, ERRORS, MESSAGES, RESPONSES, TOKENS

DOCUMENT = Path(__file__).parents[3] / "docs/api.md"
BEGIN, END = "<!-- conformance: begin -->\n", "<!-- conformance: end -->\n"

FEATURES: list[Feature] = [
    *TOKENS, *CHAT, *TOOL_CALLS, *STRUCTURED, *sorted(SAMPLING, key=lambda row: row.name.strip("`")), *REASONING,
    _cached(), *COMPLETIONS, *RESPONSES, *MESSAGES, *BATCHES, *ERRORS,
]  # fmt: skip


def render(features: list[Feature]) -> str:
    """One table per section, then the reasons of the holes."""
    reasons: list[str] = []
    lines = []
    for section, rows in groupby(features, key=lambda feature: feature.section):
        lines += [f"### {section}", "| feature | HTTP | gRPC |", "|---|---|---|"]
        lines += [f"| {row.name} | {_cell(row.http, reasons)} | {_cell(row.grpc, reasons)} |" for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"{number}. {reason}." for number, reason in enumerate(reasons, 1)), ""])


def _cell(way: object, reasons: list[str]) -> str:
    if not isinstance(way, str):
        return "yes"
    if way not in reasons:
        reasons.append(way)
    return f"no ({reasons.index(way) + 1})"


def replaced(document: str, table: str) -> str:
    """The document with this table between its marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table}{END}{after}"


if __name__ == "__main__":
    text = replaced(DOCUMENT.read_text(), render(FEATURES))
    if "--write" in sys.argv:
        DOCUMENT.write_text(text)
    else:
        print(text)
