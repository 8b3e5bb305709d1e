"""What an operator does to tenants: roster in, roster out. Pure but for the randomness of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

from moeray.tenancy.errors import RosterError
from moeray.tenancy.keys import NewKey, new_key
from moeray.tenancy.roster import Roster, parse_tenant, tenant_to_data
from moeray.tenancy.tenant import KeyRecord, Limits, Tenant

LIMITS = tuple(each.name for each in fields(Limits))


def create_tenant(roster: Roster, name: str, changes: Mapping[str, Any]) -> Roster:
    """A tenant without a key.

    Raises:
        RosterError: it is there already, or a value is wrong.
    """
    if name in roster.tenants:
        raise RosterError(f"tenant {name} is there already")
    return roster.with_tenant(_changed(name, {}, changes))


def set_fields(roster: Roster, name: str, changes: Mapping[str, Any]) -> Roster:
    """Other values for some fields (names of `Tenant`, `Limits` and `Identities`).

    Raises:
        RosterError: no such tenant or field, or a value is wrong.
    """
    return roster.with_tenant(_changed(name, tenant_to_data(find(roster, name)), changes))


def delete_tenant(roster: Roster, name: str) -> Roster:
    """Without the tenant and its keys."""
    find(roster, name)
    return roster.without(name)


def add_key(
    roster: Roster, name: str, *, now: datetime, expires: datetime | None = None, grace: timedelta | None = None
) -> tuple[Roster, NewKey]:
    """One more key; with `grace` its older ones end after that time: rotation.

    Raises:
        RosterError: no such tenant.
    """
    tenant, made = find(roster, name), new_key(now, expires)
    older = tenant.keys if grace is None else tuple(_ending(key, now, now + grace) for key in tenant.keys)
    return roster.with_tenant(replace(tenant, keys=(*older, made.record))), made


def revoke(roster: Roster, name: str, key_id: str | None, *, now: datetime) -> Roster:
    """Refuse one key from now on, or all of a tenant's (None).

    Raises:
        RosterError: no such tenant or key.
    """
    tenant = find(roster, name)
    if key_id is not None and key_id not in {key.id for key in tenant.keys}:
        raise RosterError(f"tenant {name} has no key {key_id}")
    keys = tuple(
        replace(key, revoked=now) if key_id in (None, key.id) and key.revoked is None else key for key in tenant.keys
    )
    return roster.with_tenant(replace(tenant, keys=keys))


def find(roster: Roster, name: str) -> Tenant:
    """Raises RosterError if there is no such tenant."""
    tenant = roster.tenants.get(name)
    if tenant is None:
        raise RosterError(f"there is no tenant {name}")
    return tenant


def _changed(name: str, data: dict[str, Any], changes: Mapping[str, Any]) -> Tenant:
    limits, identities = dict(data.get("limits", {})), dict(data.get("identities", {}))
    for field, value in changes.items():
        part = limits if field in LIMITS else identities if field in ("mtls", "jwt") else data
        part[field] = value
    return parse_tenant(name, {**data, "limits": limits, "identities": identities}, source="tenant")


def _ending(key: KeyRecord, now: datetime, end: datetime) -> KeyRecord:
    if key.state(now) != "active" or (key.expires is not None and key.expires <= end):
        return key
    return replace(key, expires=end)
