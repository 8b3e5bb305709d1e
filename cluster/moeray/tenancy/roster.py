"""All tenants at one moment, indexed by what a request may show; and their plain form in files and Redis.

A roster is checked as a whole when it is made: what two tenants would share (a key id, a certificate's name, a claim's
value) is an error, so a lookup has one answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from moeray.tenancy.errors import RosterError
from moeray.tenancy.tenant import Identities, KeyRecord, Limits, Tenant

_TENANT: TypeAdapter[Tenant] = TypeAdapter(Tenant)
_PARTS = {"limits": Limits, "identities": Identities, "keys": KeyRecord}


@dataclass(frozen=True, slots=True)
class HeldKey:
    """Attributes: sha256: digest of the secret. ends: seconds since 1970 from when it is refused, or None."""

    tenant: Tenant
    id: str
    sha256: bytes
    ends: float | None
    is_revoked: bool


class Roster:
    """See module docstring. Immutable."""

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        """Raises RosterError where two tenants would answer to the same name, key id or identity."""
        self.tenants: dict[str, Tenant] = {}
        self._keys: dict[str, HeldKey] = {}
        self._mtls: dict[str, Tenant] = {}
        self._jwt: dict[str, Tenant] = {}
        for tenant in tenants:
            _claim(self.tenants, tenant.name, tenant, f"tenants.{tenant.name}")
            for key in tenant.keys:
                ends = key.expires.timestamp() if key.expires else None
                held = HeldKey(tenant, key.id, bytes.fromhex(key.sha256), ends, key.revoked is not None)
                _claim(self._keys, key.id, held, f"tenants.{tenant.name}.keys.id")
            for name in tenant.identities.mtls:
                _claim(self._mtls, name, tenant, f"tenants.{tenant.name}.identities.mtls")
            for value in tenant.identities.jwt:
                _claim(self._jwt, value, tenant, f"tenants.{tenant.name}.identities.jwt")

    def key(self, id: str) -> HeldKey | None:
        return self._keys.get(id)

    def by_certificate(self, name: str) -> Tenant | None:
        return self._mtls.get(name)

    def by_claim(self, value: str) -> Tenant | None:
        return self._jwt.get(value)

    def with_tenant(self, tenant: Tenant) -> Roster:
        """This one with the tenant added, or replaced."""
        return Roster({**self.tenants, tenant.name: tenant}.values())

    def without(self, name: str) -> Roster:
        return Roster(tenant for tenant in self.tenants.values() if tenant.name != name)


def _claim(index: dict[str, Any], name: str, value: object, field: str) -> None:
    if name in index:
        raise RosterError(f"{field}: {name} is there twice")
    index[name] = value


def parse_roster(data: object, *, source: str) -> Roster:
    """Check a file's content.

    Raises:
        RosterError: one line per wrong field.
    """
    if not isinstance(data, Mapping):
        raise RosterError(f"{source}: must be a mapping such as `tenants: {{search: {{}}}}`, not {type(data).__name__}")
    unknown = [str(key) for key in data if key != "tenants"]
    if unknown:
        raise RosterError(f"{source}: {unknown[0]}: unknown key; known keys here: tenants")
    entries = data.get("tenants") or {}
    if not isinstance(entries, Mapping):
        raise RosterError(f"{source}: tenants: must be a mapping of names, not {type(entries).__name__}")
    tenants, problems = [], []
    for name, entry in entries.items():
        try:
            tenants.append(parse_tenant(name, entry, source=source))
        except RosterError as error:
            problems.append(str(error))
    if problems:
        raise RosterError("\n".join(problems))
    try:
        return Roster(tenants)
    except RosterError as error:
        raise RosterError(f"{source}: {error}") from error


def parse_tenant(name: object, entry: object, *, source: str) -> Tenant:
    """One entry of `tenants`; what it leaves out has its default.

    Raises:
        RosterError: one line per wrong field.
    """
    entry = {} if entry is None else entry
    if not isinstance(entry, Mapping) or "name" in entry:
        raise RosterError(f"{source}: tenants.{name}: must be a mapping of fields, without `name`")
    try:
        return _TENANT.validate_python({**entry, "name": name})
    except ValidationError as error:
        lines = (f"{source}: tenants.{name}.{_explain(item)}" for item in error.errors(include_url=False))
        raise RosterError("\n".join(lines)) from error


def roster_to_data(roster: Roster) -> dict[str, Any]:
    """Plain data that `parse_roster` accepts, without what has its default."""
    return {"tenants": {name: tenant_to_data(tenant) for name, tenant in sorted(roster.tenants.items())}}


def tenant_to_data(tenant: Tenant) -> dict[str, Any]:
    """One entry of `tenants`, without its name and what has its default."""
    default, data = asdict(Tenant(name=tenant.name)), asdict(tenant)
    written: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            parts = {part: _plain(item) for part, item in value.items() if item != default[key][part]}
            written |= {key: parts} if parts else {}
        elif value != default[key]:
            written[key] = _plain(value)
    return written


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _explain(item: Mapping[str, Any]) -> str:
    place = [part for part in item["loc"] if part != "name"]
    path = ".".join(str(part) for part in place) or "name"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        part = next((str(name) for name in item["loc"][:-1] if name in _PARTS), None)
        known = [each.name for each in fields(_PARTS[part] if part else Tenant) if each.name != "name"]
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        return f"{path}: unknown key; " + (
            f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        )
    return f"{path}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"
