"""`experts: {num_groups: 0}`: any model that vLLM serves, behind the same front; and DeepSeek-V3, split and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clusters import Cluster, cluster
from small_models import write_deepseek_v3, write_dense, write_qwen_moe

from moeray.cli.chat import ask_grpc

QUESTION = "How many arms?"
NUM_TOKENS = 12
SMALL = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}


def config_of(model: Path, num_groups: int, **engine_args: Any) -> dict[str, Any]:
    if not num_groups:  # vLLM would turn a float32 checkpoint into bfloat16; a shard with expert groups keeps it
        engine_args["dtype"] = "float32"
    return {
        "model": str(model),
        "attention": {"num_shards": 1, "engine_args": SMALL | engine_args},
        "experts": {"num_groups": num_groups},
    }


def ask(running: Cluster) -> dict[str, Any]:
    """One greedy chat over HTTP: the choice, with token ids and logprobs."""
    body = {
        "model": running.status()["model"], "messages": [{"role": "user", "content": QUESTION}], "temperature": 0,
        "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True, "logprobs": True,
    }  # fmt: skip
    status, answer = running.post("/v1/chat/completions", body)
    assert status == 200, answer
    (choice,) = answer["choices"]
    return {"prompt": answer["prompt_token_ids"], **choice}


def expected(model: Path) -> tuple[list[int], list[int], list[float]]:
    """(prompt, greedy answer, its logprobs) of transformers in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    messages = [{"role": "user", "content": QUESTION}]
    tokens: list[int] = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    num_prompt, logprobs = len(tokens), []
    with torch.no_grad():
        for _ in range(NUM_TOKENS):
            best = reference(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).max(0)
            tokens.append(int(best.indices))
            logprobs.append(float(best.values))
    return tokens[:num_prompt], tokens[num_prompt:], logprobs


def assert_answers_as_transformers(running: Cluster, model: Path) -> None:
    choice = ask(running)
    prompt, answer, logprobs = expected(model)
    assert (choice["prompt"], choice["token_ids"]) == (prompt, answer)
    assert [step["logprob"] for step in choice["logprobs"]["content"]] == pytest.approx(logprobs, abs=1e-3)


def test_a_dense_model_answers_over_http_and_grpc_as_in_transformers(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense", dtype=torch.float32)
    with cluster(config_of(model, 0)) as running:
        assert_answers_as_transformers(running, model)
        text = ask(running)["message"]["content"]
        streamed = "".join(ask_grpc(running.grpc, QUESTION, max_tokens=NUM_TOKENS))
        assert text.startswith(streamed) and streamed, "gRPC ends at the end-of-sequence token, if there is one"
        (shard,) = running.processes("attention_shard")
        assert shard["experts_in"] == "attention shard, by vLLM"
        assert not running.processes("expert_group")
        assert "experts in the attention shard, by vLLM" in running.moeray("status").stdout


def test_a_dense_model_asked_to_be_split_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = write_dense(tmp_path / "dense")
    file = tmp_path / "cluster.yaml"
    file.write_text(json.dumps(config_of(model, 2)))
    refused = Cluster(env={"PATH": "", "MOERAY_STATE_DIR": str(tmp_path)}).moeray("up", "-f", str(file))
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        "moeray: experts.num_groups: 2 asked for, but LlamaForCausalLM has no routed experts"
    )
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.full
def test_vllms_own_tensor_parallelism_serves_a_mixture_of_experts(tmp_path: Path) -> None:
    model = write_qwen_moe(tmp_path / "moe", dtype=torch.float32)
    with cluster(config_of(model, 0, tensor_parallel_size=2)) as running:
        assert_answers_as_transformers(running, model)


@pytest.mark.full
@pytest.mark.parametrize("num_groups", [0, 2], ids=["not-split", "split"])
def test_deepseek_v3_answers_as_in_transformers(tmp_path: Path, num_groups: int) -> None:
    model = write_deepseek_v3(tmp_path / "v3")
    with cluster(config_of(model, num_groups)) as running:
        assert_answers_as_transformers(running, model)
        assert len(running.processes("expert_group")) == num_groups
