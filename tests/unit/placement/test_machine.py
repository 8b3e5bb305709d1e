"""The machine is read as the kernel describes it, and pinning leaves no thread behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeray.placement.machine import cpu_list, cpu_quota, this_machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cpu_lists_are_read_as_the_kernel_writes_them() -> None:
    assert cpu_list("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11]
    assert cpu_list("\n") == []


def test_siblings_numa_nodes_and_the_cpuset_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    root = write(tmp_path, {
        "proc/sys/kernel/random/boot_id": "one-boot\n",
        **{cpu.format(number): f"{number % 4},{number % 4 + 4}\n" for number in range(8)},
        "sys/devices/system/node/node0/cpulist": "0-1,4-5\n",
        "sys/devices/system/node/node1/cpulist": "2-3,6-7\n",
    })  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2, 5, 6, 7})
    found = this_machine(root)
    assert [(c.number, c.core, c.numa_node) for c in found.cpus] == [
        (1, 1, 0), (2, 2, 1), (5, 1, 0), (6, 2, 1), (7, 3, 1),
    ]  # fmt: skip
    assert (found.id, found.quota, found.num_usable) == ("one-boot", None, 3)


def test_without_topology_files_every_cpu_is_a_core_of_one_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4})
    found = this_machine(write(tmp_path, {"proc/sys/kernel/random/boot_id": "b"}))
    assert [(c.number, c.core, c.numa_node) for c in found.cpus] == [(3, 3, 0), (4, 4, 0)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max":
          "400000 100000"}, 3.0),
        # a container's own group is mounted at the base, while its path is the host's
        ({"proc/self/cgroup": "0::/kubepods/pod1\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n", "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "800000",
          "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 8.0),
        ({"proc/self/cgroup": "1:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({}, None),
    ],
    ids=["v2", "v2-none", "v2-parent-is-tighter", "v2-container", "v1", "v1-none", "no-files", "no-proc"],
)  # fmt: skip
def test_the_tightest_quota_of_a_process_groups_counts(
    tmp_path: Path, files: dict[str, str], expected: float | None
) -> None:
    assert cpu_quota(write(tmp_path, files)) == expected


def test_pinning_moves_every_thread_and_those_that_they_start() -> None:
    """In a process of its own, because pinning would hold for all later tests."""
    program = """
import json, os, pathlib, threading
from moeray.placement.machine import pin_process
stop, started = threading.Event(), threading.Event()
def restless():
    while not stop.wait(0.001):
        threading.Thread(target=stop.wait, daemon=True).start()
        if threading.active_count() > 20:
            started.set(); stop.wait()
threads = [threading.Thread(target=restless, daemon=True) for _ in range(4)]
[thread.start() for thread in threads]
last = max(os.sched_getaffinity(0))
pin_process([last])
started.wait(60)
found = {line.split()[1] for task in pathlib.Path("/proc/self/task").iterdir()
         for line in (task / "status").read_text().splitlines() if line.startswith("Cpus_allowed_list")}
print(json.dumps([sorted(found), str(last)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, last = json.loads(done.stdout)
    assert found == [last]
