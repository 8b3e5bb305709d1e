"""Arguments of `moeray plan`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moeray.cli.argument_types import positive
from moeray.cli.errors import CommandError

EXAMPLES = """\
examples:
  moeray plan -f plan.yaml                         memory, times and cost of every topology, cheapest first
  moeray plan -f plan.yaml --values values.yaml    and Helm values that serve the best one
  moeray plan -f plan.yaml --plot plan.svg --json  everything, for a script, and a picture
  moeray plan --models                             shapes that are bundled
  moeray plan -f plan.yaml --calibrate found.json  measure the running cluster, keep the numbers that explain it
  moeray plan -f plan.yaml --efficiency found.json --measure    predictions beside what is measured now

plan.yaml:
  model:    {config: deepseek-v4-flash, routed: fp4, other: fp8, kv: fp8, dispatch: fp8}
  hardware: {attention: H200, experts: H100, most: 32, price: 3.5}
  workload: {prompt: 2048, output: 512, cached: 0.5, rate: 20}
  goals:    {ttft_s: 1.0, tpot_s: 0.05}
"""


def add_plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan", help="say what a model needs and costs on given devices, split or not",
        description="Predict memory, times and cost per million tokens of every topology for a model, devices, a "
        "workload and goals. The exit status is 1 if nothing meets the goals. What it assumes: docs/planning.md.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("-f", "--file", type=Path, metavar="PLAN.YAML", help="what is to be served, on what, how fast")
    parser.add_argument("--efficiency", type=Path, metavar="JSON", help="numbers that were measured instead of assumed")
    parser.add_argument("--json", action="store_true", help="as JSON, for scripts")
    parser.add_argument("--rows", type=positive, default=12, metavar="N", help="of the table (default 12)")
    parser.add_argument("--values", type=Path, metavar="FILE", help="write Helm values that serve the best topology")
    parser.add_argument("--plot", type=Path, metavar="FILE.SVG", help="write a picture: cost over devices")
    measure = parser.add_argument_group("on the running cluster, which should have nothing else to do")
    measure.add_argument("--calibrate", type=Path, metavar="JSON", help="measure, and write numbers that explain it")
    measure.add_argument("--measure", action="store_true", help="measure, and compare with what is predicted")
    measure.add_argument("--batches", type=_batches, default=(1, 2, 4, 8), metavar="N,N,...",
                         help="requests beside each other in each shard (default 1,2,4,8)")  # fmt: skip
    measure.add_argument("--api-key", metavar="KEY", default=os.environ.get("MOERAY_API_KEY"),
                         help="of a tenant (default: MOERAY_API_KEY, which no process list shows)")  # fmt: skip
    measure.add_argument("--ca-file", type=Path, metavar="PEM", help="who signed the server's certificate")
    parser.add_argument("--models", action="store_true", help="print the names of bundled shapes")


def run_plan(options: argparse.Namespace) -> int:
    """Raises CommandError."""
    from moeray.cli.plan import Outputs, list_models, make_plan, measure_plan

    if options.models:
        return list_models()
    if options.file is None:
        raise CommandError("-f PLAN.YAML is needed; `moeray plan --help` shows one", status=2)
    if options.calibrate is not None or options.measure:
        from moeray.cli.chat import Identity

        identity = Identity(options.api_key, options.ca_file)
        return measure_plan(
            options.file, options.efficiency, options.batches, identity, options.calibrate, options.json
        )
    outputs = Outputs(options.json, options.rows, options.values, options.plot)
    return make_plan(options.file, options.efficiency, outputs)


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between them") from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} is less than 1")
    return found
