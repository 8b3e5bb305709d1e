"""Arguments of `moeray bench`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moeray.cli.errors import CommandError

EXAMPLES = """\
examples:
  moeray bench                                        100 requests, 8 users, on the cluster that runs here
  moeray bench --rate 10 --requests 600 --ttft-ms 500 --tpot-ms 50     open loop, Poisson, goodput
  moeray bench --url http://host:8000 --compare http://other:8000      the same load on two OpenAI servers
  moeray bench --trace requests.jsonl --speed 2 --html run.html --json run.json
  moeray bench --grpc --prompt 4000 --shared 3000 --answer 64          over gRPC, with a prefix in common
"""


def add_bench_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench", help="put a load on a server and say what its clients saw",
        description="Load on the cluster that runs here, or on any OpenAI server. Closed loop (--users) or open loop "
        "(--rate, --trace); in an open loop latencies are also told from when a request was due. The exit status is 1 "
        "if a request failed.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _where(parser.add_argument_group("where"))
    load = parser.add_argument_group("load")
    load.add_argument("--requests", type=int, default=100, metavar="N", help="default 100")
    load.add_argument("--users", type=int, metavar="N", help="at once; default 8, in an open loop as many as come")
    load.add_argument("--rate", type=float, metavar="R", help="requests per second")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="of --rate: 1 Poisson, less: bursts")
    load.add_argument("--trace", type=Path, metavar="JSONL", help="lines with at_s, prompt_tokens, answer_tokens")
    load.add_argument("--speed", type=float, default=1.0, metavar="X", help="of --trace")
    load.add_argument("--prompt", type=int, default=128, metavar="T", help="tokens of a prompt (default 128)")
    load.add_argument("--answer", type=int, default=64, metavar="T", help="tokens of an answer (default 64)")
    load.add_argument("--spread", type=float, default=0.0, metavar="S", help="of both, as a share: 0 to below 1")
    load.add_argument("--shared", type=int, default=0, metavar="T", help="tokens with which every prompt begins")
    load.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line, instead of words")
    load.add_argument("--seed", type=int, default=0)
    goals = parser.add_argument_group("goals, for goodput")
    for name, meaning in (("ttft", "to the first token"), ("tpot", "between later ones"), ("e2e", "to the last")):
        goals.add_argument(f"--{name}-ms", type=float, metavar="MS", help=meaning)
    kept = parser.add_argument_group("files")
    kept.add_argument("--json", type=Path, metavar="FILE")
    kept.add_argument("--html", type=Path, metavar="FILE")


def _where(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", metavar="URL", help="of an OpenAI server, without /v1 (default: the cluster here)")
    group.add_argument("--grpc", nargs="?", const="", metavar="HOST:PORT", help="over moeray's gRPC")
    group.add_argument("--compare", metavar="URL", help="a second server, with the same load after the first")
    group.add_argument("--model", metavar="NAME", help="default: the first that the server names")
    group.add_argument("--api-key", metavar="KEY", default=os.environ.get("MOERAY_API_KEY"),
                       help="default: MOERAY_API_KEY, which no process list shows")  # fmt: skip
    group.add_argument("--ca-file", type=Path, metavar="PEM", help="who signed the server's certificate")


def run_bench(options: argparse.Namespace) -> int:
    """Raises CommandError."""
    from moeray.cli.bench import Kept, Load, Where, bench
    from moeray.cli.chat import Identity
    from moeray.cli.connection import endpoints
    from moeray.loadtest.arrivals import Lengths, LoadError
    from moeray.loadtest.outcome import Goals

    if options.url and options.grpc == "":
        raise CommandError("--grpc: with --url it needs HOST:PORT", status=2)
    url, known = (options.url, None) if options.url else endpoints()
    grpc = None if options.grpc is None else options.grpc or known
    is_open = options.rate is not None or options.trace is not None
    users = options.users if options.users is not None else 0 if is_open else 8
    try:
        lengths = Lengths(options.prompt, options.answer, options.spread, options.shared)
    except LoadError as error:
        raise CommandError(f"--prompt, --answer, --spread, --shared: {error}", status=2) from error
    load = Load(
        lengths, options.requests, users, options.rate, options.burstiness, options.trace, options.speed,
        options.prompts, options.seed,
    )  # fmt: skip
    goals = Goals(*(None if ms is None else ms / 1e3 for ms in (options.ttft_ms, options.tpot_ms, options.e2e_ms)))
    where = Where(url, grpc, options.compare, options.model)
    return bench(load, where, Identity(options.api_key, options.ca_file), goals, Kept(options.json, options.html))
