"""cluster.yaml: every key, its default and its bounds, written once.

The classes are frozen dataclasses that pydantic checks when a file is read; inside the product they are plain
immutable values. Imports nothing heavy, so that `moeray --help` and bad input answer at once.
"""

from __future__ import annotations

from ipaddress import ip_address
from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from moeray.config.caches import EngramConfig, KvCacheConfig
from moeray.config.fields import FROM_FILE, Count, CountOrZero, Labels, Port, Seconds, SecondsOrZero, Share, bare_off
from moeray.config.scaling import AutoscalingConfig
from moeray.config.telemetry import TelemetryConfig

POOL_LABEL = "pool"
"""Ray node label that places the pools: a node started with `pool=attention`, `pool=experts` or `pool=ingress`."""

STEP_TIMEOUTS = 2
"""An engine's step may wait for a hung group so many times: each half of a batch has a connection of its own."""

ChannelUsers = Literal["same_user", "any_user", "off"]
RowFormatName = Literal["plain", "fp8"]
MicroBatches = Literal["measured", "never", "always"]


@dataclass(frozen=True, config=FROM_FILE)
class AttentionConfig:
    """The attention shards: one vLLM engine each.

    Attributes:
        engine_args: handed to vLLM's AsyncEngineArgs as they are.
        num_threads: compute threads of each engine on CPU. Results are bit-equal only between equal thread counts.
        micro_batches: compute a step in two halves, so that one half's attention runs while the other's experts are
            computed elsewhere (DeepSeek-V4 on CPU): measured tries both when a shard has connected, and cuts the
            steps that gain. Bits of a cut and a whole step are equal only where vLLM's kernels are batch-invariant,
            and shards may measure differently.
        num_cpus, num_gpus: what each shard asks of its Ray node.
        label_selector: Ray node labels a shard's node must carry; without it, `pool=attention` where such nodes exist.
    """

    num_shards: Count = 2
    engine_args: dict[str, Any] = Field(default_factory=dict)
    num_threads: Count = 1
    micro_batches: MicroBatches = "never"
    num_cpus: Share = 0.1
    num_gpus: Share = 0
    label_selector: Labels | None = None

    @property
    def shard_threads(self) -> int:
        """Compute threads of one shard: `num_threads` for each of vLLM's own workers (one, without engine_args)."""
        sizes = [self.engine_args.get(key, 1) for key in ("tensor_parallel_size", "pipeline_parallel_size")]
        return self.num_threads * prod(size for size in sizes if isinstance(size, int) and size > 0)


@dataclass(frozen=True, config=FROM_FILE)
class ExpertsConfig:
    """The expert groups: each owns a slice of every layer's routed experts.

    Attributes:
        num_groups: 0 leaves the experts in the shards: not split.
        num_redundant: extra physical copies of experts per layer, each in another group than the ones before it.
        min_copies: every expert has so many, the busiest get the rest; with 2, any one group can be lost at any time.
        wait_s: a request whose experts are lost waits so long for their return; then its shard ends, and with it every
            request that waited as long (503, UNAVAILABLE).
        rebalance_s: how often copies are placed anew by the load that was seen; 0 is never.
        regroup_s: a lost group that has not come back by then is left out, its experts go to the others.
        join_debounce_s: groups that come beside those that are wanted are taken in when no other has come for so long.
        num_threads: compute threads of each group on CPU, shared by the shards it serves.
        label_selector: as in AttentionConfig, `pool=experts`.
    """

    num_groups: CountOrZero = 2
    num_redundant: CountOrZero = 0
    min_copies: Count = 1
    wait_s: Seconds = 120.0
    rebalance_s: SecondsOrZero = 300.0
    regroup_s: Seconds = 60.0
    join_debounce_s: SecondsOrZero = 1.0
    num_threads: Count = 1
    num_cpus: Share = 0.1
    num_gpus: Share = 0
    label_selector: Labels | None = None


@dataclass(frozen=True, config=FROM_FILE)
class TransportConfig:
    """How dispatch and combine move bytes.

    Attributes:
        backend: gloo (CPU), nccl (GPU), local (experts inside each shard: the oracle, no expert group is started).
        timeout_s: an expert group that has not answered a layer call by then is lost.
        patience_s: where its experts have copies elsewhere, a group may be so much later than expected before they are
            asked instead.
        channel: whether shards and groups of one node use shared memory instead of gloo, and with whose processes:
            same_user, any_user (containers that run as different users), off.
        dispatch_format: how activations travel to the groups: plain (the model's dtype) or fp8 (half of bf16's bytes,
            and rounded: other text than plain's).
    """

    backend: Literal["gloo", "nccl", "local"] = "gloo"
    channel: Annotated[ChannelUsers, BeforeValidator(bare_off)] = "same_user"
    dispatch_format: RowFormatName = "plain"
    timeout_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 10.0
    patience_s: Seconds = 1.0


@dataclass(frozen=True, config=FROM_FILE)
class TlsConfig:
    """Encryption of both ports of the front door. Files are read again when they change; nothing is restarted.

    Attributes:
        cert_file, key_file: PEM, the certificate first and its chain after it; empty leaves the ports unencrypted.
        client_ca_file: PEM of those who sign clients' certificates; with it, a client without one is refused (mTLS),
            and TLS 1.3 is spoken alone.
    """

    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""

    @property
    def is_on(self) -> bool:
        return bool(self.cert_file)

    @model_validator(mode="after")
    def _belong_together(self) -> TlsConfig:
        if bool(self.cert_file) is not bool(self.key_file):
            raise ValueError("ingress.tls: cert_file and key_file belong together: give both or neither")
        if self.client_ca_file and not self.cert_file:
            raise ValueError("ingress.tls.client_ca_file: needs cert_file and key_file: without TLS nobody shows one")
        return self


@dataclass(frozen=True, config=FROM_FILE)
class ClusterTlsConfig:
    """Encryption of what the cluster's processes say to each other; moeray.mutual_tls. All three files, or none.

    Attributes:
        cert_file, key_file: PEM, for servers and clients alike; every node has its own or the same.
        ca_file: PEM of the authority that signs for this cluster, and for nobody else.
        name: the DNS name that every certificate bears.
    """

    cert_file: str = ""
    key_file: str = ""
    ca_file: str = ""
    name: Annotated[str, Field(min_length=1)] = "moeray"

    @property
    def is_on(self) -> bool:
        return bool(self.cert_file)

    @model_validator(mode="after")
    def _belong_together(self) -> ClusterTlsConfig:
        missing = [key for key in ("cert_file", "key_file", "ca_file") if not getattr(self, key)]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"cluster_tls.{missing[0]}: cert_file, key_file and ca_file belong together: give all or none"
            )
        return self


@dataclass(frozen=True, config=FROM_FILE)
class BatchConfig:
    """OpenAI's batch API: files of requests that are answered when there is room.

    Attributes:
        directory: where files and answers are kept, of every ingress the same; empty turns the API off. Several
            ingresses need a file system that they share and that has locks (flock).
        max_file_bytes, max_requests: what one input file may have.
        max_stored_bytes: of all files of a tenant, answers included; beyond, it can upload nothing.
        concurrency: requests of a batch that run at once.
        keep_s: files and ended batches are deleted after so long.
    """

    directory: str = ""
    max_file_bytes: Count = 200 << 20
    max_stored_bytes: Count = 4 << 30
    max_requests: Count = 50_000
    concurrency: Count = 16
    keep_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30 * 86_400.0


@dataclass(frozen=True, config=FROM_FILE)
class IngressConfig:
    """The front door.

    Attributes:
        host: address that both ports bind; any other than loopback needs `tenants.auth`.
        max_queued_kv: work may wait that would fill the shards' KV caches so many times, beside what fills them now;
            more is refused (429, RESOURCE_EXHAUSTED).
        max_wait_s: a request that would wait longer for its first token, as far as has been measured, is refused;
            a client that reads nothing of its stream for so long loses it.
        max_requests: requests that one ingress has in hand at once; more are refused.
        drain_s: what an ingress that stops leaves its streams to end by themselves.
        max_body_bytes: of one request, and of a gRPC message; a prompt of a million tokens takes about 8 MiB, images
            more. More is refused (413, RESOURCE_EXHAUSTED). Files of batches have a bound of their own.
        max_bodies_bytes: bodies of all HTTP requests that one ingress has in hand; beyond, 503.
        max_header_bytes: of one request's headers (431), and of a gRPC call's metadata.
        head_timeout_s: a request's headers must be there by then, and a connection without a request is closed.
        body_timeout_s: a request's body must be there by then (408).
        max_connections: of each port; then a connection without a request gives way to a new one, and where there is
            none, the new one is closed (503).
    """

    http_port: Port = 8000
    grpc_port: Port = 50051
    num_replicas: Count = 1
    host: str = "127.0.0.1"
    max_queued_kv: Share = 16.0
    max_wait_s: Seconds = 120.0
    max_requests: Count = 4096
    drain_s: SecondsOrZero = 30.0
    max_body_bytes: Annotated[int, Field(strict=True, ge=1024, lt=1 << 31)] = 32 << 20
    max_bodies_bytes: Count = 1 << 30
    max_header_bytes: Annotated[int, Field(strict=True, ge=1024, le=1 << 20)] = 32 << 10
    head_timeout_s: Seconds = 10.0
    body_timeout_s: Seconds = 60.0
    max_connections: Count = 8192
    tls: TlsConfig = Field(default_factory=TlsConfig)
    batches: BatchConfig = Field(default_factory=BatchConfig)
    num_cpus: Share = 0.1
    label_selector: Labels | None = None

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ValueError(
                f"ingress.max_bodies_bytes: {self.max_bodies_bytes} is less than one body of ingress.max_body_bytes "
                f"({self.max_body_bytes})"
            )
        return self


@dataclass(frozen=True, config=FROM_FILE)
class HealthConfig:
    """When a process counts as hung.

    Attributes:
        hang_s: one that gives no sign of life for so long is killed and replaced.
        step_s: a shard whose engine computes one step for so long is killed and replaced; what a step waits for lost
            experts does not count (experts.wait_s). Keep it far above the longest step: the largest prompt chunk
            (engine_args.max_num_batched_tokens) on the slowest node, kernels compiled at their first call included.
            At least STEP_TIMEOUTS times transport.timeout_s: a group that hangs is not known as lost before.
    """

    hang_s: Annotated[float, Field(ge=2, le=3600, allow_inf_nan=False)] = 10.0
    step_s: Annotated[float, Field(ge=2, le=86_400, allow_inf_nan=False)] = 300.0


@dataclass(frozen=True, config=FROM_FILE)
class RedisConfig:
    """Where what must outlive the controller is kept; the password comes from MOERAY_REDIS_PASSWORD.

    Attributes:
        url: redis://host:port/database, without a password; empty keeps it in Ray's own store.
    """

    url: str = ""


@dataclass(frozen=True, config=FROM_FILE)
class TenancyConfig:
    """Who may ask, and how much.

    Attributes:
        auth: required: nothing is served without a valid key, token or certificate; off: everybody who reaches the
            ports is served. Not written, it is off on loopback, and any other `ingress.host` is refused.
        file: tenants and keys (`moeray tenant`), YAML or JSON, for example a mounted Secret. Without it they are in
            Redis if `redis.url` is set, else in tenants.yaml of the state directory.
        jwks_file: public keys of an identity provider (JSON Web Key Set); needs issuer and audience.
        issuer, audience: what tokens must say.
        tenant_claim: the claim that names the tenant (`identities.jwt`).
        leeway_s: how far the clocks of provider and cluster may differ.
        on_store_failure: what becomes of requests with limits while Redis does not answer: closed refuses them (503),
            open lets each ingress keep its part of the limits by itself.
        store_timeout_s: a call of Redis that takes longer has failed.
        secret_file: at least 32 bytes, the same for all ingresses, from which cache salts are derived; without it one
            is made in the state directory.
        usage_dir: where usage records are written; without it, `usage` in the state directory.
        usage_days: days that their files are kept.
        usage: file (each ingress its own, in usage_dir) or redis (one bounded stream; needs redis.url).
    """

    auth: Annotated[Literal["off", "required"] | None, BeforeValidator(bare_off)] = None
    file: str = ""
    jwks_file: str = ""
    issuer: str = ""
    audience: str = ""
    tenant_claim: Annotated[str, Field(min_length=1)] = "sub"
    leeway_s: Annotated[float, Field(ge=0, le=300, allow_inf_nan=False)] = 30.0
    on_store_failure: Literal["closed", "open"] = "closed"
    store_timeout_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 0.5
    secret_file: str = ""
    usage: Literal["file", "redis"] = "file"
    usage_dir: str = ""
    usage_days: Count = 400

    @property
    def needs_credential(self) -> bool:
        """Whether a request without one is refused."""
        return self.auth == "required"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, config=FROM_FILE)
class ClusterConfig:
    """One cluster.

    Attributes:
        model: a bundled name (moeray-tiny), a checkpoint directory or a hub id.
        pin_cores: keep each shard and group on cores of its own (CPU pools only). Turn it off where other pinned
            programs share the machine.
    """

    model: Annotated[str, Field(min_length=1)] = "moeray-tiny"
    pin_cores: Annotated[bool, Field(strict=True)] = True
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    transport: TransportConfig = Field(default_factory=TransportConfig)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    redis: RedisConfig = Field(default_factory=RedisConfig)
    tenants: TenancyConfig = Field(default_factory=TenancyConfig)
    cluster_tls: ClusterTlsConfig = Field(default_factory=ClusterTlsConfig)
    kv_cache: KvCacheConfig = Field(default_factory=KvCacheConfig)
    engram: EngramConfig = Field(default_factory=EngramConfig)
    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)

    @model_validator(mode="after")
    def _check_autoscaling(self) -> Self:
        """A pool begins within its bounds."""
        experts, attention = self.autoscaling.experts, self.autoscaling.attention
        if experts.most and not self.num_remote_groups:
            raise ValueError(
                "autoscaling.experts.most: there are no expert groups (experts.num_groups, transport.backend)"
            )
        for key, pool, number in (
            ("attention.num_shards", attention, self.attention.num_shards),
            ("experts.num_groups", experts, self.num_remote_groups),
        ):
            if pool.most and not pool.fewest_at_night <= number <= pool.most:
                raise ValueError(
                    f"{key}: {number} is where the pool begins, but autoscaling.{key.partition('.')[0]} keeps it "
                    f"between {pool.fewest_at_night} and {pool.most}"
                )
        return self

    @model_validator(mode="after")
    def _check_cluster_tls(self) -> Self:
        if self.cluster_tls.is_on and self.backend == "nccl":
            raise ValueError(
                "cluster_tls: NCCL has no encryption. Encrypt the network below it (WireGuard, IPsec, an encrypting "
                "network plugin) and leave cluster_tls out, or write `transport.backend: gloo`"
            )
        return self

    @model_validator(mode="after")
    def _check_tenants(self) -> Self:
        """What of `tenants` depends on other keys. The message of a ValueError is what a person sees."""
        tenants, host = self.tenants, self.ingress.host
        if tenants.auth is None and not _is_loopback(host):
            raise ValueError(
                f"tenants.auth: ingress.host {host} can be reached from elsewhere: write `required`, and make keys "
                "with `moeray tenant create`; or write `off` to serve everybody who reaches it"
            )
        given = [key for key in ("jwks_file", "issuer", "audience") if getattr(tenants, key)]
        if given and len(given) < 3:
            missing = ", ".join(key for key in ("jwks_file", "issuer", "audience") if key not in given)
            raise ValueError(
                f"tenants.{given[0]}: tokens need jwks_file, issuer and audience together; missing: {missing}"
            )
        if not self.redis.url and tenants.usage == "redis":
            raise ValueError("tenants.usage: redis needs redis.url")
        if not self.redis.url and tenants.needs_credential and self.ingress.num_replicas > 1:
            raise ValueError(
                f"tenants.auth: {self.ingress.num_replicas} ingresses (ingress.num_replicas) count quotas together "
                "only in Redis: set redis.url"
            )
        return self

    @model_validator(mode="after")
    def _check_step(self) -> Self:
        """A group that hangs must be lost before the engine that waits for it is."""
        least_s = STEP_TIMEOUTS * self.transport.timeout_s
        if self.backend != "local" and self.health.step_s < least_s:
            raise ValueError(
                f"health.step_s: {self.health.step_s:g} s is less than {STEP_TIMEOUTS} times transport.timeout_s "
                f"({STEP_TIMEOUTS} x {self.transport.timeout_s:g} s = {least_s:g} s): the engine would be killed while "
                f"it waits for a hung expert group. Raise health.step_s to {least_s:g} or more, or lower "
                "transport.timeout_s"
            )
        return self

    @property
    def backend(self) -> str:
        """The transport in use: experts that stay in the shards need none."""
        return self.transport.backend if self.experts.num_groups else "local"

    @property
    def num_compute_threads(self) -> int:
        """Of all shards and groups on CPU."""
        shards = 0 if self.attention.num_gpus else self.attention.num_shards * self.attention.shard_threads
        groups = 0 if self.experts.num_gpus else self.num_remote_groups * self.experts.num_threads
        return shards + groups

    @property
    def num_threads(self) -> int:
        """Compute threads, and one more for each shard's relay."""
        return self.num_compute_threads + (0 if self.attention.num_gpus else self.attention.num_shards)

    @property
    def num_remote_groups(self) -> int:
        """Expert groups that run as processes of their own."""
        return 0 if self.backend == "local" else self.experts.num_groups
