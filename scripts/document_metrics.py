"""Write docs/metrics.md from the list of metrics (`moeray.telemetry.families`).

python scripts/document_metrics.py            write it
python scripts/document_metrics.py --check    say whether it is out of date, and fail
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moeray.telemetry import FAMILIES, MAX_TENANTS

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = f"""# Metrics

Every process but the controller shows its numbers to Prometheus at a port of its own: `telemetry.metrics_port` (9464)
or the next free one on its node, at `telemetry.metrics_host` (loopback unless you say otherwise: who reaches the port
reads everything). `moeray status --json` has each address (`metrics`). An ingress shows its own at `/metrics` of its
HTTP port, too, with what vLLM counts there; where [tenants](tenants.md) are asked for, an admin sees all of it and any
other tenant, of all tenants, itself only.

On Kubernetes the chart's `monitoring` makes the PodMonitor, the alerts ([runbook](runbooks/alerts.md)) and the Grafana
dashboards.

* The controller's numbers (generation, members, losses, scaling) are shown by every ingress: take their `max`, not
  their sum.
* Labels have few values. The first {MAX_TENANTS} tenants that an ingress sees have their own; the others are counted
  together as `(others)`. Paths that are not served are `(other)`. Experts are counted by layer and by quantile, not one
  by one.
* Members have `role` and `index`, the same after a restart; counters begin again at 0.
* Beside these are the `process_*` and `python_*` metrics of each process, and `vllm:*` of vLLM's front.

| metric | kind | labels | what |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = [
        f"| `{each.name}` | {each.kind} | {', '.join(f'`{label}`' for label in each.labels)} | {each.help} |"
        for each in FAMILIES
    ]
    foot = "Written by `python scripts/document_metrics.py`."
    return HEAD + "\n".join([*rows, "", foot, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE} is out of date: run python scripts/document_metrics.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
