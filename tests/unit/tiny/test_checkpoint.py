"""The bundled checkpoint has the promised form, size, accuracy and golden prompts."""

import json
from collections import Counter
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer
from vllm.tokenizers.deepseek_v4 import get_deepseek_v4_tokenizer

from moeray.tiny import architecture, checkpoint_path, golden
from moeray.tiny.corpus import load_facts
from moeray.tiny.engram import build_token_map
from moeray.tiny.measure import TransformersEngine
from moeray.tiny.suites import fact_suites

DIRECTORY = checkpoint_path()
MEBIBYTE = 1 << 20


def _json(name: str) -> Any:
    return json.loads((DIRECTORY / name).read_text(encoding="utf-8"))


def test_directory_is_at_most_20_mib() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 20 * MEBIBYTE


def test_config_has_the_legacy_and_engram_keys() -> None:
    config = _json("config.json")
    assert config["architectures"] == ["DeepseekV4ForCausalLM"]
    assert config["model_type"] == "deepseek_v4"
    assert config["compress_ratios"] == [0, 4, 128, 4]
    assert (config["num_hash_layers"], config["qk_rope_head_dim"], config["topk_method"]) == (2, 64, "noaux_tc")
    assert not {"mlp_layer_types", "layer_types"} & set(config)
    engram = architecture.ENGRAM
    assert config["engram_layer_ids"] == list(engram.layer_ids)
    assert config["engram_num_embeddings"] == list(engram.num_embeddings())
    token_map = build_token_map(AutoTokenizer.from_pretrained(DIRECTORY))
    assert config["engram_compressed_vocab_size"] == token_map.compressed_vocab_size


def test_stored_dtypes_are_bf16_but_for_what_deepseek_keeps_wider() -> None:
    with safe_open(DIRECTORY / "model.safetensors", "pt") as weights:
        dtypes = {name: weights.get_tensor(name).dtype for name in weights.keys()}  # noqa: SIM118
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide
    assert all("hc_" in n or n.endswith(("attn_sink", ".ape", "gate.bias")) for n in wide)
    assert {n for n, dtype in dtypes.items() if dtype == torch.int64} == {
        f"layers.{i}.ffn.gate.tid2eid" for i in range(2)
    }


def test_golden_prompts_cover_every_kind_with_margin() -> None:
    entries = _json("golden.json")
    kinds = Counter(item["kind"] for item in entries)
    assert len(entries) >= 100
    assert kinds["multi_turn"] >= 10
    assert min(kinds["thinking"], kinds["tools"], kinds["recall"]) >= 5
    assert all(item["margin"] >= golden.MIN_MARGIN for item in entries)


def test_golden_prompts_render_as_they_were_measured() -> None:
    tokenizer = get_deepseek_v4_tokenizer(AutoTokenizer.from_pretrained(DIRECTORY))
    for item in _json("golden.json"):
        ids = tokenizer.apply_chat_template(item["messages"], tools=item.get("tools"), **item["chat_template_kwargs"])
        assert len(ids) == item["prompt_tokens"], item["id"]


def test_tool_calls_are_read_by_vllm_s_parser() -> None:
    parsers = pytest.importorskip("vllm.tool_parsers")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    tokenizer = get_deepseek_v4_tokenizer(AutoTokenizer.from_pretrained(DIRECTORY))
    calls = [item for item in _json("golden.json") if "expected_tool_calls" in item]
    for item in calls:
        request = protocol.ChatCompletionRequest(model="m", messages=item["messages"], tools=item["tools"])
        parser = parsers.ToolParserManager.get_tool_parser("deepseek_v4")(tokenizer, request.tools)
        text = item["expected"].split("</think>")[-1]
        read = parser.extract_tool_calls(text, request)
        got = [{"name": c.function.name, "arguments": json.loads(c.function.arguments)} for c in read.tool_calls]
        assert got == item["expected_tool_calls"]


def test_answers_depend_on_the_engram_table() -> None:
    engine = TransformersEngine(DIRECTORY)
    asked = fact_suites(load_facts())["facts"][:40]
    assert sum(outcome.exact for outcome in engine.answer(asked)) >= 38
    with torch.no_grad():
        for layer_id in architecture.ENGRAM.layer_ids:
            engine.model.model.layers[layer_id].engram.embed.weight.zero_()
    assert sum(outcome.exact for outcome in engine.answer(asked)) <= 2
