"""DeepSeek-V3 (V2, V3.2) through the remote-experts hook: one vLLM engine in this process, against transformers.

A random model with the family's knobs on: a dense first layer, expert groups, a correction bias, a scaling factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_runs import Engine, Outcome, Topology, running_engine, serving
from small_models import VOCABULARY, write_deepseek_v2, write_deepseek_v3, write_deepseek_v32
from transport_peers import Peer, group_peers

from moeray.deepseek_v4 import Checkpoint

pytestmark = pytest.mark.slow

# Rounding of fp32, in another order of summation; measured 4e-6.
SAME_LOGPROB = 1e-4
# Rounding of bf16 activations and KV; measured 0.007 in the mean.
NEAR_LOGPROB = 0.03


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_v3(tmp_path_factory.mktemp("deepseek-v3"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with running_engine(checkpoint) as engine:
        engine.connect(Topology("local", 1).placement(engine.checkpoint, generation=1), [])
        yield engine


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, VOCABULARY, length).tolist()


def logprobs_of(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each token but the first, under the tokens before it."""
    with torch.no_grad():
        distribution = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    return distribution.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def ask(engine: Engine, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Prompt and answer, and the engine's log-probability of each of these tokens but the first."""
    request = engine.add(prompt, max_tokens, prompt_logprobs=True)
    answer = engine.finish()[request]
    chosen = [dict(step)[token] for step, token in zip(answer.logprobs, answer.tokens, strict=True)]
    return [*prompt, *answer.tokens], torch.tensor([*answer.prompt_logprobs, *chosen])


def story(engine: Engine) -> dict[str, Any]:
    """Prompts of several lengths; one comes while the others decode."""

    def late(step: int) -> None:
        if step == 2:
            engine.add(prompt_of(40, seed=9), 5)

    for index, length in enumerate((1, 17, 60)):
        engine.add(prompt_of(length, seed=index), 6, prompt_logprobs=True)
    return engine.finish(late)


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> Outcome:
    """What the local transport answers."""
    engine.connect(Topology("local", 1).placement(engine.checkpoint, generation=10), [])
    return engine.run(story)


def test_the_shard_reads_and_holds_no_routed_expert_and_every_other_tensor(engine: Engine) -> None:
    tensors = engine.engine.collective_rpc("moeray_tensors")[0]
    assert not [name for name in tensors["parameters"] if ".experts." in name and "shared" not in name]
    checkpoint = engine.checkpoint
    routed = {name for name in checkpoint.tensors if checkpoint.is_routed_expert(name)}
    assert routed
    assert set(tensors["skipped"]) == routed
    assert set(tensors["read"]) == set(checkpoint.tensors) - routed
    assert tensors["bytes_read"] + checkpoint.bytes_of(routed) == tensors["checkpoint_bytes"]


def test_dense_first_layers_are_not_expert_layers(engine: Engine) -> None:
    assert engine.checkpoint.shape.moe_layers == (1, 2)
    parameters = engine.engine.collective_rpc("moeray_tensors")[0]["parameters"]
    assert "model.layers.0.mlp.gate_up_proj.weight" in parameters


@pytest.mark.parametrize("length", [1, 20, 150])
def test_prefill_and_decode_give_the_logprobs_of_transformers(engine: Engine, reference: Any, length: int) -> None:
    tokens, logprobs = ask(engine, prompt_of(length, seed=length), 12)
    difference = (logprobs - logprobs_of(reference, tokens)).abs()
    assert float(difference.max()) < SAME_LOGPROB


def test_routing_is_what_makes_the_logprobs(engine: Engine, reference: Any) -> None:
    """Parity means something: without the correction bias, and with the scaling factor applied twice, it is gone."""
    tokens, logprobs = ask(engine, prompt_of(60), 1)
    gates = [layer.mlp.gate for layer in reference.model.layers[1:]]
    biases = [gate.e_score_correction_bias.clone() for gate in gates]
    try:
        for gate in gates:
            gate.e_score_correction_bias.zero_()
        without_bias = logprobs_of(reference, tokens)
    finally:
        for gate, bias in zip(gates, biases, strict=True):
            gate.e_score_correction_bias.copy_(bias)
    try:
        for gate in gates:
            gate.routed_scaling_factor *= 2.5
        scaled_twice = logprobs_of(reference, tokens)
    finally:
        for gate in gates:
            gate.routed_scaling_factor /= 2.5
    for wrong in (without_bias, scaled_twice):
        assert float((logprobs - wrong).abs().max()) > 100 * SAME_LOGPROB


@pytest.fixture(scope="module")
def groups() -> Iterator[list[Peer]]:
    yield from group_peers(2)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_remote_groups_are_bit_equal_to_the_local_transport(
    engine: Engine, oracle: Outcome, groups: list[Peer], num_groups: int
) -> None:
    placement = Topology("even", num_groups).placement(engine.checkpoint, generation=20 + num_groups)
    with serving(groups, engine.checkpoint.path, placement) as addresses:
        engine.connect(placement, addresses)
        assert engine.run(story) == oracle


@pytest.fixture(scope="module")
def v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek_v32(tmp_path_factory.mktemp("deepseek-v32"))


def test_an_expert_layer_of_v32_is_v3s_and_holds_no_routed_expert(engine: Engine, v32: Path) -> None:
    """V3.2 needs a GPU for its attention, but its expert layers are built by the class that the tests above run."""
    from transformers import AutoConfig
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MoE

    from moeray.vllm_hooks.remote_experts import RemoteExpertsMethod

    config = engine.engine.vllm_config
    with set_current_vllm_config(config):
        layer = DeepseekV2MoE(AutoConfig.from_pretrained(v32), config.parallel_config, prefix="model.layers.77.mlp")
    assert isinstance(layer.experts.routed_experts.quant_method, RemoteExpertsMethod)
    assert layer.experts.routed_experts.model_layer == 77
    assert {name.partition(".")[0] for name, _ in layer.named_parameters()} == {"gate", "shared_experts"}


def test_vllms_gpu_class_of_v32_builds_that_expert_layer() -> None:
    """Read, not imported: the module needs CUDA."""
    import vllm.models.deepseek_v32 as package

    source = (Path(package.__path__[0]) / "nvidia" / "model.py").read_text()
    assert "class DeepseekV32ForCausalLM(DeepseekV2ForCausalLM):" in source
    assert "self.mlp = DeepseekV2MoE(" in source


def test_a_shard_of_v32_leaves_the_routed_experts_and_nothing_else(v32: Path) -> None:
    from moeray.vllm_hooks.deepseek_v3_model import DeepseekV32ForCausalLM

    model: Any = DeepseekV32ForCausalLM.__new__(DeepseekV32ForCausalLM)
    torch.nn.Module.__init__(model)
    model._experts_are_remote, model._num_layers = True, 3
    checkpoint = Checkpoint.open(v32)
    assert any(".indexer." in name for name in checkpoint.tensors)
    left = {name for name in checkpoint.tensors if model.is_unused_checkpoint_weight(name)}
    assert left == {name for name in checkpoint.tensors if checkpoint.is_routed_expert(name)}
    assert model.is_unused_checkpoint_weight("model.layers.2.mlp.experts.7.up_proj.weight_scale_inv")
    assert model.is_unused_checkpoint_weight("model.layers.3.eh_proj.weight"), "a draft layer"


def near_transformers(checkpoint: Path, length: int = 150) -> torch.Tensor:
    """|dlogprob| of prompt and answer in an engine of its own, against transformers in fp32."""
    from transformers import AutoModelForCausalLM

    with running_engine(checkpoint) as engine:
        engine.connect(Topology("local", 1).placement(engine.checkpoint, generation=1), [])
        tokens, logprobs = ask(engine, prompt_of(length), 12)
    exact = logprobs_of(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), tokens)
    return (logprobs - exact).abs()


def test_bf16_stays_near_transformers_in_fp32(tmp_path: Path) -> None:
    assert float(near_transformers(write_deepseek_v3(tmp_path, dtype=torch.bfloat16)).mean()) < NEAR_LOGPROB


def test_v2_gives_the_logprobs_of_transformers(tmp_path: Path) -> None:
    assert float(near_transformers(write_deepseek_v2(tmp_path)).max()) < SAME_LOGPROB


@pytest.mark.gpu
def test_v32_on_a_gpu_stays_near_transformers_in_fp32(tmp_path: Path) -> None:
    """Not yet run: written for a CUDA build of vLLM, whose sparse attention takes 64 heads and a top-k of 2048."""
    checkpoint = write_deepseek_v32(
        tmp_path, num_attention_heads=64, num_key_value_heads=64, index_n_heads=64, index_topk=2048,
        qk_nope_head_dim=128, v_head_dim=128,
    )  # fmt: skip
    assert float(near_transformers(checkpoint).mean()) < NEAR_LOGPROB
