"""Tenants in a file: YAML, or JSON where its name ends so. Read while others replace it, changed under a lock.

A Kubernetes Secret is mounted as a symlink that is swapped: what counts is the file that the path leads to now.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from moeray.tenancy.errors import RegistryUnavailable, RosterError
from moeray.tenancy.roster import Roster, parse_roster, roster_to_data

RACY_S = 2.0
"""A file changed so shortly before it was read may change again without a trace in its times: it is read once more."""

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Signature = tuple[int, int, int, int]


class RosterFile:
    """See module docstring. Calls block; one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[Signature, bool] | None = None
        self._content = b""

    def read(self) -> Roster:
        """All tenants now.

        Raises:
            RegistryUnavailable: it cannot be read.
            RosterError: it is wrong.
        """
        self._content = self._load()
        return parse_roster(self._plain(self._content), source=str(self.path))

    def read_if_changed(self) -> Roster | None:
        """As `read`; None if there is nothing that was not read, or found wrong, before."""
        try:
            signature = _signature(self.path.stat())
        except OSError as error:
            raise RegistryUnavailable(f"{self.path}: cannot be read: {error.strerror}") from error
        if self._seen == (signature, False):
            return None
        before, self._content = self._content, self._load()
        if self._content == before:
            return None
        return parse_roster(self._plain(self._content), source=str(self.path))

    def edit(self, change: Callable[[Roster], Roster]) -> None:
        """Replace the file by a changed one; it is made if there is none. Others who edit wait.

        Raises:
            RegistryUnavailable: it cannot be read or written.
            RosterError: it is wrong; it is left as it is.
        """
        try:
            path = self.path.resolve()
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _lock(path.with_name(f"{path.name}.lock")):
                before = self.read() if path.exists() else Roster()
                _replace(path, self._text(change(before)))
        except OSError as error:
            raise RegistryUnavailable(f"{self.path}: cannot be changed: {error.strerror}") from error

    def _load(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                content = file.read()
        except OSError as error:
            raise RegistryUnavailable(f"{self.path}: cannot be read: {error.strerror}") from error
        self._seen = (_signature(stat), time.time() - stat.st_mtime < RACY_S)
        return content

    @property
    def _is_json(self) -> bool:
        return self.path.suffix == ".json"

    def _plain(self, content: bytes) -> object:
        try:
            text = content.decode()
            data = json.loads(text) if self._is_json else yaml.load(text, Loader)  # noqa: S506 a safe one
        except UnicodeDecodeError as error:
            raise RosterError(f"{self.path}: is not UTF-8 text (byte {error.start})") from error
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            kind = "JSON" if self._is_json else "YAML"
            raise RosterError(f"{self.path}: is not {kind}: {' '.join(str(error).split())}") from error
        return {} if data is None else data

    def _text(self, roster: Roster) -> str:
        data = roster_to_data(roster)
        return json.dumps(data, indent=1) + "\n" if self._is_json else yaml.safe_dump(data, sort_keys=False)


def _signature(stat: os.stat_result) -> Signature:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """A file of its own: the one that is locked must not be the one that is replaced."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    """Readers see the old or the new file, also after a power cut; only its owner may read it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
