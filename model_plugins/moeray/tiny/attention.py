"""Attention of the training model: exact, without a cache, and fast on one CPU core.

V4 attends, with one softmax and a sink, to the last 128 tokens and to compressed entries. Up to
``DENSE_LENGTH`` tokens one product over all keys is fastest; above it, the window is computed in
blocks of 128 queries x 256 keys. Both give what transformers' eager attention gives.

Shape suffixes: B batch, N heads, S queries, K keys (tokens, then compressed entries), E compressed
entries, D head, G blocks, W window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

NAME = "moeray_banded"
DENSE_LENGTH = 256
WINDOW = 128

_full_indexer = modeling.DeepseekV4Indexer.forward


def install() -> None:
    """Register the attention under ``NAME`` and skip indexers that could not drop an entry."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    modeling.DeepseekV4Indexer.forward = select_entries  # type: ignore[method-assign, assignment]


def select_entries(
    indexer: Any,
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> Tensor:
    """Return the compressed entries each query may read: int64 [B, S, k], -1 for none.

    While there are no more than ``index_topk`` entries the indexer keeps every past one, so its
    scores need no computing unless they are being taught.
    """
    batch, length, _ = hidden_states.shape
    num_entries = length // indexer.compress_rate
    taught = getattr(indexer, "taught", False)
    if not taught and past_key_values is None and num_entries <= indexer.index_topk:
        entries = torch.arange(num_entries).expand(batch, length, -1)
        num_past = (position_ids + 1) // indexer.compress_rate
        return torch.where(entries < num_past[..., None], entries, -1)
    chosen: Tensor = _full_indexer(
        indexer, hidden_states.detach(), q_residual.detach(), position_ids, past_key_values, layer_idx
    )
    return chosen


def attend(
    module: Any,
    query_BNSD: Tensor,
    key_B1KD: Tensor,
    value_B1KD: Tensor,
    mask_B1SK: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return the attention output [B, S, N, D] (keys are the values) and no weights.

    ``mask_B1SK`` is additive. With a cache (fewer keys than the layout above) transformers' own
    attention runs instead.
    """
    length, num_keys = query_BNSD.shape[2], key_B1KD.shape[2]
    if num_keys < length or (length == 1 and num_keys > 1):
        result: tuple[Tensor, Tensor | None] = modeling.eager_attention_forward(
            module, query_BNSD, key_B1KD, value_B1KD, mask_B1SK, scaling, dropout
        )
        return result
    sink_BNS1 = module.sinks.view(1, -1, 1, 1).expand(*query_BNSD.shape[:3], 1)
    key_BKD = key_B1KD[:, 0]
    if length <= DENSE_LENGTH:
        output, entry_weights = _attend_dense(query_BNSD, key_BKD, mask_B1SK, sink_BNS1, scaling)
    else:
        output, entry_weights = _attend_banded(query_BNSD, key_BKD, mask_B1SK, sink_BNS1, scaling)
    listener = getattr(module, "listener", None)
    if listener is not None:
        listener.record_attention(entry_weights)
    return output.transpose(1, 2), None


def _attend_dense(
    query_BNSD: Tensor, key_BKD: Tensor, mask_B1SK: Tensor, sink_BNS1: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query_BNSD.shape
    flat = query_BNSD.reshape(batch, heads * length, dim)
    logits = (flat @ key_BKD.transpose(1, 2)).view(batch, heads, length, -1) * scaling + mask_B1SK
    weights = torch.cat([logits, sink_BNS1], dim=-1).softmax(-1)[..., :-1]
    output = weights.reshape(batch, heads * length, -1) @ key_BKD
    return output.view(batch, heads, length, dim), weights[..., length:]


def _attend_banded(
    query_BNSD: Tensor, key_BKD: Tensor, mask_B1SK: Tensor, sink_BNS1: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, dim = query_BNSD.shape
    blocks = -(-length // WINDOW)
    short = blocks * WINDOW - length
    padded = functional.pad(query_BNSD, (0, 0, 0, short))
    query_BGQD = (
        padded.view(batch, heads, blocks, WINDOW, dim).transpose(1, 2).reshape(batch, blocks, heads * WINDOW, dim)
    )
    key_BGKD = _key_blocks(key_BKD[:, :length], blocks)
    band = (query_BGQD @ key_BGKD.transpose(2, 3)) * scaling
    band = band.view(batch, blocks, heads, WINDOW, 2 * WINDOW) + _band_mask(blocks)
    logits = band.transpose(1, 2).reshape(batch, heads, blocks * WINDOW, 2 * WINDOW)[:, :, :length]
    entries_BED = key_BKD[:, length:]
    flat = query_BNSD.reshape(batch, heads * length, dim)
    entry_logits = (flat @ entries_BED.transpose(1, 2)).view(batch, heads, length, -1) * scaling
    entry_logits = entry_logits + mask_B1SK[..., length:]
    weights = torch.cat([logits, entry_logits, sink_BNS1], dim=-1).softmax(-1)
    band_weights = functional.pad(weights[..., : 2 * WINDOW], (0, 0, 0, short))
    band_weights = band_weights.view(batch, heads, blocks, WINDOW, 2 * WINDOW).transpose(1, 2)
    local = band_weights.reshape(batch, blocks, heads * WINDOW, 2 * WINDOW) @ key_BGKD
    local = local.view(batch, blocks, heads, WINDOW, dim).transpose(1, 2)
    local = local.reshape(batch, heads, blocks * WINDOW, dim)[:, :, :length]
    entry_weights = weights[..., 2 * WINDOW : -1]
    distant = entry_weights.reshape(batch, heads * length, -1) @ entries_BED
    return local + distant.view(batch, heads, length, dim), entry_weights


def _key_blocks(key_BSD: Tensor, blocks: int) -> Tensor:
    """Return for each block of queries the keys of its own and the previous block: [B, G, 2W, D]."""
    batch, length, dim = key_BSD.shape
    padded = functional.pad(key_BSD, (0, 0, WINDOW, blocks * WINDOW - length))
    previous = padded[:, :-WINDOW].view(batch, blocks, WINDOW, dim)
    own = padded[:, WINDOW:].view(batch, blocks, WINDOW, dim)
    return torch.cat([previous, own], dim=2)


def _band_mask(blocks: int) -> Tensor:
    """Return the additive mask [G, 1, W, 2W]: causal, at most ``WINDOW`` tokens back."""
    query = torch.arange(WINDOW)[:, None]
    key = torch.arange(2 * WINDOW)[None] - WINDOW
    near = (key <= query) & (key > query - WINDOW)
    exists = (torch.arange(blocks) > 0)[:, None, None, None] | (key >= 0)
    return torch.where(near & exists, 0.0, float("-inf"))
