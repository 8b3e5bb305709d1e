"""Who used what: one record per request, without a word of what was said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

By = Literal["tenant", "model", "key", "day"]
GROUPINGS: tuple[By, ...] = ("tenant", "model", "key", "day")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request that has ended.

    Attributes:
        time: of its end, seconds since 1970.
        key_id: empty for tokens and certificates.
        protocol: http or grpc.
        cached_tokens: of the prompt, found in the cache.
        queue_s: until its first token was begun; ttft_s: until it was there; both 0 where none was.
        outcome: ok, or what became of it: aborted, or the name of the error's kind.
    """

    time: float
    request_id: str
    tenant: str
    key_id: str
    model: str
    protocol: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_s: float
    ttft_s: float
    total_s: float
    outcome: str

    def to_line(self) -> bytes:
        """One line of JSON, with its end."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


_TYPES: Mapping[str, type] = {
    each.name: {"float": float, "int": int}.get(str(each.type), str) for each in fields(UsageRecord)
}


@dataclass(frozen=True, slots=True)
class LostRecords:
    """So many records could not be kept by `time`: the log says itself where it has a hole."""

    time: float
    lost: int

    def to_line(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


def parse_line(line: bytes | str) -> UsageRecord | LostRecords | None:
    """None: the line is torn (the machine went down meanwhile) or another program's. Unknown fields are left out."""
    try:
        data = json.loads(line)
        if "lost" in data:
            return LostRecords(float(data["time"]), int(data["lost"]))
        return UsageRecord(**{name: _TYPES[name](data[name]) for name in _TYPES})
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


@dataclass(slots=True)
class UsageRow:
    """Sums of one group."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    total_s: float = 0.0

    def add(self, record: UsageRecord) -> None:
        self.requests += 1
        self.failed += record.outcome != "ok"
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        self.cached_tokens += record.cached_tokens
        self.total_s += record.total_s


@dataclass(slots=True)
class UsageReport:
    """Attributes: rows: by group. lost: records known to be missing. torn: lines that could not be read."""

    rows: dict[str, UsageRow]
    lost: int = 0
    torn: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"rows": {name: asdict(row) for name, row in self.rows.items()}, "lost": self.lost, "torn": self.torn}


def summarise(
    lines: Iterable[bytes | str], by: By, *, since: float = float("-inf"), until: float = float("inf")
) -> UsageReport:
    """Sums by group of the records with since <= time < until."""
    report = UsageReport({})
    for line in lines:
        if not line.strip():
            continue
        record = parse_line(line)
        if record is None:
            report.torn += 1
        elif not since <= record.time < until:
            continue
        elif isinstance(record, LostRecords):
            report.lost += record.lost
        else:
            report.rows.setdefault(_group(record, by), UsageRow()).add(record)
    report.rows = dict(sorted(report.rows.items()))
    return report


def _group(record: UsageRecord, by: By) -> str:
    if by == "day":
        return datetime.fromtimestamp(record.time, UTC).date().isoformat()
    return {"tenant": record.tenant, "model": record.model, "key": record.key_id or "-"}[by]
