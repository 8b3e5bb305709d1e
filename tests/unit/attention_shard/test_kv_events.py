"""What a shard makes of its engine's KV events; vLLM's own block pool and hasher are the ones that make them."""

from __future__ import annotations

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, maybe_convert_block_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from moeray.attention_shard.kv_events import CachedBlocks, is_ours
from moeray.vllm_hooks.block_hashes import KEY_BYTES, BlockLayout, block_hashes, root_hash

PROMPT = list(range(50, 90))


def vllms_hashes(salt: str | None, hash_tokens: int) -> list[bytes]:
    function = get_hash_fn_by_name("sha256")
    init_none_hash(function)
    hasher = get_request_block_hasher(hash_tokens, function)
    made = Request("r", PROMPT, SamplingParams(max_tokens=1), None, cache_salt=salt, block_hasher=hasher)
    return list(made.block_hashes)


def stored(
    hashes: list[bytes], parent: bytes | None = None, *, salt: str | None = None, group: int = 0,
    kind: str = "full_attention", block: int = 8,
) -> BlockStored:  # fmt: skip
    extra = [(salt,) if salt and parent is None and not index else None for index in range(len(hashes))]
    return BlockStored(
        [maybe_convert_block_hash(each) for each in hashes],
        parent,
        PROMPT,
        block,
        None,
        "GPU",
        None,
        extra,
        group_idx=group,
        kv_cache_spec_kind=kind,
    )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("salt", [None, "tenant-a"])
@pytest.mark.parametrize("hash_tokens", [8, 4])
def test_touch_point_an_ingress_computes_the_names_that_vllm_gives(
    salt: str | None, hash_tokens: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events tell 64 bits of a hash, or where it is so configured, all of them."""
    monkeypatch.setenv("VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", "01"[not whole])
    theirs = vllms_hashes(salt, hash_tokens)[8 // hash_tokens - 1 :: 8 // hash_tokens]
    frame = CachedBlocks("sha256").take([stored(theirs, salt=salt)])
    assert frame is not None and frame.hash_block_tokens == hash_tokens and frame.block_tokens == 8
    layout = BlockLayout(frame.algorithm, frame.root, frame.hash_block_tokens, frame.block_tokens)
    asked = EngineCoreRequest("r", PROMPT, None, None, None, 0.0, None, salt, None)
    assert list(block_hashes(layout, asked)) == frame.stored == [each[-KEY_BYTES:] for each in theirs]


def test_names_that_nobody_here_computes_are_not_told() -> None:
    assert CachedBlocks("sha256").take([stored([b"x" * 32])]) is None
    assert root_hash("xxhash") is None and CachedBlocks("xxhash").take([stored(vllms_hashes(None, 8))]) is None


def test_a_batch_tells_what_it_leaves_and_no_block_twice() -> None:
    blocks, (a, b, c, *_) = CachedBlocks("sha256"), vllms_hashes(None, 8)
    assert blocks.take([stored([a, b])]) is not None
    frame = blocks.take(
        [stored([c], b), BlockRemoved([maybe_convert_block_hash(each) for each in (b, c)], "GPU", 0), stored([b], a)]
    )
    assert frame is not None and not frame.cleared
    assert frame.stored == [b[-KEY_BYTES:]] and frame.removed == [c[-KEY_BYTES:]]
    everything = blocks.everything()
    assert (
        everything is not None
        and everything.cleared
        and sorted(everything.stored) == sorted(each[-KEY_BYTES:] for each in (a, b))
    )


def test_all_cleared_and_lost_events_leave_nothing() -> None:
    for clear in (lambda blocks: blocks.take([AllBlocksCleared()]), lambda blocks: blocks.forget()):
        blocks = CachedBlocks("sha256")
        blocks.take([stored(vllms_hashes(None, 8))])
        frame = clear(blocks)
        assert frame is not None and frame.cleared and not frame.stored


def test_caches_of_windows_and_other_groups_say_nothing_of_a_prefix() -> None:
    blocks, hashes = CachedBlocks("sha256"), vllms_hashes(None, 8)
    assert blocks.take([stored(hashes, kind="sliding_window")]) is None
    assert blocks.take([stored(hashes[:2], group=1)]) is not None
    assert blocks.take([stored(hashes, group=2), BlockRemoved(hashes, "GPU", 2)]) is None


def test_only_our_own_endpoint_is_read() -> None:
    assert is_ours("ipc:///tmp/moeray-kv-abc/events") and not is_ours("tcp://*:5557")
