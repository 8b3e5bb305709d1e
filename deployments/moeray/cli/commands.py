"""Arguments and dispatch; each command lives in the module of its name and is imported when used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moeray.cli.argument_types import positive
from moeray.cli.bench_arguments import add_bench_command
from moeray.cli.errors import CommandError
from moeray.cli.plan_arguments import add_plan_command
from moeray.cli.tenant_arguments import add_tenant_commands
from moeray.config import ConfigError

EXAMPLES = """\
examples:
  moeray up                                the bundled model: 2 attention shards, 2 expert groups, 1 ingress
  moeray up -f cluster.yaml --detach       come back when it is ready, leave it running
  moeray chat "What is an expert group?"   ask it over gRPC; --http for the OpenAI API
  moeray status --json                     processes, endpoints, routed tokens
  moeray scale experts=4 attention=3       other numbers of processes, while it serves
  moeray restart experts                   new processes for one pool, one after the other
  moeray down                              stop what `up` started
  moeray cache stats                       shared KV blocks: how many, how often fetched and why not
  moeray inspect DIRECTORY --groups 8      what a checkpoint holds, and what each of 8 expert groups would read
  moeray bench --rate 10                   load on a server, and what its clients saw; `moeray bench --help` has more
  moeray plan -f plan.yaml                 what a model needs and costs, split or not; `moeray plan --help` has more
  moeray tenant create search              a tenant and its first key; `moeray tenant --help` has more
  moeray usage --by tenant                 who used how much
  RAY_ADDRESS=host:6379 moeray up          on a Ray cluster that is there already
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 (it failed) or 2 (what was asked for is wrong)."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ConfigError as error:
        print(f"moeray: {error}", file=sys.stderr)
        return 2
    except CommandError as error:
        print(f"moeray: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `moeray status | head`: the reader has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 (the interpreter flushes it when it ends)
        return 0


def _run(options: argparse.Namespace) -> int:
    if options.command == "up":
        from moeray.cli.up import up

        return up(options.file, detach=options.detach, timeout_s=options.timeout, supervise=options.supervise)
    if options.command == "down":
        from moeray.cli.down import down

        return down()
    if options.command == "status":
        from moeray.cli.status import status

        return status(as_json=options.json)
    if options.command == "cache":
        from moeray.cli import cache

        return cache.flush() if options.action == "flush" else cache.stats(as_json=options.json)
    if options.command == "scale":
        from moeray.cli.scale import scale

        return scale(options.counts, timeout_s=options.timeout)
    if options.command == "restart":
        from moeray.cli.restart import restart

        return restart(options.pool, timeout_s=options.timeout)
    if options.command == "chat":
        from moeray.cli.chat import Identity, chat

        identity = Identity(options.api_key, options.ca_file, options.cert, options.key)
        return chat(
            options.question, http=options.http, identity=identity, max_tokens=options.max_tokens,
            thinking=options.thinking,
        )  # fmt: skip
    if options.command == "inspect":
        from moeray.cli.inspect import inspect_checkpoint

        return inspect_checkpoint(
            options.checkpoint, groups=options.groups, redundant=options.redundant, as_json=options.json
        )
    if options.command == "bench":
        from moeray.cli.bench_arguments import run_bench

        return run_bench(options)
    if options.command == "plan":
        from moeray.cli.plan_arguments import run_plan

        return run_plan(options)
    if options.command == "tenant":
        from moeray.cli.tenant import tenant

        return tenant(options)
    if options.command == "usage":
        from moeray.cli.usage import usage

        return usage(options.file, by=options.by, since=options.since, until=options.until, as_json=options.json)
    from moeray.cli.demo import demo

    return demo(options.file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moeray",
        description="Serve DeepSeek-V4-class models with attention and experts on separate Ray workers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    up = commands.add_parser(
        "up", help="start a cluster and wait until it is ready",
        description="Start a cluster (on embedded Ray unless RAY_ADDRESS is set), wait until it serves, print its "
        "endpoints. In the foreground it runs until Ctrl-C.",
        epilog="example: moeray up -f cluster.yaml --detach", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _file(up)
    up.add_argument("--detach", action="store_true", help="return when ready and leave the cluster running")
    _timeout(up, "give up after S seconds")
    up.add_argument("--supervise", action="store_true", help=argparse.SUPPRESS)

    commands.add_parser("down", help="stop the cluster that `up` started", epilog="example: moeray down")

    status = commands.add_parser(
        "status", help="show processes, endpoints and load", epilog="example: moeray status --json"
    )
    status.add_argument("--json", action="store_true", help="as JSON, for scripts")

    cache = commands.add_parser(
        "cache", help="what the shared stores of KV blocks hold, or empty them",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  moeray cache stats --json\n  moeray cache flush      what engines hold themselves stays",
    )  # fmt: skip
    cache.add_argument("action", choices=("stats", "flush"))
    cache.add_argument("--json", action="store_true", help="stats for a program")
    scale = commands.add_parser(
        "scale", help="change the numbers of expert groups and attention shards",
        description="Change the numbers of expert groups and attention shards while the cluster serves; no request is "
        "lost. Returns when the new numbers are reached.",
        epilog="example: moeray scale experts=4 attention=3",
    )  # fmt: skip
    scale.add_argument("counts", nargs="+", metavar="POOL=N", help="experts=N, attention=N or both")
    _timeout(scale, "stop waiting after S seconds")

    restart = commands.add_parser(
        "restart", help="replace one pool's processes, one after the other",
        description="Drain, end and replace each process of one pool in turn while the cluster serves; no request is "
        "lost. The new ones run what is installed by then.",
        epilog="example: moeray restart experts",
    )  # fmt: skip
    restart.add_argument("pool", choices=("experts", "attention", "ingress", "engram"))
    _timeout(restart, "for each process; stop after S seconds")

    chat = commands.add_parser("chat", help="ask one question and stream the answer",
                               epilog='example: moeray chat "What is an expert group?"')  # fmt: skip
    chat.add_argument("question")
    chat.add_argument("--http", action="store_true", help="over the OpenAI HTTP API instead of gRPC")
    chat.add_argument("--api-key", metavar="KEY", default=os.environ.get("MOERAY_API_KEY"),
                      help="sent as a bearer token (default: MOERAY_API_KEY, which no process list shows)")  # fmt: skip
    chat.add_argument("--ca-file", type=Path, metavar="PEM", help="who signed the server's certificate")
    chat.add_argument("--cert", type=Path, metavar="PEM", help="client certificate, where the server asks for one")
    chat.add_argument("--key", type=Path, metavar="PEM", help="its key")
    chat.add_argument("--max-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    chat.add_argument("--thinking", action="store_true", help="let the model think first")

    inspect = commands.add_parser(
        "inspect", help="show what a checkpoint holds and what of it does not fit",
        description="Show layers, experts, formats and bytes per role, read from config.json and the weight files' "
        "headers alone. The exit status is 1 if something does not fit.",
        epilog="example: moeray inspect ~/DeepSeek-V4-Pro --groups 64 --redundant 64",
    )  # fmt: skip
    inspect.add_argument("checkpoint", help="a directory, a bundled name or a hub id, as `model` of cluster.yaml")
    inspect.add_argument("--json", action="store_true", help="as JSON, for scripts")
    inspect.add_argument("--groups", type=positive, metavar="N", help="also plan what each of N expert groups reads")
    inspect.add_argument(
        "--redundant", type=int, default=0, metavar="R", help="with --groups: R extra copies per layer (default 0)"
    )

    add_bench_command(commands)
    add_plan_command(commands)
    add_tenant_commands(commands)

    demo = commands.add_parser(
        "demo", help="start a cluster, ask it over gRPC and HTTP, print, stop", epilog="example: moeray demo"
    )
    _file(demo)
    return parser


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--file", type=Path, metavar="CLUSTER.YAML", help="configuration (default: the bundled model)"
    )


def _timeout(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help=f"{meaning} (default 600)")
