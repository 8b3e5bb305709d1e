"""Touch points for models other than V4: what of vLLM's CPU platform and of its parsers is relied on."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from moeray.vllm_hooks import engine_args, served_model


def test_touch_point_cpu_rotary_kernel() -> None:
    """MLA hands [T, heads, dim] to a kernel that takes [T, heads x dim]: it reads T rows of the T x heads as T tokens.

    Once that is mended, `use_native_rotary` can go.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_type": "default", "rope_theta": 1e4}
        rotary = get_rope(64, 32, is_neox_style=False, rope_parameters=parameters, dtype=torch.float32)
    positions, query_THD, key_T1D = torch.arange(5), torch.randn(5, 4, 64), torch.randn(5, 1, 64)
    rows = query_THD.clone().view(20, 64)
    kernel, _ = rotary.forward_cpu(positions, query_THD.clone(), key_T1D.clone())
    rotated, _ = rotary.forward_native(positions, rows[:5, None], key_T1D.clone())
    assert torch.allclose(kernel.reshape(20, 64)[:5], rotated[:, 0], atol=1e-5)
    assert torch.equal(kernel.reshape(20, 64)[5:], rows[5:])


def test_touch_point_rotary_method_of_an_instance() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from moeray.vllm_hooks.deepseek_v3_model import use_native_rotary

    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(64, 48, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    rotary._forward_method = rotary.forward_cpu
    use_native_rotary(torch.nn.ModuleList([rotary]))
    assert rotary._forward_method == rotary.forward_native
    assert "self._forward_method(" in inspect.getsource(type(rotary).forward)


def test_touch_point_no_sparse_attention_on_cpu() -> None:
    """Why V3.2 is refused without a GPU."""
    from vllm.platforms.cpu import CpuPlatform

    with pytest.raises(NotImplementedError, match="Sparse Attention is not supported on CPU"):
        CpuPlatform.get_attn_backend_cls(None, SimpleNamespace(use_sparse=True))  # type: ignore[arg-type]


def test_touch_point_mla_backend_on_cpu() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert engine_args._CPU_MLA_DEFAULTS["attention_backend"] in AttentionBackendEnum.__members__


@pytest.mark.parametrize("model_type", served_model._DIALECTS)
def test_touch_point_dialects(model_type: str) -> None:
    """vLLM knows each dialect's tokenizer mode and parsers."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.tool_parsers import ToolParserManager

    dialect = served_model._DIALECTS[model_type]
    assert dialect.tokenizer_mode in TokenizerRegistry.tokenizers
    assert dialect.tool_parser in ToolParserManager.list_registered()
    assert dialect.reasoning_parser in ReasoningParserManager.list_registered()
