"""What can be found wrong before anything is started: checkpoint, topology, ports, memory."""

from __future__ import annotations

import math
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from moeray.cli.errors import CommandError
from moeray.cli.tenancy_store import roster_of
from moeray.config import ClusterConfig, ConfigError
from moeray.controller.settings import controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram_files import table_ranges
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.inspection import value_bytes
from moeray.deepseek_v4.source import locate
from moeray.engram_server.topology import check_row_servers
from moeray.mutual_tls import ClusterCertificate
from moeray.tenancy import Identities, RegistryUnavailable
from moeray.vllm_hooks.served_model import ExpertsIn, describe_model, experts_in, has_tokenizer

# Resident memory of one process of each role before any weight, measured with `moeray status` on the bundled model.
INGRESS_BYTES = 1200 * 2**20
SHARD_BYTES = 1500 * 2**20
GROUP_BYTES = 450 * 2**20
ROW_SERVER_BYTES = 300 * 2**20
RAY_BYTES = 800 * 2**20
# Of each worker of vLLM's own parallelism; a single one lives in EngineCore's process.
WORKER_BYTES = 700 * 2**20


def preflight(config: ClusterConfig) -> None:
    """Raises ConfigError or CommandError with what is wrong and what to do."""
    model = describe_model(locate(config.model))
    place = experts_in(config, model)
    if not has_tokenizer(model.directory):
        raise ConfigError(f"model: {model.directory / 'tokenizer.json'} is missing; copy it from the model's source")
    checkpoint = None if place is ExpertsIn.VLLM else _open(model.directory)
    controller_settings(config, model if checkpoint is None else checkpoint.shape)
    check_row_servers(config, checkpoint)
    _check_engine_args(config, place)
    if os.environ.get("RAY_ADDRESS"):
        return  # ports and memory are those of other nodes
    _check_tenants(config)
    ClusterCertificate.of(config.cluster_tls)
    _check_ports(config)
    _check_memory(config, model.directory, checkpoint)


def _open(directory: Path) -> Checkpoint:
    try:
        return Checkpoint.open(directory)
    except CheckpointError as error:
        raise ConfigError(f"model: {error}") from error


def _check_engine_args(config: ClusterConfig, place: ExpertsIn) -> None:
    if config.attention.engine_args:
        from moeray.vllm_hooks.engine_args import check_engine_args  # imports vLLM: seconds, spent only where needed

        check_engine_args(config.attention.engine_args, place)


def _check_tenants(config: ClusterConfig) -> None:
    if not config.tenants.needs_credential:
        return
    try:
        tenants = roster_of(config).read().tenants
    except RegistryUnavailable as error:
        raise CommandError(f"{error}; `moeray tenant create NAME` makes the first tenant with a key") from error
    if not any(tenant.keys or tenant.identities != Identities() for tenant in tenants.values()):
        print("warning: no tenant can ask yet: `moeray tenant create NAME` makes one with a key", file=sys.stderr)


def _check_ports(config: ClusterConfig) -> None:
    ingress = config.ingress
    if ingress.http_port == ingress.grpc_port:
        raise ConfigError(f"ingress.grpc_port: {ingress.grpc_port} is ingress.http_port too; choose two ports")
    for key, port in (("http_port", ingress.http_port), ("grpc_port", ingress.grpc_port)):
        family = socket.AF_INET6 if ":" in ingress.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((ingress.host, port))
            except OSError as error:
                raise ConfigError(
                    f"ingress.{key}: cannot listen on {ingress.host}:{port}: {error.strerror}; "
                    f"stop what uses it or set another ingress.{key}"
                ) from error


def _check_memory(config: ClusterConfig, directory: Path, checkpoint: Checkpoint | None) -> None:
    num_shards = config.attention.num_shards
    num_groups = config.num_remote_groups
    kv_bytes = config.attention.engine_args.get("kv_cache_memory_bytes") or 2**28
    if not isinstance(kv_bytes, int):
        raise ConfigError(f"attention.engine_args.kv_cache_memory_bytes: must be a number of bytes (got {kv_bytes!r})")
    num_workers = _num_workers(config.attention.engine_args)
    workers_bytes = num_workers * (kv_bytes + (WORKER_BYTES if num_workers > 1 else 0))
    in_shard, in_groups = _weight_bytes(config, directory, checkpoint)
    needed = (
        RAY_BYTES
        + config.ingress.num_replicas * INGRESS_BYTES
        + num_shards * (SHARD_BYTES + workers_bytes + in_shard)
        + num_groups * GROUP_BYTES
        + (num_shards * config.kv_cache.staging_bytes + config.kv_cache.host_bytes if config.kv_cache.is_on else 0)
        + in_groups
        + config.engram.num_servers * ROW_SERVER_BYTES
    )
    available = _available_bytes()
    tables = 0 if checkpoint is None else sum(each.num_bytes for each in table_ranges(checkpoint.tensors))
    if config.engram.placement == "device":
        needed += num_shards * tables
    elif config.engram.prefault and config.engram.placement != "redis" and needed + tables > available > needed:
        raise CommandError(
            f"engram.prefault: {_gib(tables)} GiB of Engram tables do not fit: {_gib(available)} GiB are free, about "
            f"{_gib(needed)} GiB are needed beside them. Write `engram: {{prefault: false}}` to read rows from disk "
            "when they are asked for, or take a larger node",
            status=2,
        )
    if needed > available:
        raise CommandError(
            f"too little memory: {_gib(available)} GiB are free, about {_gib(needed)} GiB are needed "
            f"({config.ingress.num_replicas} ingress, {num_shards} attention shards with {_gib(kv_bytes)} GiB KV cache "
            f"and {_gib(in_shard)} GiB weights each, {num_groups} expert groups with {_gib(in_groups)} GiB weights in "
            "all); lower attention.num_shards, experts.num_redundant, experts.num_groups or "
            "attention.engine_args.kv_cache_memory_bytes",
            status=2,
        )


def _weight_bytes(config: ClusterConfig, directory: Path, checkpoint: Checkpoint | None) -> tuple[int, int]:
    """Host memory of weights: (in every shard, in all expert groups together). A GPU's weights are not in it."""
    if checkpoint is None:
        in_shard, in_groups = sum(path.stat().st_size for path in directory.glob("*.safetensors")), 0
    else:
        rest, experts = value_bytes(checkpoint)
        copies = experts * config.experts.num_redundant // checkpoint.shape.num_experts
        in_shard, in_groups = (rest, experts + copies) if config.num_remote_groups else (rest + experts, 0)
    return 0 if config.attention.num_gpus else in_shard, 0 if config.experts.num_gpus else in_groups


def _num_workers(engine_args: Mapping[str, Any]) -> int:
    """Worker processes that hold a KV cache in each shard."""
    sizes = [engine_args.get(key, 1) for key in ("tensor_parallel_size", "pipeline_parallel_size")]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ConfigError(f"attention.engine_args: parallel sizes must be whole numbers of at least 1 (got {sizes})")
    return math.prod(sizes)


def _available_bytes() -> int:
    """What this process may still use: the machine's free memory or the control group's, whichever is less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
