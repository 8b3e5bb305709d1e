"""The reference Engram addresses its rows exactly as vLLM's does."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from moeray.tiny import checkpoint_path
from moeray.tiny.engram import Engram, EngramConfig, TokenMap, build_token_map, hash_multipliers

CONFIG = EngramConfig()
TOKEN_MAP = TokenMap(tuple(min(i, 900) for i in range(1000)), 901)


def _engram(layer_id: int = 1) -> Engram:
    torch.manual_seed(0)
    return Engram(CONFIG, layer_id, TOKEN_MAP, hidden_size=16, hc_mult=4, rms_norm_eps=1e-6)


def test_primes_multipliers_and_offsets_equal_vllm() -> None:
    theirs = pytest.importorskip("vllm.models.deepseek_v41.common.engram")
    layout = theirs.EngramLayout(
        SimpleNamespace(
            engram_layer_ids=CONFIG.layer_ids,
            engram_num_embeddings=CONFIG.num_embeddings(),
            engram_max_ngram_size=CONFIG.max_ngram_size,
            engram_n_heads=CONFIG.n_heads,
            engram_head_dim=CONFIG.head_dim,
            engram_compressed_vocab_size=901,
            engram_pad_token_id=CONFIG.pad_token_id,
            engram_vocab_size=CONFIG.vocab_size,
        )
    )
    flat = tuple(tuple(p for order in layer for p in order) for layer in layout.primes)
    assert CONFIG.primes() == flat
    for index, layer_id in enumerate(CONFIG.layer_ids):
        assert _engram(layer_id).offsets.tolist() == layout.offsets[index].tolist()
    multipliers = theirs.compute_hash_multipliers(CONFIG.layer_ids, CONFIG.max_ngram_size, 901)
    ours = [hash_multipliers(i, CONFIG.max_ngram_size, 901) for i in CONFIG.layer_ids]
    assert multipliers.tolist() == ours


def test_token_map_equals_vllm() -> None:
    theirs = pytest.importorskip("vllm.models.deepseek_v41.common.engram")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    lookup, size = theirs.build_compressed_token_map(tokenizer)
    token_map = build_token_map(tokenizer)
    assert (list(token_map.compressed_ids), token_map.compressed_vocab_size) == (lookup, size)


def test_rows_depend_on_the_last_four_tokens_only() -> None:
    engram = _engram()
    ids = torch.randint(0, 900, (1, 20), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 900
    differs = (engram.rows(ids) != engram.rows(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [3, 4, 5, 6]


def test_tokens_with_one_compressed_id_share_rows() -> None:
    engram = _engram()
    assert torch.equal(engram.rows(torch.tensor([[5, 950]])), engram.rows(torch.tensor([[5, 999]])))


def test_rows_stay_inside_their_column() -> None:
    engram = _engram(2)
    ids = torch.randint(0, 1000, (4, 200), generator=torch.Generator().manual_seed(2))
    rows = engram.rows(ids) - engram.offsets
    assert int(rows.min()) >= 0
    assert bool((rows < engram.primes).all())


def test_history_before_the_start_is_the_mapped_pad_token() -> None:
    engram = _engram()
    pad = CONFIG.pad_token_id
    padded = engram.rows(torch.tensor([[pad, pad, pad, 7, 8]]))[:, 3:]
    assert torch.equal(engram.rows(torch.tensor([[7, 8]])), padded)


def test_gate_matches_a_loop_over_scalars() -> None:
    engram = _engram()
    torch.nn.init.normal_(engram.q_weight)
    h = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[11, 12]])
    out = engram(h, ids)
    kv = engram.wkv(engram.embed(engram.rows(ids)).flatten(-2))[0]
    for token in range(2):
        value = kv[token, 64:]
        for stream in range(4):
            x, key = h[0, token, stream], kv[token, stream * 16 : stream * 16 + 16]
            rms = ((x.square().mean() + 1e-6) * (key.square().mean() + 1e-6)).sqrt()
            dot = (x * engram.q_weight[stream] * engram.k_weight[stream] * key).sum() / rms / 4
            gate = torch.sigmoid(dot.sign() * dot.abs().clamp_min(1e-6).sqrt())
            assert torch.allclose(out[0, token, stream], x + gate * value, atol=1e-6)
