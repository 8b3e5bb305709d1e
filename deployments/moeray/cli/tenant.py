"""`moeray tenant`: make and change tenants and their keys. Needs no running cluster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

from moeray.cli.errors import CommandError
from moeray.cli.tenancy_store import placed, roster_of
from moeray.cli.tenant_arguments import changes_of
from moeray.config import load_config
from moeray.tenancy import RegistryUnavailable, Roster, RosterFile, RosterStore, Tenant
from moeray.tenancy.keys import NewKey
from moeray.tenancy.roster import tenant_to_data
from moeray.tenancy.roster_changes import add_key, create_tenant, delete_tenant, find, revoke, set_fields


def tenant(options: argparse.Namespace) -> int:
    """Run one verb.

    Raises:
        ConfigError: the cluster's configuration, a tenant or a value is wrong (2).
        CommandError: the place of the tenants does not answer (1).
    """
    store = roster_of(placed(load_config(options.file)))
    try:
        if options.verb in ("list", "show"):
            _print(_wanted(store, options), as_json=options.json, one=options.verb == "show")
        else:
            _change(store, options)
    except RegistryUnavailable as error:
        raise CommandError(str(error)) from error
    return 0


def _wanted(store: RosterStore, options: argparse.Namespace) -> list[Tenant]:
    is_new = isinstance(store, RosterFile) and not store.path.exists()
    roster = Roster() if is_new else store.read()
    return [find(roster, options.name)] if options.verb == "show" else list(roster.tenants.values())


def _change(store: RosterStore, options: argparse.Namespace) -> None:
    made: list[NewKey] = []  # of the last try: the store may call `change` again
    now, name = datetime.now(UTC), options.name

    def with_key(roster: Roster) -> Roster:
        expires = now + options.expires if options.expires else None
        roster, key = add_key(roster, name, now=now, expires=expires, grace=getattr(options, "grace", None))
        made[:] = [key]
        return roster

    def create(roster: Roster) -> Roster:
        roster = create_tenant(roster, name, changes_of(options))
        return roster if options.no_key else with_key(roster)

    changes: dict[str, Callable[[Roster], Roster]] = {
        "create": create,
        "rotate": with_key,
        "set": lambda roster: set_fields(roster, name, changes_of(options)),
        "revoke": lambda roster: revoke(roster, name, options.key, now=now),
        "delete": lambda roster: delete_tenant(roster, name),
    }
    store.edit(changes[options.verb])
    print(f"tenant {name}: {_done(options, made)}", file=sys.stderr)
    for key in made:
        print(key.text)


def _done(options: argparse.Namespace, made: list[NewKey]) -> str:
    if made:
        return f"new key {made[0].record.id}; it is printed this once"
    done = {"create": "made, without a key", "set": "changed", "delete": "deleted with its keys"}
    return done.get(options.verb) or ("all keys revoked" if options.key is None else f"key {options.key} revoked")


def _print(tenants: Iterable[Tenant], *, as_json: bool, one: bool) -> None:
    if as_json:
        data = [{"name": each.name, **tenant_to_data(each)} for each in tenants]
        print(json.dumps(data[0] if one else data, indent=1))
        return
    for each in tenants:
        print("\n".join(_lines(each) if one else [_line(each)]))


def _line(tenant: Tenant) -> str:
    states = [key.state(datetime.now(UTC)) for key in tenant.keys]
    return f"{tenant.name}  priority {tenant.priority}  weight {tenant.weight:g}  {states.count('active')} active keys"


def _lines(tenant: Tenant) -> list[str]:
    data = tenant_to_data(tenant)
    keys = data.pop("keys", [])
    lines = [_line(tenant), *(f"  {field}: {json.dumps(value)}" for field, value in data.items())]
    for record, key in zip(keys, tenant.keys, strict=True):
        times = ", ".join(f"{what} {record[what]}" for what in ("created", "expires", "revoked") if what in record)
        lines.append(f"  key {key.id}  {key.state(datetime.now(UTC))}  {times}")
    return lines
