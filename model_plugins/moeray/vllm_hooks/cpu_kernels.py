"""PyTorch versions of the Triton kernels that vLLM's DeepSeek-V4 launches on CPU, where there is no Triton.

All of them prepare metadata: a few integers per request or token. They are installed through vLLM's own override
registry, so parameter names and order are those of the kernels they stand for.

Suffixes: T tokens, R requests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_MLA = "vllm.v1.attention.backends.mla."


def token_request_mapping(
    query_start_loc: Tensor, output: Tensor, num_reqs: int, num_mapped: int, num_tokens: int
) -> None:
    """output[t] = request of token t; 0 from `num_mapped` on."""
    starts = query_start_loc[: num_reqs + 1]
    token_T = torch.arange(num_tokens, dtype=starts.dtype)
    request_T = torch.searchsorted(starts[1:].contiguous(), token_T, right=True).clamp_(max=num_reqs - 1)
    request_T[num_mapped:] = 0
    output[:num_tokens] = request_T.to(output.dtype)


def prefill_gather_lengths(
    prefill_gather_lens_ptr: Tensor,
    seq_lens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    replay_start_ptr: Tensor,
    num_prefills: int,
    num_decodes: int,
    window_size: int,
    BLOCK_SIZE: int,
) -> None:
    """Window KV entries each prefill reads: its own tokens and at most window - 1 before them."""
    prefills = slice(num_decodes, num_decodes + num_prefills)
    starts = query_start_loc_ptr[num_decodes : num_decodes + num_prefills + 1]
    query_len_R = starts[1:] - starts[:-1]
    visible_R = (seq_lens_ptr[prefills] - query_len_R - replay_start_ptr[prefills]).clamp(min=0)
    gather_R = query_len_R + visible_R.clamp(max=window_size - 1)
    prefill_gather_lens_ptr[:num_prefills] = gather_R.to(prefill_gather_lens_ptr.dtype)


def window_indices(*_: Any, **__: Any) -> None:
    """Nothing: V4's CPU attention finds the window's slots itself and never reads these indices."""


def compressed_slot_mapping(
    compressed_slot_mapping_ptr: Tensor,
    slot_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    block_size: int,
    dcp_world_size: int,
    cp_interleave: int,
    COMPRESS_RATIO: int,
    PAD_ID: int,
    TRITON_BLOCK_SIZE: int,
) -> None:
    """Slot of the compressed entry that a token completes; PAD_ID for the tokens between."""
    if dcp_world_size != 1:
        raise NotImplementedError(f"decode context parallelism of {dcp_world_size} is not supported on CPU")
    num_reqs = min(block_table_ptr.shape[0], query_start_loc_ptr.shape[0] - 1)
    starts = query_start_loc_ptr[: num_reqs + 1].long()
    query_len_R = starts[1:] - starts[:-1]
    request_T = torch.repeat_interleave(torch.arange(num_reqs), query_len_R)
    token_T = torch.arange(len(request_T)) + starts[0]
    position_T = (seq_lens_ptr[:num_reqs].long() - query_len_R)[request_T] + token_T - starts[:-1][request_T]
    completes_T = ((position_T + 1) % COMPRESS_RATIO == 0) & (slot_mapping_ptr[token_T] != PAD_ID)
    entry_T = torch.where(completes_T, position_T // COMPRESS_RATIO, 0)
    slot_T = block_table_ptr[request_T, entry_T // block_size].long() * block_size + entry_T % block_size
    compressed_slot_mapping_ptr[token_T] = torch.where(completes_T, slot_T, PAD_ID).to(
        compressed_slot_mapping_ptr.dtype
    )


def build_prefill_chunk(
    query_start_loc_ptr: Tensor,
    uncompressed_seq_lens_ptr: Tensor,
    cu_compressed_seq_lens_ptr: Tensor,
    row_start_cu_compressed_seq_lens_ptr: Tensor,
    token_to_seq_ptr: Tensor,
    cu_compressed_seq_len_ks_ptr: Tensor,
    cu_compressed_seq_len_ke_ptr: Tensor,
    query_slice_start: int,
    query_slice_stop: int,
    DCP_RANK: int,
    DCP_WORLD: int,
    DCP_INTERLEAVE: int,
    BLOCK_SIZE: int,
    COMPRESS_RATIO: int,
) -> None:
    """Per query token of the slice: first and one-past-last compressed entry it may see; per entry: its request."""
    if DCP_WORLD != 1:
        raise NotImplementedError(f"decode context parallelism of {DCP_WORLD} is not supported on CPU")
    for request in range(uncompressed_seq_lens_ptr.shape[0]):
        first, last = int(query_start_loc_ptr[request]), int(query_start_loc_ptr[request + 1])
        in_slice = range(max(first, query_slice_start), min(last, query_slice_stop))
        offset_T = torch.tensor(in_slice, dtype=torch.int64) - first
        out_T = offset_T + first - query_slice_start
        row_start = row_start_cu_compressed_seq_lens_ptr[request]
        context_T = int(uncompressed_seq_lens_ptr[request]) - (last - first) + 1 + offset_T
        cu_compressed_seq_len_ks_ptr[out_T] = row_start
        cu_compressed_seq_len_ke_ptr[out_T] = (row_start + context_T // COMPRESS_RATIO).to(
            cu_compressed_seq_len_ke_ptr.dtype
        )
        token_to_seq_ptr[int(cu_compressed_seq_lens_ptr[request]) : int(cu_compressed_seq_lens_ptr[request + 1])] = (
            request
        )


OVERRIDES: dict[str, Callable[..., None]] = {
    "vllm.v1.attention.ops.metadata._token_request_mapping_kernel": token_request_mapping,
    _MLA + "sparse_swa.ComputePrefillMetadataKernel.kernel": prefill_gather_lengths,
    _MLA + "sparse_swa.ComputeSWAIndicesAndLensKernel.kernel": window_indices,
    _MLA + "compressor_utils.CompressedSlotMappingKernel.kernel": compressed_slot_mapping,
    _MLA + "indexer.BuildPrefillChunkMetadataKernel.kernel": build_prefill_chunk,
}


def install() -> None:
    """Register the kernels and complete the tile-scheduler table; nothing where Triton is there."""
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        return
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({name: _without_launch_options(kernel) for name, kernel in OVERRIDES.items()})
    _complete_tile_scheduler()


def _without_launch_options(kernel: Callable[..., None]) -> Callable[..., None]:
    """Same parameters (vLLM binds by them), but a launch may add Triton's own options."""

    @wraps(kernel)
    def launch(*args: Any, num_warps: int | None = None, **kwargs: Any) -> None:
        kernel(*args, **kwargs)

    return launch


def _complete_tile_scheduler() -> None:
    """VLLM's CPU builder names three of the five layer types and then asks for all of them (KeyError 'c1a')."""
    from vllm.models.deepseek_v4.cpu.cpu_mla import DeepseekV4CPUSparseSWAMetadataBuilder
    from vllm.v1.attention.backends.mla import sparse_swa

    layer_types = tuple(value for name, value in vars(sparse_swa).items() if name.startswith("_LAYER_TYPE_"))

    def build_tile_scheduler(self: Any, num_decode_tokens: int) -> dict[str, None]:
        return dict.fromkeys(layer_types)

    DeepseekV4CPUSparseSWAMetadataBuilder.build_tile_scheduler = build_tile_scheduler  # type: ignore[method-assign, assignment, unused-ignore]
