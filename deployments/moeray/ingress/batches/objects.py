"""What the batch API shows, with the names of OpenAI's objects; times in seconds since 1970."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
WINDOW_S = 24 * 3600
"""The one completion window that OpenAI's API has, "24h"."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file.

    Attributes:
        owner: the tenant; only it sees the file.
        purpose: batch (requests) or batch_output.
    """

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    owner: str = ""

    def shown(self) -> dict[str, Any]:
        """OpenAI's File object."""
        return {**_without_owner(self), "object": "file", "status": "processed"}


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """Why an input file is no batch."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch; each change of its status is a new value, written whole.

    Attributes:
        owner: the tenant that asked; its requests run as that tenant's.
    """

    id: str
    endpoint: str
    input_file_id: str
    created_at: int
    expires_at: int
    owner: str = ""
    status: Status = "validating"
    errors: tuple[LineError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    request_counts: Counts = Counts()
    metadata: dict[str, str] | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in ENDED

    def to(self, status: Status, now: float, **changes: Any) -> Batch:
        """The same batch in another status, with the time of that."""
        at = {} if status == "validating" else {f"{status}_at": int(now)}
        return msgspec.structs.replace(self, status=status, **at, **changes)

    def shown(self) -> dict[str, Any]:
        """OpenAI's Batch object."""
        errors = {"object": "list", "data": msgspec.to_builtins(self.errors)} if self.errors else None
        return {**_without_owner(self), "object": "batch", "completion_window": "24h", "errors": errors}


def _without_owner(value: msgspec.Struct) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(value)
    del shown["owner"]
    return shown
