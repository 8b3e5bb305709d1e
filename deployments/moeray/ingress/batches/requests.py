"""An input file: one request per line, checked whole before the first one runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from moeray.ingress.batches.objects import LineError
from moeray.ingress.body_shape import json_excess

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_ERRORS = 20


class BatchLine(msgspec.Struct, frozen=True):
    """One request."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class NotABatch(ValueError):
    """The file's errors, the first MAX_ERRORS of them."""

    def __init__(self, errors: list[LineError]) -> None:
        super().__init__(errors[0].message)
        self.errors = tuple(errors)


def lines_of(path: Path) -> Iterator[BatchLine]:
    """Of a file that was checked."""
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield msgspec.json.decode(line, type=BatchLine)


def check(path: Path, endpoint: str, max_requests: int, max_body_bytes: int) -> int:
    """How many requests the file holds.

    Args:
        max_body_bytes: of a line: it passes no other door.
    Raises:
        NotABatch: a line is no request for this endpoint, an id comes twice, there is none, or there are too many.
    """
    errors: list[LineError] = []
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(max_body_bytes + 1), b""), 1):
            if len(line) > max_body_bytes:
                message = f"a request may have {max_body_bytes} bytes (ingress.max_body_bytes)"
                raise NotABatch([*errors, LineError(code="request_too_large", message=message, line=number)])
            if line.strip() and len(errors) < MAX_ERRORS:
                error = _fault(line, endpoint, seen)
                if error is not None:
                    errors.append(msgspec.structs.replace(error, line=number))
            if len(seen) > max_requests:
                message = f"a batch may hold {max_requests} requests"
                raise NotABatch([LineError(code="too_many_requests", message=message, line=number)])
    if not errors and not seen:
        errors.append(LineError(code="empty_file", message="the input file holds no request"))
    if errors:
        raise NotABatch(errors)
    return len(seen)


def _fault(line: bytes, endpoint: str, seen: set[str]) -> LineError | None:
    if excess := json_excess(line):
        return LineError(code="invalid_json_line", message=f"the line {excess}")
    try:
        request = msgspec.json.decode(line, type=BatchLine)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return LineError(code="invalid_json_line", message=str(error))
    if request.method != "POST":
        return LineError(code="invalid_method", message=f"method is {request.method!r}, must be POST", param="method")
    if request.url != endpoint:
        message = f"url is {request.url!r}, the batch's endpoint is {endpoint}"
        return LineError(code="mismatched_endpoint", message=message, param="url")
    if request.custom_id in seen:
        message = f"custom_id {request.custom_id!r} comes twice"
        return LineError(code="duplicate_custom_id", message=message, param="custom_id")
    if request.body.get("stream"):
        return LineError(code="invalid_request", message="a batch has no streams", param="body.stream")
    seen.add(request.custom_id)
    return None
