"""Real processes for the transport's contract: expert groups that hold many servers, and shards that can be killed.

They are forked from a server process that has imported torch once, so that a process costs a fraction of a second.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from certificates import cluster_certificate
from torch import Tensor

from moeray.config import ChannelUsers, ClusterTlsConfig
from moeray.deepseek_v4.experts import ExpertWeights, HeldExperts, new_store
from moeray.placement import Placement
from moeray.transport import (
    GroupServer,
    LocalTransport,
    MergedCompute,
    ModelIdentity,
    Transport,
    TransportSpec,
    connect,
)

NUM_LAYERS, WIDTH, LIMIT = 2, 16, 1.0
LINKS = ("channel", "gloo", "mixed", "tls")
"""How a test's shards reach its groups; mixed: those with an even number by channel, the others by gloo."""
_links = "channel"


def use_links(links: str) -> None:
    """For the servers and shards that this process sets up from now on."""
    global _links
    _links = links


def links_between(num_groups: int) -> tuple[str, ...]:
    """What `AllToAllTransport.links` must be."""
    if _links == "mixed":
        return tuple("gloo" if group % 2 else "channel" for group in range(num_groups))
    return (_links,) * num_groups


def users_of(group: int) -> ChannelUsers:
    """The group's setting that makes it so."""
    return "off" if _links == "mixed" and group % 2 else "same_user"


@functools.cache
def certificate() -> ClusterTlsConfig:
    """The cluster's, as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="moeray-certificates-")
    atexit.register(folder.cleanup)
    return cluster_certificate(Path(folder.name))


def tls_of_links() -> ClusterTlsConfig:
    return certificate() if _links == "tls" else ClusterTlsConfig()


@dataclass(frozen=True)
class Model:
    """A model small enough to be made from its seed in every process."""

    hidden_size: int = 64
    num_experts: int = 8
    top_k: int = 2
    dtype: str = "bfloat16"

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(
            fingerprint=f"{self}",
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            num_experts=self.num_experts,
            num_layers=NUM_LAYERS,
            dtype=self.dtype,
        )

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        generator = torch.Generator().manual_seed(1000 * layer + expert)
        dtype = getattr(torch, self.dtype)
        w13 = torch.randn(2 * WIDTH, self.hidden_size, generator=generator) / self.hidden_size**0.5
        w2 = torch.randn(self.hidden_size, WIDTH, generator=generator) / WIDTH**0.5
        return ExpertWeights(w13.to(dtype), w2.to(dtype))

    def experts(self, held: dict[int, tuple[int, ...]]) -> HeldExperts:
        store = new_store(
            self.hidden_size, WIDTH, getattr(torch, self.dtype), num_experts=self.num_experts, limit=LIMIT,
            compiled=True, num_threads=None,
        )  # fmt: skip
        for layer, experts in held.items():
            for expert in experts:
                store.put(layer, expert, self.weights(layer, expert))
        return HeldExperts(store, num_layers=NUM_LAYERS, num_experts=self.num_experts)

    def batch(self, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(x_TD, ids_TK, weights_TK), reproducible."""
        generator = torch.Generator().manual_seed(seed * 7919 + num_tokens)
        ids = [torch.randperm(self.num_experts, generator=generator)[: self.top_k] for _ in range(num_tokens)]
        ids_TK = torch.stack(ids).int() if ids else torch.empty((0, self.top_k), dtype=torch.int32)
        x_TD = torch.randn(num_tokens, self.hidden_size, generator=generator).to(getattr(torch, self.dtype))
        return x_TD, ids_TK, torch.rand(num_tokens, self.top_k, generator=generator)

    def oracle(self) -> Transport:
        """All experts in this process, one group."""
        everything = tuple(range(self.num_experts))
        placement = Placement(1, self.num_experts, (self.num_experts,), (everything,) * NUM_LAYERS)
        return LocalTransport(placement, self.experts(dict.fromkeys(range(NUM_LAYERS), everything)))


def spread(model: Model, slots: tuple[int, ...], generation: int = 1) -> Placement:
    """Experts over groups of these sizes, again from 0 for more slots; the second layer in reverse order."""
    forward = tuple(slot % model.num_experts for slot in range(sum(slots)))
    return Placement(generation, model.num_experts, slots, (forward, forward[::-1]))


@dataclass(frozen=True)
class ServerSettings:
    """One server of a group process; `group` may serve fewer experts than its placement says.

    It lies when it returns `lie` in the rows of expert `lies_about`, and does not notice.
    """

    model: Model
    placement: Placement
    group: int
    without: tuple[int, ...] = ()
    delay_s: float = 0.0
    backend: str = "gloo"
    channel: ChannelUsers = "same_user"
    host: str = "127.0.0.1"
    lies_about: int | None = None
    lie: float = float("nan")
    tls: ClusterTlsConfig = field(default_factory=tls_of_links)

    def start(self) -> GroupServer:
        held = {
            layer: tuple(e for e in self.placement.experts_of_group(self.group, layer) if e not in self.without)
            for layer in range(NUM_LAYERS)
        }
        experts = self.model.experts(held)

        def slow(layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None) -> Tensor:
            time.sleep(self.delay_s)
            return experts(layer, x_TD, ids_TK, out_PD)

        def lying(layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None) -> Tensor:
            rows_PD = experts(layer, x_TD, ids_TK, out_PD)
            rows_PD[ids_TK[ids_TK >= 0] == self.lies_about, -1] = self.lie
            return rows_PD

        compute = slow if self.delay_s else lying if self.lies_about is not None else experts
        return GroupServer(
            MergedCompute(compute),
            self.model.identity,
            positions={self.placement.generation: self.group},
            host=self.host,
            backend=self.backend,
            channel=self.channel,
            tls=self.tls,
        )


class Peer:
    """A process that does what it is told over a pipe."""

    def __init__(self, target: Any) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_obey, args=(target, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str, *args: Any, timeout_s: float = 60.0) -> Any:
        self.tell(name, *args)
        return self.answer(timeout_s)

    def answer(self, timeout_s: float = 60.0) -> Any:
        """To the oldest command that was told and not answered."""
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"not answered within {timeout_s:g} s")
        ok, value = self._pipe.recv()
        if not ok:
            raise RuntimeError(value)
        return value

    def tell(self, name: str, *args: Any) -> None:
        self._pipe.send((name, args))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; SIGSTOP has stopped every thread when this returns."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)
        while number == signal.SIGSTOP and not _is_stopped(self.process.pid):
            time.sleep(0.001)

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self._pipe.close()


def _is_stopped(pid: int) -> bool:
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}


@dataclass
class Group:
    """Commands of an expert group's process."""

    servers: dict[str, GroupServer] = field(default_factory=dict)

    def serve(self, key: str, settings: ServerSettings) -> str:
        self.servers[key] = settings.start()
        return self.servers[key].start()

    def serve_generations(self, key: str, positions: dict[int, int]) -> None:
        self.servers[key].serve_generations(positions)

    def shards(self, key: str) -> list[tuple[str, int, int]]:
        return [(shard.name, shard.counts.calls, shard.counts.failures) for shard in self.servers[key].shards()]

    def stop(self, key: str) -> None:
        self.servers.pop(key).stop()

    def resources(self) -> tuple[int, int]:
        return resources()

    def maps(self) -> str:
        """What this process maps."""
        gc.collect()
        return Path("/proc/self/maps").read_text()


@dataclass
class Shard:
    """Commands of an attention shard's process."""

    transport: Transport | None = None

    def connect(self, spec: TransportSpec, placement: Placement, addresses: list[str]) -> None:
        self.transport = connect(spec, placement, addresses)

    def loop(self, model: Model) -> None:
        """Layer calls without end."""
        assert self.transport is not None
        batch = model.batch(5)
        while True:
            self.transport.combine(self.transport.dispatch(0, *batch))


def resources() -> tuple[int, int]:
    """(open descriptors, threads) of this process."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def spec_of(model: Model, name: str = "test", **changes: Any) -> TransportSpec:
    spec = TransportSpec(
        shard=name, backend="gloo", identity=model.identity, max_tokens=2048, connect_timeout_s=20,
        channel="off" if _links in ("gloo", "tls") else "same_user", tls=tls_of_links(),
    )  # fmt: skip
    return replace(spec, **changes)


def eventually(condition: Any, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def group_peers(count: int) -> Iterator[list[Peer]]:
    peers = [Peer(Group) for _ in range(count)]
    yield peers
    for peer in peers:
        peer.end()


def _obey(target: Any, pipe: Connection) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    subject = target()
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(subject, name)(*args)))
        except Exception as error:  # noqa: BLE001
            pipe.send((False, f"{type(error).__name__}: {error}"))


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "moeray.transport", "moeray.deepseek_v4"])
    return context
