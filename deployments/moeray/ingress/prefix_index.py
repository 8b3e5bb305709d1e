"""What the ingress knows of the shards' KV caches: block hashes, as the shards tell them. Single event loop.

A hash names a whole prefix (vLLM chains it), so a prompt's longest cached prefix is the last of its hashes that a shard
holds. What a shard computes it also gives to the stores that it shares with others (`kv_cache`): the index remembers
what each of these *places* was given. It is a guess at best: a block may be evicted before the request arrives, or long
ago, which costs time and nothing else.
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
"""Per shard; about 30 MB. What a larger cache holds beyond is not known here."""
MAX_LOOKED_UP = 4096
"""Blocks of one prompt that are hashed, about 10 ms: prefixes that agree for longer count as equal."""
MAX_SESSIONS = 10_000


class PrefixIndex:
    """Per holder (a shard or a place) the blocks that it has; at most MAX_BLOCKS of each."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[bytes, None]] = {}
        self._layouts: dict[str, BlockLayout] = {}

    def take(self, shard: str, frame: wire.Cached, places: Collection[str] = ()) -> None:
        """What a shard told of its cache. What is new there is at these places, too, and stays when it is evicted."""
        blocks = self._blocks.setdefault(shard, {})
        if frame.cleared:
            blocks.clear()
        for block in frame.removed:
            blocks.pop(block, None)
        blocks.update(dict.fromkeys(islice(frame.stored, max(0, MAX_BLOCKS - len(blocks)))))
        layout = BlockLayout(frame.algorithm, frame.root, frame.hash_block_tokens, frame.block_tokens)
        self._layouts[shard] = layout
        for place in places:
            self._remember(place, layout, frame.stored)

    def _remember(self, place: str, layout: BlockLayout, stored: list[bytes]) -> None:
        if self._layouts.get(place) != layout:  # blocks of another model or version are of no use
            self._blocks[place], self._layouts[place] = {}, layout
        blocks = self._blocks[place]
        for block in stored:
            blocks.pop(block, None)
            blocks[block] = None
        for block in list(islice(blocks, max(0, len(blocks) - MAX_BLOCKS))):
            del blocks[block]

    def forget(self, shard: str) -> None:
        """It is gone, or its link: what it holds now is not known. What it gave to a place is still there."""
        self._blocks.pop(shard, None)
        self._layouts.pop(shard, None)

    def num_blocks(self, shard: str) -> int:
        return len(self._blocks.get(shard, ()))

    def cached_tokens(
        self, request: EngineCoreRequest, generated: list[int], holders: Collection[str]
    ) -> dict[str, int]:
        """The longest prefix of prompt and `generated` that each holder has, in tokens; those with none are left out.

        Hashing ends at the first block that nobody has: a prompt that nobody knows costs one block.
        """
        found: dict[str, int] = {}
        by_layout: dict[BlockLayout, list[str]] = {}
        for holder in dict.fromkeys(holders):
            if self._blocks.get(holder):
                by_layout.setdefault(self._layouts[holder], []).append(holder)
        for layout, having in by_layout.items():
            for index, block in enumerate(islice(block_hashes(layout, request, generated), MAX_LOOKED_UP), 1):
                having = [holder for holder in having if block in self._blocks[holder]]
                if not having:
                    break
                found.update(dict.fromkeys(having, index * layout.block_tokens))
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
