"""What may be typed after `moeray tenant` and `moeray usage`."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Commands = _SubParsersAction[argparse.ArgumentParser]

TENANT_EXAMPLES = """\
examples:
  moeray tenant create search --requests-per-minute 600 --models moeray-tiny > search.key
  moeray tenant set search --tokens-per-month 50000000 --priority 1 --weight 2
  moeray tenant rotate search --grace 7d > search.key      the old keys work for a week
  moeray tenant revoke search --key 3f2a9c01d4e7           refused within a second
  moeray tenant list --json
A new key is printed once, alone, on standard output; all else goes to standard error.
"""
USAGE_EXAMPLES = """\
examples:
  moeray usage --by tenant
  moeray usage --by day --since 2026-11-01 --until 2026-12-01 --json
  moeray usage --by key --since 7d
"""
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
LIMITS = {
    "requests_per_minute": "in any 60 seconds", "tokens_per_minute": "prompt and answer, in any 60 seconds",
    "concurrent_requests": "at once", "tokens_per_month": "per calendar month in UTC",
    "max_context": "tokens of one request, prompt and answer",
}  # fmt: skip


def add_tenant_commands(commands: Commands) -> None:
    """The parsers of `moeray tenant VERB` and `moeray usage`."""
    tenant = commands.add_parser(
        "tenant", help="make and change tenants and their keys",
        description="Tenants and keys are in tenants.file of cluster.yaml, in Redis (redis.url), or in tenants.yaml of "
        "the state directory; running ingresses take a change over within a second.",
        epilog=TENANT_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = tenant.add_subparsers(dest="verb", required=True, metavar="verb")
    create = _verb(verbs, "create", "a tenant and its first key", "moeray tenant create search --models moeray-tiny")
    _fields(create)
    create.add_argument("--no-key", action="store_true", help="make none: it will use tokens or certificates")
    create.add_argument("--expires", type=parse_span, metavar="SPAN", help="end of the key, such as 90d")
    change = _verb(verbs, "set", "other values for the fields that are given", "moeray tenant set search --weight 2")
    _fields(change)
    rotate = _verb(verbs, "rotate", "one more key; the older ones end", "moeray tenant rotate search --grace 7d")
    rotate.add_argument("--grace", type=parse_span, default=timedelta(days=1), metavar="SPAN",
                        help="how long the older keys still work (default 1d; 0s: not at all)")  # fmt: skip
    rotate.add_argument("--expires", type=parse_span, metavar="SPAN", help="end of the new key, such as 90d")
    revoke = _verb(verbs, "revoke", "refuse one key, or all", "moeray tenant revoke search --all")
    which = revoke.add_mutually_exclusive_group(required=True)
    which.add_argument("--key", metavar="ID", help="the key's id: what is between the dashes, and in `show`")
    which.add_argument("--all", action="store_true", help="every key of the tenant")
    _verb(verbs, "delete", "the tenant with its keys", "moeray tenant delete search")
    show = _verb(verbs, "show", "one tenant", "moeray tenant show search")
    everyone = _verb(verbs, "list", "all tenants", "moeray tenant list", has_name=False)
    for parser in (show, everyone):
        parser.add_argument("--json", action="store_true", help="as JSON, for scripts")
    usage = commands.add_parser(
        "usage", help="who used how much", epilog=USAGE_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usage.add_argument("--by", choices=("tenant", "model", "key", "day"), default="tenant", help="default: tenant")
    usage.add_argument("--since", type=parse_moment, metavar="WHEN", help="a date or time (UTC), or a span such as 7d")
    usage.add_argument("--until", type=parse_moment, metavar="WHEN", help="before this")
    usage.add_argument("--json", action="store_true", help="as JSON, for scripts")
    _cluster_file(usage)


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given."""
    names = (*LIMITS, "models", "priority", "weight", "shares_cache", "is_admin", "mtls", "jwt")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def parse_span(text: str) -> timedelta:
    """90s, 15m, 12h, 7d, 2w."""
    number, unit = text[:-1], _UNITS.get(text[-1:])
    if unit is None or not number.isascii() or not number.isdigit() or len(number) > 6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a span such as 30m, 12h, 7d")
    return timedelta(**{unit: int(number)})


def parse_moment(text: str) -> float:
    """2026-11-22, 2026-11-22T10:00, or a span before now; seconds since 1970."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return (datetime.now(UTC) - parse_span(text)).timestamp()
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _verb(verbs: Commands, name: str, meaning: str, example: str, *, has_name: bool = True) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=meaning, description=f"{meaning}.".capitalize(), epilog=f"example: {example}")
    if has_name:
        parser.add_argument("name", help="the tenant's name: a-z, 0-9, dots, dashes and underscores")
    _cluster_file(parser)
    return parser


def _fields(parser: argparse.ArgumentParser) -> None:
    for name, meaning in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{meaning}; 0: no limit")
    parser.add_argument("--models", nargs="*", metavar="MODEL", help="served names it may ask for; none: all")
    parser.add_argument("--priority", type=int, metavar="N", help="class; lower goes first (default 0)")
    parser.add_argument("--weight", type=float, metavar="W", help="share inside its class (default 1)")
    parser.add_argument("--shares-cache", action=argparse.BooleanOptionalAction, default=None,
                        help="share cached prefixes with the other tenants that do")  # fmt: skip
    parser.add_argument("--admin", dest="is_admin", action=argparse.BooleanOptionalAction, default=None,
                        help="let it see every tenant's numbers at /metrics")  # fmt: skip
    parser.add_argument("--mtls", nargs="*", metavar="NAME", help="names in its client certificates")
    parser.add_argument("--jwt", nargs="*", metavar="VALUE", help="values of its tokens' tenant claim")


def _cluster_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", type=Path, metavar="CLUSTER.YAML", help="configuration of the cluster")
