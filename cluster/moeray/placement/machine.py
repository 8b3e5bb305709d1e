"""This process' machine as the kernel describes it, and pinning to a part of it. The only I/O of this package."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from time import sleep

from moeray.placement.cores import Cpu, Machine

_QUIET_ROUNDS, _ROUND_S = 3, 0.002


def has_core_for_each(num_threads: int) -> bool:
    """Whether so many threads would all run at full speed here. Call it before pinning."""
    return num_threads <= this_machine().num_usable


def this_machine(root: Path = Path("/")) -> Machine:
    """What this thread may run on. Call it before pinning: afterwards the machine looks as small as the share.

    Args:
        root: where `proc` and `sys` are.
    """
    allowed = sorted(os.sched_getaffinity(0))
    numa = _numa_nodes(root)
    cpus = tuple(Cpu(number, _physical_core(root, number), numa.get(number, 0)) for number in allowed)
    return Machine(_kernel(root), cpus, cpu_quota(root))


def pin_process(cpus: Iterable[int]) -> None:
    """Keep every thread of this process, and those that they start, on these CPUs.

    Memory follows: pages come from the NUMA node of the thread that touches them first, so pin before loading.
    """
    wanted = set(cpus)
    num_quiet = 0
    # A thread that was not pinned yet may be starting another one, which is not in the list yet.
    while num_quiet < _QUIET_ROUNDS:
        num_quiet += 1
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it ended
                if os.sched_getaffinity(int(task.name)) != wanted:
                    os.sched_setaffinity(int(task.name), wanted)
                    num_quiet = 0
        sleep(_ROUND_S)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that this process' control groups allow it; None is no limit. The tightest level counts."""
    quotas = []
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                quotas += [_quota_v2(level) for level in _levels(root / "sys/fs/cgroup", path)]
            elif "cpu" in controllers.split(","):
                for base in (controllers, "cpu"):
                    quotas += [_quota_v1(level) for level in _levels(root / "sys/fs/cgroup" / base, path)]
    return min((quota for quota in quotas if quota is not None), default=None)


def _levels(base: Path, path: str) -> list[Path]:
    """The control group's folder and those above; in a container its own is mounted at the base."""
    folder = base / path.strip("/")
    return [folder, *(parent for parent in folder.parents if parent == base or base in parent.parents)]


def _quota_v2(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no number
    return None


def _quota_v1(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None


def _kernel(root: Path) -> str:
    """Equal for all containers of a machine, other after each of its starts."""
    return (root / "proc/sys/kernel/random/boot_id").read_text().strip()


def _physical_core(root: Path, cpu: int) -> int:
    with suppress(OSError, ValueError):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        return min(cpu_list(siblings.read_text()))
    return cpu


def _numa_nodes(root: Path) -> dict[int, int]:
    """CPU -> NUMA node; empty where the kernel knows none."""
    nodes: dict[int, int] = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        with suppress(OSError, ValueError):
            nodes |= dict.fromkeys(cpu_list((folder / "cpulist").read_text()), int(folder.name.removeprefix("node")))
    return nodes


def cpu_list(text: str) -> list[int]:
    """The kernel's way to write sets of CPUs, `0-3,8`.

    Raises:
        ValueError: it is not one.
    """
    numbers: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    return numbers
