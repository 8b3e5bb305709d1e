"""What `up` leaves for the other commands: one small JSON file per user, or per MOERAY_STATE_DIR."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from moeray.cli.errors import CommandError


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster on embedded Ray; one on foreign Ray is found through RAY_ADDRESS and leaves no file.

    Attributes:
        ray_address: of its Ray head, host:port.
        supervisor_pid: the process that owns the embedded Ray.
        supervisor_started: kernel start time of that process (clock ticks), so that a reused pid is not taken for it.
        drain_s: `ingress.drain_s`, what `moeray down` leaves the streams.
    """

    ray_address: str
    supervisor_pid: int
    supervisor_started: int
    http: str
    grpc: str
    drain_s: float = 0.0

    @property
    def is_alive(self) -> bool:
        """Whether its supervisor still runs."""
        return started_ticks(self.supervisor_pid) == self.supervisor_started


def state_dir() -> Path:
    """Folder of the state file and the supervisor's log; made with mode 0700."""
    base = os.environ.get("MOERAY_STATE_DIR")
    path = Path(base) if base else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "moeray"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def write(cluster: RunningCluster) -> None:
    """Replace the state file at once: a reader sees the old or the new one."""
    path = _path()
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(cluster), indent=1))
    temporary.replace(path)


def read() -> RunningCluster | None:
    """The running cluster, or None; the file of a cluster whose supervisor died is removed."""
    try:
        cluster = RunningCluster(**json.loads(_path().read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CommandError(f"{_path()} is damaged ({error}); remove it") from error
    if cluster.is_alive:
        return cluster
    remove()
    return None


def remove() -> None:
    _path().unlink(missing_ok=True)


def log_path() -> Path:
    return state_dir() / "up.log"


def started_ticks(pid: int) -> int | None:
    """Kernel start time of a process in clock ticks since boot; None if there is none (or only a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _path() -> Path:
    return state_dir() / "cluster.json"
