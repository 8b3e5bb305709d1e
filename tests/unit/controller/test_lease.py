"""A lease ends when its holder does, however it does, and only then."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from certificates import cluster_certificate
from chaos import sockets

from moeray.controller.lease import Lease, LeaseServer
from moeray.mutual_tls import ClusterCertificate

HOLDER = """
import asyncio, sys, time
from moeray.controller.lease import Lease
async def main():
    lease = Lease(sys.argv[1], "secret", beat_s=0.05, silence_s=30)
    await lease.start()
    print("held", flush=True)
    time.sleep(60)  # a blocked event loop, as while a model loads
asyncio.run(main())
"""

CONTROLLER = """
import asyncio
from moeray.controller.lease import LeaseServer
async def main():
    server = LeaseServer(lambda id, reason: None, silence_s=30)
    address = await server.start("127.0.0.1")
    server.expect("secret", "m")
    print(address, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


class Losses:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.event = asyncio.Event()

    def __call__(self, id: str, reason: str) -> None:
        self.seen.append((id, reason))
        self.event.set()


async def held_by_process(server: LeaseServer) -> subprocess.Popen[bytes]:
    address = await server.start("127.0.0.1")
    server.expect("secret", "holder")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, address], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == b"held\n"
    return process


async def test_a_killed_process_loses_its_lease_at_once() -> None:
    losses = Losses()
    server = LeaseServer(losses, silence_s=30)
    process = await held_by_process(server)
    assert not losses.seen
    os.kill(process.pid, signal.SIGKILL)
    await asyncio.wait_for(losses.event.wait(), 60)
    assert losses.seen == [("holder", "connection closed")]
    process.wait()
    await server.close()


async def test_a_stopped_process_loses_its_lease_after_the_silence_and_no_sooner() -> None:
    losses = Losses()
    server = LeaseServer(losses, silence_s=3)  # a busy machine may keep the holder waiting for a second
    process = await held_by_process(server)
    await asyncio.sleep(4)
    assert not losses.seen, "beats keep it"
    os.kill(process.pid, signal.SIGSTOP)
    await asyncio.wait_for(losses.event.wait(), 60)
    assert losses.seen == [("holder", "silent for 3 s")]
    process.kill()
    process.wait()
    await server.close()


async def test_the_holder_learns_that_the_controller_is_gone() -> None:
    controller = subprocess.Popen([sys.executable, "-c", CONTROLLER], stdout=subprocess.PIPE)
    assert controller.stdout is not None
    address = (await asyncio.to_thread(controller.stdout.readline)).decode().strip()
    lease = Lease(address, "secret", beat_s=0.05, silence_s=30)
    await lease.start()
    await asyncio.sleep(0.2)
    assert not lease.lost.is_set()
    controller.kill()
    controller.wait()
    await asyncio.wait_for(lease.lost.wait(), 60)
    lease.close()


async def test_the_holder_learns_that_nothing_reaches_the_controller_any_more() -> None:
    """A cut that closes nothing: the kernel drops what arrives for the holder, acknowledgements too."""
    losses = Losses()
    server = LeaseServer(losses, silence_s=30)
    address = await server.start("127.0.0.1")
    server.expect("secret", "m")
    lease = Lease(address, "secret", beat_s=0.05, silence_s=2)
    await lease.start()
    await asyncio.sleep(3)
    assert not lease.lost.is_set(), "beats that are acknowledged keep it"
    assert lease._connection is not None
    sockets.deafen(os.getpid(), lease._connection.fileno())
    await asyncio.wait_for(lease.lost.wait(), 60)
    await server.close()


async def test_garbage_on_the_port_is_dropped_and_costs_no_member_anything() -> None:
    losses = Losses()
    server = LeaseServer(losses, silence_s=5)
    address = await server.start("127.0.0.1")
    server.expect("secret", "m")
    lease = Lease(address, "secret", beat_s=0.05, silence_s=30)
    await lease.start()
    _, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(b"x" * 100_000)
    await asyncio.sleep(0.3)
    assert not [id for id, _ in losses.seen if id == "m"]
    assert not lease.lost.is_set()
    lease.close()
    await server.close()


async def test_a_member_that_never_opens_its_lease_is_lost() -> None:
    losses = Losses()
    server = LeaseServer(losses, silence_s=0.1)
    await server.start("127.0.0.1")
    server.expect("secret", "m")
    await asyncio.wait_for(losses.event.wait(), 60)
    assert losses.seen == [("m", "did not open its lease within 0.1 s")]
    await server.close()


async def test_who_does_not_know_the_token_cannot_end_a_membership() -> None:
    losses = Losses()
    server = LeaseServer(losses, silence_s=5)
    host, port = (await server.start("127.0.0.1")).split(":")
    server.expect("secret", "m")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"m\n")
    writer.close()
    await asyncio.sleep(0.2)
    assert not losses.seen
    await server.close()


async def test_with_a_certificate_only_members_of_the_cluster_hold_a_lease(tmp_path: Path) -> None:
    certificate = ClusterCertificate(cluster_certificate(tmp_path))
    losses = Losses()
    server = LeaseServer(losses, silence_s=20, certificate=certificate)
    address = await server.start("127.0.0.1")
    server.expect("secret", "m")
    heard_of = Lease(address, "secret", beat_s=0.05, silence_s=20)
    await heard_of.start()
    await asyncio.wait_for(heard_of.lost.wait(), 20)
    assert losses.seen == [], "the token was not even read"

    lease = Lease(address, "secret", beat_s=0.05, silence_s=20, certificate=certificate)
    await lease.start()
    await asyncio.sleep(0.5)
    assert losses.seen == [] and not lease.lost.is_set()
    lease.close()
    await asyncio.wait_for(losses.event.wait(), 20)
    assert losses.seen[0][0] == "m"
    await server.close()
