"""The names that vLLM's prefix cache gives to blocks, computed by vLLM's own functions outside of its engine.

Their last KEY_BYTES are kept and sent, which is what vLLM's events have: two prefixes that collide cost a detour, never
a wrong answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest

KEY_BYTES = 8
_DIGEST = re.compile(r"sha256(_cbor)?")
"""The algorithms whose root does not depend on the process; vLLM draws the others' by chance."""
_MAX_HASHES_PER_BLOCK = 64


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """How one engine names its blocks.

    Attributes:
        algorithm: vLLM's `prefix_caching_hash_algo`.
        root: parent hash of a first block.
        hash_block_tokens: tokens per hash in the chain.
        block_tokens: tokens per block of the cache, a multiple of it; a block has the last of its hashes.
    """

    algorithm: str
    root: bytes
    hash_block_tokens: int
    block_tokens: int


def key(block_hash: bytes | int) -> bytes:
    """Of a hash as vLLM computes it, or as its events tell it: by default the last 64 bits, as an integer."""
    return block_hash[-KEY_BYTES:] if isinstance(block_hash, bytes) else block_hash.to_bytes(KEY_BYTES, "big")


def root_hash(algorithm: str) -> bytes | None:
    """Of engines that this process starts; None if vLLM draws it by chance."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    if not _DIGEST.fullmatch(algorithm):
        return None
    function = get_hash_fn_by_name(algorithm)
    return function(resolve_none_hash_seed(function))


def block_hashes(
    layout: BlockLayout, request: EngineCoreRequest, generated: list[int] | None = None
) -> Iterator[bytes]:
    """Keys of the full blocks of prompt and `generated`, each computed when it is asked for.

    Empty for prompts given as embeddings, whose keys only the engine can compute.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens

    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        return
    token_ids = request.prompt_token_ids + generated if generated else request.prompt_token_ids
    function: Callable[[Any], bytes] = get_hash_fn_by_name(layout.algorithm)
    parent, mm_index, step = layout.root, 0, layout.hash_block_tokens
    for start in range(0, len(token_ids) - step + 1, step):
        end = start + step
        extra, mm_index = generate_block_hash_extra_keys(request, start, end, mm_index)  # type: ignore[arg-type]
        parent = hash_block_tokens(function, parent, token_ids[start:end], extra)  # type: ignore[arg-type]
        if end % layout.block_tokens == 0:
            yield key(parent)


def layout_of(
    algorithm: str, root: bytes, block_tokens: int, token_ids: list[int], cache_salt: str | None, stored: bytes
) -> BlockLayout | None:
    """The layout in which a first block, known to be stored under the key `stored`, has that name.

    Args:
        token_ids: of the block, at least `block_tokens`.
    Returns:
        None if there is none, as when vLLM computes its names in another way: then nobody must guess.
    """
    from vllm.v1.engine import EngineCoreRequest

    first = EngineCoreRequest("", token_ids[:block_tokens], None, None, None, 0.0, None, cache_salt, None)
    for parts in range(1, _MAX_HASHES_PER_BLOCK + 1):
        if block_tokens % parts == 0:
            layout = BlockLayout(algorithm, root, block_tokens // parts, block_tokens)
            if next(islice(block_hashes(layout, first), 1), None) == stored:
                return layout
    return None
