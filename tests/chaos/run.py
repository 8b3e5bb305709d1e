"""Run a schedule of faults against a cluster of its own, print what clients saw, end with 1 if a criterion was missed.

    python tests/chaos/run.py --seconds 300 --seed 7 --json chaos.json
    python tests/chaos/run.py --seconds 600 --only "kill group" --only "stop group"

Criteria are in `chaos.criteria`: with --every-kind all of them. Those of stalls need some kinds several times, and
alone even with --overlap.

The same seed gives the same faults in the same order on the same kinds of victims. --document fills docs/faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

MAX_TOLD, MAX_CHARS = 25, 600
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "e2e")]


def main() -> int:
    from chaos.criteria import of_run
    from chaos.faults import FAULTS, Schedule
    from chaos.harness import WHOLE, Plan, run
    from chaos.report import as_text, fill, rows

    options = _options()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)

    names = options.only or list(FAULTS)
    criteria = of_run(names, options.every_kind, options.overlap)
    schedule = Schedule(options.seed, names, criteria.repeats)
    whole = replace(WHOLE, ingresses=options.ingresses)
    plan = Plan(
        options.seconds, options.seed, schedule, options.clients,
        whole=whole, every_kind=options.every_kind, overlap=options.overlap, alone=criteria.alone,
        must_move=criteria.must_move, logs=options.logs,
    )  # fmt: skip
    findings = run(plan, say)
    facts = {
        "machine": f"{os.cpu_count()} cores of {platform.machine()}",
        "commit": _commit(),
        "kernel": f"{platform.release()}, sched_autogroup_enabled {_autogroup()}",
        "seed": str(options.seed),
    }
    print("\n" + as_text(rows(findings)) + "\n")
    for failure in findings.failures[:MAX_TOLD]:
        print(failure[:MAX_CHARS])
    if (more := len(findings.failures) - MAX_TOLD) > 0:
        print(f"... and {more} more")
    num_faults = len(findings.injected)
    print(f"{findings.num_requests} requests through {num_faults} faults: {len(findings.failures)} failed or wrong")
    if findings.own_pauses:
        longest = max(until - since for since, until in findings.own_pauses)
        print(f"the clients themselves stood still {len(findings.own_pauses)} times, {longest:.2f} s at most")
    print(f"without a fault: first chunk after {findings.first_chunk_s:.2f} s, re-prefill {findings.reprefill_s:.2f} s")
    missed = criteria.missed(findings)
    for word, lines in (("excused", criteria.excused(findings)), ("MISSED", missed)):
        for line in lines:
            print(f"{word}: {line}"[:MAX_CHARS])
    if not criteria.stalls:
        print("stalls were not judged")
    if options.json:
        written = {**facts, "arguments": sys.argv[1:], "missed": missed, **asdict(findings)}
        options.json.write_text(json.dumps(written, indent=1))
    if options.document:
        fill(ROOT / "docs" / "faults.md", findings, facts)
    return 1 if missed else 0


def _options() -> argparse.Namespace:
    from chaos.faults import FAULTS
    from chaos.harness import WHOLE

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="inject faults for so long (default 300)")
    parser.add_argument("--every-kind", action="store_true", help="and until each kind was injected; judge all")
    parser.add_argument("--overlap", action="store_true", help="inject while what other faults harmed is under repair")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--clients", type=int, default=4, metavar="N", help="requests at a time, beside the watched streams (default 4)"
    )
    parser.add_argument("--ingresses", type=int, default=WHOLE.ingresses, metavar="N")
    parser.add_argument("--only", action="append", choices=[*FAULTS], help="this fault, may be given several times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the logs of the cluster's processes there")
    parser.add_argument("--document", action="store_true", help="put the table into docs/faults.md")
    return parser.parse_args()


def _autogroup() -> str:
    """Whether sessions share the cores by session; see docs/faults.md."""
    try:
        return Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip()
    except OSError:
        return "unknown"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
