"""Tenants: keys and identities, quotas, fair shares, cache isolation, usage. Mechanism; the ingress asks and obeys."""

from moeray.tenancy.authentication import Authenticator, Principal, credential_of
from moeray.tenancy.cache_salt import cache_salt, load_secret
from moeray.tenancy.errors import (
    Forbidden,
    QuotaExceeded,
    QuotaStoreDown,
    RegistryUnavailable,
    RosterError,
    Unauthenticated,
)
from moeray.tenancy.fair_share import FairClock, engine_priority, split_priority
from moeray.tenancy.guarded_quotas import GuardedQuotas
from moeray.tenancy.local_quotas import LocalQuotas
from moeray.tenancy.places import open_roster, open_usage, secret_path
from moeray.tenancy.quotas import QuotaStore, Reservation
from moeray.tenancy.redis_connection import connect, connect_async
from moeray.tenancy.redis_quotas import RedisQuotas
from moeray.tenancy.registry import Registry, RosterStore
from moeray.tenancy.roster import Roster
from moeray.tenancy.roster_file import RosterFile
from moeray.tenancy.roster_redis import RosterRedis
from moeray.tenancy.tenant import Identities, KeyRecord, Limits, Tenant
from moeray.tenancy.usage import GROUPINGS, By, UsageRecord, UsageReport, summarise
from moeray.tenancy.usage_files import UsageFiles, read_usage
from moeray.tenancy.usage_stream import UsageStream, read_stream
from moeray.tenancy.usage_writer import UsageWriter
from moeray.tenancy.web_tokens import TokenRules, TokenVerifier

__all__ = [
    "GROUPINGS",
    "Authenticator",
    "By",
    "FairClock",
    "Forbidden",
    "GuardedQuotas",
    "Identities",
    "KeyRecord",
    "Limits",
    "LocalQuotas",
    "Principal",
    "QuotaExceeded",
    "QuotaStore",
    "QuotaStoreDown",
    "RedisQuotas",
    "Registry",
    "RegistryUnavailable",
    "Reservation",
    "Roster",
    "RosterError",
    "RosterFile",
    "RosterRedis",
    "RosterStore",
    "Tenant",
    "TokenRules",
    "TokenVerifier",
    "Unauthenticated",
    "UsageFiles",
    "UsageRecord",
    "UsageReport",
    "UsageStream",
    "UsageWriter",
    "cache_salt",
    "connect",
    "connect_async",
    "credential_of",
    "engine_priority",
    "load_secret",
    "open_roster",
    "open_usage",
    "read_stream",
    "read_usage",
    "secret_path",
    "split_priority",
    "summarise",
]
