"""What the ingress knows of the shards' KV caches: block hashes, as the shards tell them. Single event loop.

A hash names a whole prefix (vLLM chains it), so a prompt's longest cached prefix is the last of its hashes that a shard
holds. It is a guess at best: a block may be evicted before the request arrives, which costs time and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

from moeray.attention_shard import link as wire
from moeray.vllm_hooks.block_hashes import BlockLayout, block_hashes

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

MAX_BLOCKS = 1 << 18
"""Per shard; about 25 MB. What a larger cache holds beyond is not known here."""
MAX_LOOKED_UP = 4096
"""Blocks of one prompt that are hashed, about 10 ms: prefixes that agree for longer count as equal."""
MAX_SESSIONS = 10_000


class PrefixIndex:
    """Per shard the blocks that its KV cache holds; memory is bounded by MAX_BLOCKS per shard."""

    def __init__(self) -> None:
        self._blocks: dict[str, set[bytes]] = {}
        self._layouts: dict[str, BlockLayout] = {}

    def take(self, shard: str, frame: wire.Cached) -> None:
        """What a shard told about its cache."""
        blocks = self._blocks.setdefault(shard, set())
        if frame.cleared:
            blocks.clear()
        blocks.difference_update(frame.removed)
        blocks.update(islice(frame.stored, max(0, MAX_BLOCKS - len(blocks))))
        self._layouts[shard] = BlockLayout(frame.algorithm, frame.root, frame.hash_block_tokens, frame.block_tokens)

    def forget(self, shard: str) -> None:
        """It is gone, or its link: what it holds now is not known."""
        self._blocks.pop(shard, None)
        self._layouts.pop(shard, None)

    def num_blocks(self, shard: str) -> int:
        return len(self._blocks.get(shard, ()))

    def cached_tokens(
        self, request: EngineCoreRequest, generated: list[int], shards: Collection[str]
    ) -> dict[str, int]:
        """The longest prefix of prompt and `generated` that each shard holds, in tokens; shards with none are left out.

        Hashing ends at the first block that no shard holds: a prompt that nobody knows costs one block.
        """
        found: dict[str, int] = {}
        by_layout: dict[BlockLayout, list[str]] = {}
        for shard in shards:
            if self._blocks.get(shard):
                by_layout.setdefault(self._layouts[shard], []).append(shard)
        for layout, holders in by_layout.items():
            for index, block in enumerate(islice(block_hashes(layout, request, generated), MAX_LOOKED_UP), 1):
                holders = [shard for shard in holders if block in self._blocks[shard]]
                if not holders:
                    break
                found.update(dict.fromkeys(holders, index * layout.block_tokens))
        return found


class Sessions:
    """The shard of each session's last request; the MAX_SESSIONS used last are known."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._shards: OrderedDict[tuple[str | None, str], str] = OrderedDict()
        self._max_sessions = max_sessions

    def shard_of(self, request: EngineCoreRequest) -> str | None:
        return self._shards.get(_key(request)) if request.session_id else None

    def ran_on(self, request: EngineCoreRequest, shard: str) -> None:
        if not request.session_id:
            return
        key = _key(request)
        self._shards[key] = shard
        self._shards.move_to_end(key)
        if len(self._shards) > self._max_sessions:
            self._shards.popitem(last=False)


def _key(request: EngineCoreRequest) -> tuple[str | None, str]:
    """One tenant's session is not another's: their cache salts differ."""
    return request.cache_salt, request.session_id or ""
