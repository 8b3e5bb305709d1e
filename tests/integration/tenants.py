"""Tenants of a test's own, and an ingress that serves nobody else."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from front_process import MODEL

from moeray.config import ClusterConfig, parse_config
from moeray.ingress.tenants.opening import open_tenants
from moeray.tenancy import Roster, RosterFile, read_usage, summarise
from moeray.tenancy.roster_changes import add_key, create_tenant, revoke, set_fields
from moeray.tenancy.usage import UsageRecord, parse_line


@dataclass
class Tenants:
    """In files below a folder, changed as `moeray tenant` does. Attributes: keys: by tenant."""

    folder: Path
    more: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roster = RosterFile(self.folder / "tenants.yaml")

    @property
    def config(self) -> ClusterConfig:
        tenants = {
            "auth": "required", "file": str(self.roster.path), "secret_file": str(self.folder / "secret"),
            "usage_dir": str(self.folder / "usage"),
        }  # fmt: skip
        return parse_config({**self.more, "tenants": {**tenants, **self.more.get("tenants", {})}})

    @property
    def settings(self) -> dict[str, Any]:
        """For IngressSettings."""
        return {"tenants": partial(open_tenants, self.config, MODEL, "i0")}

    def create(self, name: str, **fields: Any) -> dict[str, str]:
        """Another tenant with one key; its headers."""

        def change(roster: Roster) -> Roster:
            changed, key = add_key(create_tenant(roster, name, fields), name, now=datetime.now(UTC))
            self.keys[name] = key.text
            return changed

        self.roster.edit(change)
        return self.headers(name)

    def change(self, name: str, **fields: Any) -> None:
        self.roster.edit(lambda roster: set_fields(roster, name, fields))

    def revoke(self, name: str) -> None:
        self.roster.edit(lambda roster: revoke(roster, name, None, now=datetime.now(UTC)))

    def headers(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}

    def records(self, tenant: str) -> list[UsageRecord]:
        """What was used, in the order of its end."""
        parsed = [parse_line(line) for line in read_usage(self.folder / "usage")]
        return [each for each in parsed if isinstance(each, UsageRecord) and each.tenant == tenant]

    def num_tokens(self, tenant: str) -> int:
        row = summarise(read_usage(self.folder / "usage"), "tenant").rows[tenant]
        return row.prompt_tokens + row.completion_tokens
