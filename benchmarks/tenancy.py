"""What tenancy costs a request: authentication, quotas in process and in Redis, tag, usage record. Ten seconds.

    python benchmarks/tenancy.py --json benchmarks/results/tenancy.json

Redis is one of its own on loopback. Every record is one call's time, in microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from records import ROOT, Record, percentile, write

from moeray.tenancy import (
    Authenticator,
    FairClock,
    Identities,
    Limits,
    LocalQuotas,
    QuotaExceeded,
    QuotaStore,
    RedisQuotas,
    Registry,
    Roster,
    RosterFile,
    Tenant,
    TokenRules,
    TokenVerifier,
    UsageFiles,
    UsageRecord,
    UsageWriter,
    connect_async,
)
from moeray.tenancy.roster_changes import add_key

sys.path.append(str(ROOT / "tests"))
from redis_server import RedisServer

LIMITS = Limits(2**40, 2**50, 100_000, 2**51)
"""All of them are counted, none is reached."""
NUM_TENANTS = 100
USAGE = UsageRecord(0.0, "request", "t0", "k", "m", "http", 100, 200, 50, 0.01, 0.1, 1.0, "ok")


def record(name: str, times_ns: list[int]) -> Record:
    p50, p99 = (round(percentile(times_ns, each) / 1e3, 2) for each in (50, 99))
    print(f"{name:44} p50 {p50:8.1f} us  p99 {p99:8.1f} us")
    return {"call": name, "p50_us": p50, "p99_us": p99, "calls": len(times_ns)}


def timed(name: str, call: Callable[[], object], count: int) -> Record:
    times = []
    for _ in range(count):
        began = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - began)
    return record(name, times)


async def timed_async(name: str, call: Callable[[], Awaitable[object]], count: int) -> Record:
    times = []
    for _ in range(count):
        began = time.perf_counter_ns()
        await call()
        times.append(time.perf_counter_ns() - began)
    return record(name, times)


def of_credentials(folder: Path) -> list[Record]:
    """A key, and a token (ES256), among NUM_TENANTS tenants."""
    roster = Roster(Tenant(name=f"t{each}", identities=Identities(jwt=(f"t{each}",))) for each in range(NUM_TENANTS))
    roster, key = add_key(roster, "t7", now=datetime.now(UTC))
    store = RosterFile(folder / "tenants.json")
    store.edit(lambda _: roster)
    private = generate_private_key(SECP256R1())
    public = jwt.algorithms.ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
    (folder / "jwks.json").write_text(json.dumps({"keys": [public]}))
    verifier = TokenVerifier(folder / "jwks.json", TokenRules(issuer="i", audience="a"))
    token = jwt.encode({"iss": "i", "aud": "a", "exp": time.time() + 3600, "sub": "t7"}, private, algorithm="ES256")
    authenticator = Authenticator(Registry(store), verifier)
    return [
        timed("authenticate: key", lambda: authenticator.authenticate(key.text), 50_000),
        timed("authenticate: token, ES256", lambda: authenticator.authenticate(token), 3_000),
    ]


async def of_quotas(name: str, store: QuotaStore, count: int) -> list[Record]:
    tenant, one = Tenant(name="t", limits=LIMITS), Tenant(name="one", limits=Limits(requests_per_minute=1))

    async def both() -> None:
        await store.settle(await store.reserve(tenant, tokens=100), 50)

    async def refused() -> None:
        try:
            await store.reserve(one)
        except QuotaExceeded:
            return

    async def client() -> None:
        for _ in range(count // 32):
            await both()

    await refused()
    found = [
        await timed_async(f"{name}: reserve and settle", both, count),
        await timed_async(f"{name}: refusal", refused, count),
    ]
    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(32)))
    found[0]["per_second_by_32"] = round(count // 32 * 32 / (time.perf_counter() - began))
    print(f"{name}: {found[0]['per_second_by_32']} reserved and settled a second, 32 at once")
    return found


async def of_redis(folder: Path) -> list[Record]:
    server = RedisServer(folder, appendfsync="everysec")
    server.start()
    client = connect_async(server.url, None, timeout_s=60.0)
    try:
        return await of_quotas("Redis", RedisQuotas(client), 5_000)
    finally:
        await client.aclose()
        server.kill()


def of_the_rest(folder: Path) -> list[Record]:
    clock, writer = FairClock(), UsageWriter(UsageFiles(folder / "usage", "bench", keep_days=1))
    found = [
        timed("tag", lambda: clock.tag("t", 100), 50_000),
        timed("usage record", lambda: writer.record(USAGE), 50_000),
    ]
    writer.close(60.0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [
            *of_credentials(folder),
            *asyncio.run(of_quotas("in process", LocalQuotas(), 50_000)),
            *asyncio.run(of_redis(folder)),
            *of_the_rest(folder),
        ]
    if options.json:
        write(options.json, found)


if __name__ == "__main__":
    main()
