"""Files and batches in one directory, which the ingresses of a cluster may share.

    files/ID.json, files/ID.data        a file's description and content
    batches/ID.json                     a batch; once made, only the ingress that runs it writes it
    batches/ID.cancel                   it is to end early
    batches/ID.lock                     held (flock) by the ingress that runs the batch
    batches/ID.output, ID.errors        its answers so far, one JSON object per line

What is described is there: content is written first, then its description, each under another name and renamed. A
lock's holder may die at any instant; the kernel lets the lock go, and what was answered stays.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from moeray.ingress.batches.objects import Batch, StoredFile

_Stored = TypeVar("_Stored", Batch, StoredFile)
COPY_BYTES = 1 << 20


class NotStored(LookupError):
    """Nothing of this id is there for this owner."""


class TooLarge(ValueError):
    """More bytes than a file may have."""


class BatchStore:
    """See module docstring. Methods block for as long as the disk does."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError: the directory cannot be made."""
        self._files, self._batches = directory / "files", directory / "batches"
        for folder in (self._files, self._batches):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    # ---- files

    def add_file(
        self,
        content: BinaryIO,
        *,
        filename: str,
        purpose: str,
        owner: str,
        max_bytes: int | None = None,
        max_stored_bytes: int | None = None,
    ) -> StoredFile:
        """Copy a file in.

        Args:
            max_bytes: of this file; max_stored_bytes: of all files of the owner.
        Raises:
            TooLarge: it has more than may be; nothing stays.
            OSError: no room, for example; nothing stays.
        """
        if max_stored_bytes is not None:
            left = max(0, max_stored_bytes - sum(stored.bytes for stored in self.files(owner)))
            if max_bytes is None or left < max_bytes:
                max_bytes = left
        id = _new_id("file")
        data = self._files / f"{id}.data"
        try:
            num_bytes = _copy(content, data, max_bytes)
        except BaseException:
            data.unlink(missing_ok=True)
            raise
        stored = StoredFile(
            id=id, bytes=num_bytes, created_at=int(time.time()), filename=filename, purpose=purpose, owner=owner
        )
        _write(self._files / f"{id}.json", stored)
        return stored

    def file(self, id: str, owner: str) -> StoredFile:
        """Raises NotStored."""
        return _owned(_read(self._files, id, StoredFile), id, owner)

    def files(self, owner: str) -> list[StoredFile]:
        """The newest first."""
        return _newest_first(self._files, StoredFile, owner)

    def content(self, id: str) -> Path:
        """Where a file's content is."""
        return self._files / f"{id}.data"

    def delete_file(self, id: str, owner: str) -> None:
        """Raises NotStored."""
        self.file(id, owner)
        (self._files / f"{id}.json").unlink(missing_ok=True)
        self.content(id).unlink(missing_ok=True)

    # ---- batches

    def put(self, batch: Batch) -> Batch:
        """Write a new batch, or one that has changed."""
        _write(self._batches / f"{batch.id}.json", batch)
        return batch

    def batch(self, id: str, owner: str | None = None) -> Batch:
        """Args: owner: None is any. Raises NotStored."""
        return self._as_cancelled(_owned(_read(self._batches, id, Batch), id, owner))

    def batches(self, owner: str | None = None) -> list[Batch]:
        """The newest first."""
        return [self._as_cancelled(batch) for batch in _newest_first(self._batches, Batch, owner)]

    def cancel(self, id: str) -> None:
        """It is to end early; whoever runs it sees that."""
        self.part(id, "cancel").touch()

    def _as_cancelled(self, batch: Batch) -> Batch:
        """With what `cancel` said, as long as that is not carried out."""
        try:
            at = self.part(batch.id, "cancel").stat().st_mtime
        except FileNotFoundError:
            return batch
        return batch if batch.has_ended else batch.to("cancelling", at)

    def part(self, id: str, kind: str) -> Path:
        """A file of the batch: output or errors, its answers so far, or another of the module docstring's."""
        return self._batches / f"{id}.{kind}"

    @contextmanager
    def claimed(self, id: str) -> Iterator[bool]:
        """Whether this process may run the batch, for as long as the block lasts: no other one does."""
        with (self._batches / f"{id}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield True

    def remove_expired(self, older_than: float) -> None:
        """Delete what was made before that time: files, and batches that have ended."""
        for stored in _newest_first(self._files, StoredFile, None):
            if stored.created_at < older_than:
                with suppress(NotStored):
                    self.delete_file(stored.id, stored.owner)
        for batch in self.batches():
            if batch.has_ended and batch.created_at < older_than:
                for kind in ("json", "lock", "cancel", "output", "errors"):
                    self.part(batch.id, kind).unlink(missing_ok=True)


def new_batch_id() -> str:
    return _new_id("batch")


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def _copy(content: BinaryIO, path: Path, max_bytes: int | None) -> int:
    num_bytes = 0
    with path.open("xb") as out:
        while chunk := content.read(COPY_BYTES):
            num_bytes += len(chunk)
            if max_bytes is not None and num_bytes > max_bytes:
                raise TooLarge(f"there is room for {max_bytes} bytes")
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return num_bytes


def _write(path: Path, value: Batch | StoredFile) -> None:
    temporary = path.with_suffix(f".{secrets.token_hex(4)}")
    with temporary.open("xb") as out:
        out.write(msgspec.json.encode(value))
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _read(folder: Path, id: str, kind: type[_Stored]) -> _Stored:
    if not id.replace("-", "").isalnum():  # an id is part of a path
        raise NotStored(id)
    try:
        return msgspec.json.decode((folder / f"{id}.json").read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        raise NotStored(id) from error


def _owned(stored: _Stored, id: str, owner: str | None) -> _Stored:
    if owner is not None and stored.owner != owner:
        raise NotStored(id)
    return stored


def _newest_first(folder: Path, kind: type[_Stored], owner: str | None) -> list[_Stored]:
    found = []
    for path in folder.glob("*.json"):
        with suppress(NotStored):  # deleted meanwhile
            found.append(_read(folder, path.stem, kind))
    mine = [each for each in found if owner is None or each.owner == owner]
    return sorted(mine, key=lambda each: (each.created_at, each.id), reverse=True)
