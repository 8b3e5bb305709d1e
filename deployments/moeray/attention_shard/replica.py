"""The Serve replica of an attention shard: keeps one shard process, connects it to the expert groups, ends with it.

The replica does no work on tokens and never imports vLLM: ingresses talk to the shard process' relay directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import grpc
import ray

from moeray.attention_shard import link as wire
from moeray.attention_shard.channels import dial
from moeray.attention_shard.child import ShardProcess
from moeray.attention_shard.load import LoadSince
from moeray.attention_shard.spec import ShardSpec
from moeray.config import ClusterConfig
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.deepseek_v4.source import locate
from moeray.engram import shares_without
from moeray.health import guard
from moeray.membership import Charge, MembershipError, Role, View
from moeray.mutual_tls import ClusterCertificate
from moeray.placement import CoreShare, Layout, Placement, contiguous
from moeray.placement.machine import has_core_for_each
from moeray.vllm_hooks.served_model import ExpertsIn, describe_model, experts_in
from moeray.vllm_hooks.settings import SPIN_S, ShardSettings

logger = logging.getLogger(__name__)

REPORT_S = 0.5
RETRY_S = 0.5
CONNECT_TIMEOUT_S = 60.0


class AttentionShard:
    """Serve deployment. Its constructor returns when the model is loaded; it is ready when the groups are connected."""

    async def __init__(self, config: ClusterConfig, model: str, settings: ControllerSettings) -> None:  # type: ignore[misc]
        self._child: ShardProcess | None = None
        self._lost = ""
        self._stage = "starting"
        self._is_ready = False
        self._load = LoadSince()
        self._moving_to: tuple[int, tuple[str, ...], dict[int, str]] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._accusing: set[asyncio.Task[None]] = set()
        self._weights: dict[str, int] = {}
        self._experts_in = ExpertsIn.GROUPS
        self._layout, self._engram = settings.layout, config.engram
        self._member = ClusterMember(Role.ATTENTION_SHARD, settings)
        index = await self._member.join()
        self._member.every(REPORT_S, self._report)
        spin_s = _spin_s(config)  # before this process is pinned
        cores = await self._take_cores(config)
        spec, self._experts_in = _spec(config, locate(model), settings, index, cores, spin_s)
        logger.info("%s: experts are computed in the %s", spec.shard, self._experts_in)
        self._child = await ShardProcess.start(spec, self._set_stage)
        self._watched = guard(config.health.hang_s)
        self._channel = dial(self._child.address, ClusterCertificate.of(config.cluster_tls))
        tensors = (await self._info(tensors=True)).tensors or {}
        self._weights = _summary(tensors)
        self._reaper = asyncio.create_task(self._reap(self._child))
        self._watching = asyncio.create_task(self._end_if_stranded(self._child, config.health.hang_s))
        await self._member.identify(tensors["identity"])
        self._member.follow(self._on_view, self._go)

    async def check_health(self) -> None:
        """Serve asks this every second; an error makes it replace the replica.

        Raises:
            RuntimeError: the shard process is gone.
        """
        if self._lost:
            raise RuntimeError(self._lost)

    async def __del__(self) -> None:
        """Serve stops this replica."""
        await self._stop()

    async def _go(self) -> None:
        """This process is told to end, although its number is wanted: Serve starts another."""
        try:
            await self._stop()
        finally:
            os._exit(0)

    async def _stop(self) -> None:
        """Leave in order: requests end here within the drain time or go on at another shard."""
        if self._moving is not None:
            self._moving.cancel()
        await self._member.drain()
        if self._child is not None:
            await self._child.stop()
        await self._member.leave()

    async def _take_cores(self, config: ClusterConfig) -> CoreShare | None:
        """Those of the shard process; this one goes where its relay is. None where nothing is pinned."""
        if config.attention.num_gpus or not config.pin_cores:
            return None
        return await self._member.take_cores(config.attention.shard_threads, config.num_threads, has_relay=True)

    def _set_stage(self, stage: str) -> None:
        self._stage = stage

    async def _reap(self, child: ShardProcess) -> None:
        """The replica must not outlive its process."""
        try:
            self._lost = await child.ended(self._accuse)
        except Exception as error:  # noqa: BLE001 without its events it is as good as gone
            self._lost = f"the shard process' events cannot be read: {error}"
        logger.error("%s", self._lost)
        with contextlib.suppress(ray.exceptions.RayError, MembershipError):  # Serve is told by `check_health`
            await self._member.lost(self._lost)

    async def _end_if_stranded(self, child: ShardProcess, hang_s: float) -> None:
        """End where experts are awaited that only the controller could name, and it cannot be reached.

        The other shards may reach it, and have moved on to groups that this one does not hear of. A controller that
        is merely away ends nobody who can serve, and is back before a wait gets as long.
        """
        while min(self._member.alone_s, child.waits_s) <= hang_s:
            await asyncio.sleep(RETRY_S)
        _exit(
            f"no lease of the controller for {self._member.alone_s:.0f} s, and a layer call waits for experts since "
            f"{child.waits_s:.0f} s"
        )

    async def _on_view(self, view: View) -> None:
        if self._child is None or self._lost:
            return
        mismatch = view.mismatches.get(self._member.id)
        if mismatch is not None or not view.generation:
            self._stage = f"left out, serves another model: {mismatch}" if mismatch else "waiting for expert groups"
            await self._unready()
            return
        if not self._is_ready and (lacking := self._row_servers_lacking(view)):
            self._stage = lacking
            return
        if (to := (view.generation, view.addresses, dict(view.row_servers))) != self._moving_to:
            self._moving_to = to
            if self._moving is not None:
                self._moving.cancel()  # its engine may wait for experts that only this view has
            self._moving = asyncio.create_task(self._move(self._child, view))

    def _row_servers_lacking(self, view: View) -> str:
        """Why nothing could be computed yet, of Engram rows; once requests run, they wait for what is lost."""
        lacking = shares_without(view.row_servers, self._engram.num_servers, self._engram.copies)
        return f"waiting for Engram row servers {', '.join(map(str, lacking))}" if lacking else ""

    async def _move(self, child: ShardProcess, view: View) -> None:
        """Bring the engine to the view's generation, however often that takes."""
        while True:
            try:
                if not await self._connect(view):
                    return  # the state has moved on; its newer view is on the way
                await self._member.adopted(view.generation)
                if not self._is_ready:
                    await self._member.ready(child.address)
                    self._is_ready = True
                self._stage = "serving"
                return
            except Exception as error:  # noqa: BLE001 whatever it was (no group, no controller, one that does not know us)
                why = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                logger.warning("generation %d: %s; trying again", view.generation, why)
                await asyncio.sleep(RETRY_S)

    async def _unready(self) -> None:
        if self._is_ready:
            await self._member.unready()  # if it fails, the next view tries again
            self._is_ready, self._moving_to = False, None

    async def _connect(self, view: View) -> bool:
        """Give the engine the groups of a generation; False if it is of the past.

        Raises:
            grpc.aio.AioRpcError: a group did not answer or refused.
        """
        if self._experts_in is ExpertsIn.VLLM:  # nothing leaves the engine: there is nothing to connect
            return True
        if not self._is_ready:
            self._stage = f"connecting to {len(view.addresses)} expert groups"
        if self._experts_in is ExpertsIn.SHARD:
            placement: dict[str, Any] | None = _everything_here(self._layout, view.generation).to_json()
        else:
            placement = await self._member.placement(view.generation)
        if placement is None:
            return False
        await self._call(
            wire.CONNECT,
            wire.Connect(view.generation, placement, list(view.groups), list(view.addresses), dict(view.row_servers)),
        )
        return True

    def _accuse(self, group_id: str, reason: str, charge: Charge) -> None:
        logger.warning("expert group %s is bad: %s", group_id, reason)
        task = asyncio.create_task(self._member.accuse(group_id, reason, charge))
        self._accusing.add(task)
        task.add_done_callback(self._accusing.discard)

    async def _info(self, *, tensors: bool = False) -> wire.ShardInfo:
        return await self._call(wire.INFO, wire.Info(tensors=tensors))

    async def _call(self, method: str, request: wire.Connect | wire.Info) -> wire.ShardInfo:
        answer: bytes = await self._channel.unary_unary(method)(wire.encode(request), timeout=CONNECT_TIMEOUT_S)
        return wire.decode_shard_info(answer)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's autoscaling asks this; see `moeray.autoscaler.observing`."""
        return self._load.of(await self._info()) if self._is_ready else {}

    async def _report(self) -> dict[str, Any]:
        if not self._weights or self._lost:
            return {"stage": self._stage}
        info = await self._info()
        return {
            "stage": self._stage,
            "experts_in": str(self._experts_in),
            "shard_pid": info.pid,
            "engine_pid": info.engine_pid,
            "running": info.num_running,
            "waiting": info.num_waiting,
            "hop": info.hop,
            "kv_cache": info.kv_cache,
            "weights": self._weights,
            **self._member.cores(),
        }


def _exit(reason: str) -> None:
    """End this process, and the shard process with it; Serve starts another."""
    logger.error("attention shard in process %d ends: %s", os.getpid(), reason)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(1)


def _everything_here(layout: Layout, generation: int) -> Placement:
    """Where the shard computes its experts itself, as one group of all of them."""
    return contiguous(generation=generation, num_layers=layout.num_layers, num_experts=layout.num_experts, num_groups=1)


def _summary(tensors: dict[str, Any]) -> dict[str, int]:
    """What the engine holds and what it left on the disk; the whole list is the relay's to give (`Info`)."""
    return {
        "num_tensors": len(tensors["parameters"]),
        "bytes": tensors["parameter_bytes"],
        "bytes_read": tensors["bytes_read"],
        "checkpoint_bytes": tensors["checkpoint_bytes"],
        "num_tensors_left_out": len(tensors["skipped"]),
    }


def _spin_s(config: ClusterConfig) -> float:
    """How long a shard may poll for its groups' answer: not at all where somebody else may need its core.

    Like a relay's own core, granted where all compute threads of the cluster would fit on this machine.
    """
    pinned = config.pin_cores and not config.attention.num_gpus
    return SPIN_S if pinned and has_core_for_each(config.num_compute_threads) else 0.0


def _spec(
    config: ClusterConfig,
    directory: Path,
    settings: ControllerSettings,
    index: int,
    cores: CoreShare | None,
    spin_s: float,
) -> tuple[ShardSpec, ExpertsIn]:
    """What this replica's shard process is told, and where its experts are."""
    place = experts_in(config, describe_model(directory))
    shard = _shard_settings(config, directory, index, spin_s)
    spec = ShardSpec(
        shard=shard.shard,
        host=shard.host,
        num_threads=config.attention.num_threads,
        cpus=cores.cores if cores else None,
        relay_cpu=cores.relay.number if cores else None,
        engine={
            "model": str(directory),
            "model_name": settings.model,
            "engine_args": config.attention.engine_args,
            "moeray": None if place is ExpertsIn.VLLM else shard.to_json(),
            "kv_cache": asdict(config.kv_cache),
        },
        wait_for_connect=place is not ExpertsIn.VLLM,
        hang_s=config.health.hang_s,
        step_s=config.health.step_s,
        prefault=config.engram.prefault and config.engram.placement == "host" and place is not ExpertsIn.VLLM,
        tls=config.cluster_tls,
    )
    return spec, place


def _shard_settings(config: ClusterConfig, directory: Path, index: int, spin_s: float) -> ShardSettings:
    """What its EngineCore is told."""
    return ShardSettings(
        shard=f"shard-{index}",
        number=index,
        backend=config.backend,
        checkpoint=directory,
        timeout_s=config.transport.timeout_s,
        patience_s=config.transport.patience_s,
        wait_s=config.experts.wait_s,
        channel=config.transport.channel,
        dispatch_format=config.transport.dispatch_format,
        host=ray.util.get_node_ip_address(),
        spin_s=spin_s,
        micro_batches=config.attention.micro_batches,
        engram=config.engram,
        tls=config.cluster_tls,
    )
