"""Attack a real ingress: `python tests/fuzz/run.py --cases 20000 --seed 6`. Prints counts per kind and status; fails on
whatever `judge` does not let pass.
"""

# ruff: noqa: E402  the paths first

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

for part in ("cluster", "model_plugins", "deployments", "tests", "tests/integration", "tests/fuzz"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / part))

from attack import attack
from judge import End, Judge
from target import Attacked

from moeray.tiny import checkpoint_path

PROGRESS_S = 15.0


def progress(judge: Judge, end: threading.Event) -> None:
    began, first = time.monotonic(), judge.num_cases
    while not end.wait(PROGRESS_S):
        print(f"{judge.num_cases - first} cases, {time.monotonic() - began:.0f} s", flush=True)


def report(judge: Judge, end: End, num_cases: int, took_s: float) -> None:
    """What happened, and how often."""
    for (kind, status), count in sorted(judge.counts.items()):
        print(f"{kind:34} {status:22} {count:7}")
    print(
        f"{num_cases} cases in {took_s:.0f} s, memory {end.grown_bytes / (1 << 20):+.0f} MiB, "
        f"slowest /health {end.silence_s:.2f} s, left {dict(end.left)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Attacked(checkpoint_path(), Path(folder)) as attacked:
        judge, ended = attacked.judge, threading.Event()
        before = attacked.rss_bytes
        try:
            attack(attacked.target, max(60, arguments.cases // 50), arguments.seed + 1)  # what is allocated once
            judge.counts.clear()
            before = attacked.rss_bytes
            threading.Thread(target=progress, args=(judge, ended), daemon=True).start()
            began = time.monotonic()
            attack(attacked.target, arguments.cases, arguments.seed)
        except Exception:  # noqa: BLE001  what a case found, made small; how the server ended is told, too
            faults.append(traceback.format_exc())
        took_s = time.monotonic() - began if "began" in locals() else 0.0
        ended.set()
        end = attacked.end(before)
        report(judge, end, judge.num_cases, took_s)
        faults += judge.faults(end)
    print("\n".join(faults) or f"clean (seed {arguments.seed})")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
