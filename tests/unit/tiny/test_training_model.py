"""The fast training model computes what transformers' DeepSeek-V4 computes."""

import pytest
import torch
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from moeray.tiny import architecture, attention, export, streams
from moeray.tiny.engram import TokenMap

VOCAB = 300
TOKEN_MAP = TokenMap(tuple(range(VOCAB)), VOCAB)


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    built = architecture.build_model(VOCAB, TOKEN_MAP)
    architecture.initialise(built, seed=1)
    return built.eval()


def _logits(model: DeepseekV4ForCausalLM, length: int) -> torch.Tensor:
    ids = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("length", [1, 7, 130, 256, 257, 400])
def test_attention_equals_transformers_eager(
    model: DeepseekV4ForCausalLM, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = _logits(model, length)
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    monkeypatch.setattr(modeling.DeepseekV4Indexer, "forward", attention._full_indexer)
    assert torch.allclose(fast, _logits(model, length), atol=2e-4)


def test_streams_equal_transformers_hyper_connection(model: DeepseekV4ForCausalLM) -> None:
    config = model.config
    connection = modeling.DeepseekV4HyperConnection(config)
    torch.nn.init.normal_(connection.fn, std=0.05)
    torch.nn.init.normal_(connection.base)
    torch.nn.init.ones_(connection.scale)
    x = torch.randn(2, 5, config.hc_mult, config.hidden_size)
    ours, theirs = streams.mixing_weights(connection, x), streams.transformers_mixing(connection, x)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)


def test_export_and_read_round_trip_within_bf16(model: DeepseekV4ForCausalLM) -> None:
    state = model.state_dict()
    back = export.training_state(export.native_state(state), list(state))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.allclose(back[name].float(), tensor.float(), rtol=2**-8, atol=0), name


def test_native_names_are_unique_and_deepseek_s(model: DeepseekV4ForCausalLM) -> None:
    names = export.native_state(model.state_dict())
    for expected in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "hc_head_fn",
        "layers.0.ffn.gate.tid2eid",
        "layers.1.attn.indexer.compressor.ape",
        "layers.1.attn.indexer.wq_b.weight",
        "layers.1.attn.kv_norm.weight",
        "layers.1.engram.embed.weight",
        "layers.1.engram.wkv.weight",
        "layers.2.engram.q_weight",
        "layers.2.ffn.gate.bias",
        "layers.3.ffn.experts.15.w3.weight",
        "layers.3.hc_attn_base",
    ):
        assert expected in names
    assert not any("self_attn" in name or name.startswith("model.") for name in names)


def test_bias_moves_against_the_load(model: DeepseekV4ForCausalLM) -> None:
    balancer = architecture.BiasBalancer(model)
    router, counts = balancer.routers[0], balancer.counts[0]
    before = router.e_score_correction_bias.clone()
    counts.copy_(torch.arange(len(counts)))
    balancer.step(0.5)
    moved = router.e_score_correction_bias - before
    assert moved[0] == 0.5
    assert moved[-1] == -0.5
    router.e_score_correction_bias.copy_(before)
