"""The engine's KV cache as its own events tell it, for the ingresses that ask (vLLM's `KVEventsConfig`).

EngineCore publishes on a Unix socket in a directory that only this user can enter. What was told is kept, because an
ingress that joins later must hear all of it; it is bounded by the engine's number of blocks.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from moeray.attention_shard import link as wire
from moeray.vllm_hooks.block_hashes import BlockLayout, key, layout_of, root_hash

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

logger = logging.getLogger(__name__)

KINDS = frozenset({"full_attention", "mla_attention"})
"""Caches that hold every token of a prefix; windows and states hold its end only and say nothing of its length."""


_PREFIX = "moeray-kv-"


def publish_events(config: VllmConfig) -> None:
    """Have the engine tell what its prefix cache holds, unless it has none or whoever configured it listens already."""
    from vllm.config.kv_events import KVEventsConfig

    if config.kv_events_config is None and config.cache_config.enable_prefix_caching:
        endpoint = f"ipc://{Path(tempfile.mkdtemp(prefix=_PREFIX)) / 'events'}"
        config.kv_events_config = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)


def is_ours(endpoint: str) -> bool:
    """Whether `publish_events` chose it."""
    return endpoint.startswith("ipc://") and Path(endpoint).parent.name.startswith(_PREFIX)


class CachedBlocks:
    """The blocks of one engine, by key. Understands the first group of full attention and leaves the others out."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm, self._root = algorithm, root_hash(algorithm)
        self._group: int | None = None
        self._layout: BlockLayout | None = None
        self._keys: dict[bytes, None] = {}  # in order, so that the oldest comes first in a report

    def take(self, events: list[BlockStored | BlockRemoved | AllBlocksCleared]) -> wire.Cached | None:
        """Apply one batch; returns what an ingress must hear of it, None if nothing."""
        from vllm.distributed.kv_events import MEDIUM_GPU, AllBlocksCleared, BlockStored

        stored: dict[bytes, None] = {}
        removed: dict[bytes, None] = {}
        cleared = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._keys.clear()
                stored, removed, cleared = {}, {}, True
            elif event.medium != MEDIUM_GPU:  # vLLM's word for the engine's own cache, on CPU too
                continue
            elif isinstance(event, BlockStored):
                for name in self._stored(event):
                    removed.pop(name, None)
                    self._keys[name] = stored[name] = None
            elif event.group_idx == self._group:
                for name in map(key, event.block_hashes):
                    self._keys.pop(name, None)
                    stored.pop(name, None)
                    removed[name] = None
        return self._frame(stored, removed, cleared) if stored or removed or cleared else None

    def everything(self, cleared: bool = True) -> wire.Cached | None:
        """All that is held, for an ingress that knows nothing yet; None before the first block."""
        return self._frame(self._keys, {}, cleared)

    def forget(self) -> wire.Cached | None:
        """Events were lost: nothing is known any more."""
        self._keys.clear()
        return self.everything()

    def _stored(self, event: BlockStored) -> list[bytes]:
        if event.kv_cache_spec_kind not in KINDS or self._group not in (None, event.group_idx):
            return []
        if self._layout is None and not self._learn(event):
            return []
        return [key(each) for each in event.block_hashes]

    def _learn(self, event: BlockStored) -> bool:
        """Find out how blocks are named from the first block of a prompt of plain text."""
        if self._root is None or event.parent_block_hash is not None or not event.block_hashes or event.lora_name:
            return False
        extra = (event.extra_keys or [None])[0] or ()
        if not all(isinstance(each, str) for each in extra) or len(extra) > 1:
            return False
        salt = extra[0] if extra else None
        first = key(event.block_hashes[0])
        self._layout = layout_of(self._algorithm, self._root, event.block_size, event.token_ids, salt, first)
        if self._layout is None:
            logger.warning("vLLM names its cached blocks in a way that is not known here: routing goes by load alone")
            self._root = None
            return False
        self._group = event.group_idx
        return True

    def _frame(self, stored: dict[bytes, None], removed: dict[bytes, None], cleared: bool) -> wire.Cached | None:
        if (layout := self._layout) is None:
            return None
        return wire.Cached(
            layout.algorithm, layout.root, layout.hash_block_tokens, layout.block_tokens,
            list(stored), list(removed), cleared,
        )  # fmt: skip


async def follow(endpoint: str, blocks: CachedBlocks, tell: Callable[[wire.Cached], None]) -> None:
    """Read an engine's events for ever and `tell` what changed. A gap in their numbers forgets everything."""
    import zmq
    import zmq.asyncio
    from vllm.distributed.kv_events import KVEventBatch

    decode: Callable[[bytes], KVEventBatch] = msgspec.msgpack.Decoder(KVEventBatch).decode
    expected = 0
    with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, 0)  # the set is bounded, and a dropped batch would cost all of it
        socket.subscribe(b"")
        socket.connect(endpoint)
        while True:
            _, number, payload = await socket.recv_multipart()
            if int.from_bytes(number, "big") != expected and (frame := blocks.forget()) is not None:
                tell(frame)
            if not expected:  # both ends are connected for good: leave nothing on the disk
                shutil.rmtree(Path(endpoint.removeprefix("ipc://")).parent, ignore_errors=True)
            expected = int.from_bytes(number, "big") + 1
            if (frame := blocks.take(decode(payload).events)) is not None:
                tell(frame)
