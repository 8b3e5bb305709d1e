"""Small random models of other families than V4, written by transformers, with a byte tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 272
MAX_POSITIONS = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|critic|>")
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": MAX_POSITIONS,
    "num_attention_heads": 4,
}


def write_tokenizer(directory: Path) -> None:
    """Every byte is a token; the special ones above come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def _write(model: Any, directory: Path, dtype: torch.dtype) -> Path:
    model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_dense(directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **_COMMON, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_key_value_heads=2, head_dim=64
    )
    return _write(LlamaForCausalLM(config), directory, dtype)


def write_qwen_moe(directory: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A mixture of experts that is not of the DeepSeek family."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **_COMMON, hidden_size=128, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return _write(Qwen3MoeForCausalLM(config), directory, dtype)


def write_blip2(directory: Path) -> Path:
    """A model that sees: 28 x 28 pixels become four tokens of an OPT of two layers. (Most others need torchvision.)"""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        BlipImageProcessorPil,
        OPTConfig,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    side, num_queries, image_token = 28, 4, len(_SPECIAL) + 256
    vision = Blip2VisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=14, initializer_range=0.3,
    )  # fmt: skip
    queries = Blip2QFormerConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, encoder_hidden_size=64,
        vocab_size=VOCABULARY, initializer_range=0.3,
    )  # fmt: skip
    text = OPTConfig(
        **_COMMON, pad_token_id=1, hidden_size=256, word_embed_proj_dim=256, ffn_dim=128, num_hidden_layers=2,
        init_std=0.3,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision.to_dict(), qformer_config=queries.to_dict(), text_config=text.to_dict(),
        num_query_tokens=num_queries, image_token_index=image_token,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    for weight in (*model.query_tokens, *model.language_projection.parameters()):
        torch.nn.init.normal_(weight, std=0.3)
    _write(model, directory, torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    pixels = BlipImageProcessorPil(size={"height": side, "width": side})
    Blip2Processor(pixels, tokenizer, num_query_tokens=num_queries).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


_DEEPSEEK: dict[str, Any] = _COMMON | {
    "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "q_lora_rank": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64, "v_head_dim": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "initializer_range": 0.06,
}  # fmt: skip
"""MLA of the sizes that vLLM's CPU kernels take; one dense layer, two with 16 experts in 4 groups. The weights are wide
enough that attention and routing matter."""


def _write_deepseek(model: Any, directory: Path, dtype: torch.dtype, **published: Any) -> Path:
    """`published`: keys of the published config.json that transformers leaves out and vLLM asks for."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zero in a new model; this one changes which experts are chosen
            buffer.copy_(torch.randn_like(buffer) * 0.2)
    _write(model, directory, dtype)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | published, indent=2))
    return directory


def write_deepseek_v2(directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """DeepSeek-V2: softmax scores, groups chosen by their best expert, weights not renormalised, no correction bias."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(**_DEEPSEEK, topk_method="group_limited_greedy", norm_topk_prob=False)
    return _write_deepseek(DeepseekV2ForCausalLM(config), directory, dtype, scoring_func="softmax")


def write_deepseek_v3(directory: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """DeepSeek-V3: sigmoid scores, a correction bias, groups chosen by their two best experts."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**_DEEPSEEK))
    return _write_deepseek(model, directory, dtype, topk_method="noaux_tc", scoring_func="sigmoid")


def write_deepseek_v32(directory: Path, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """DeepSeek-V3.2: V3 with an indexer that chooses the tokens to attend to."""
    from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**_DEEPSEEK | {"index_topk": 64, "index_n_heads": 4} | changes))
    return _write_deepseek(model, directory, dtype, topk_method="noaux_tc", scoring_func="sigmoid")
