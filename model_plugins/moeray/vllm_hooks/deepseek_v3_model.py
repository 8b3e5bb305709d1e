"""DeepSeek-V2, V3 and V3.2 as moeray serves them: vLLM's class of this platform, minus the routed experts' weights.

Everything else of these models is vLLM's own: MLA, the dense first layers, the router with its groups, correction bias
and scaling factor, the shared experts; on CPU but for rotary embeddings (`use_native_rotary`). The routed experts leave
through `remote_experts`, as V4's do. Imported only by the process that loads the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM as VllmDeepseekV2ForCausalLM
from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM as VllmDeepseekV3ForCausalLM
from vllm.models.deepseek_v32 import DeepseekV32ForCausalLM as VllmDeepseekV32ForCausalLM
from vllm.platforms import current_platform

from moeray.deepseek_v4.names import HUGGING_FACE
from moeray.vllm_hooks import remote_experts  # noqa: F401  it registers itself
from moeray.vllm_hooks.settings import shard_settings

LAYER = re.compile(r"model\.layers\.(\d+)\.")


class SplitModel:
    """Mixed in before vLLM's class: leaves the routed experts, and the draft layers that nobody runs, on the disk."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._experts_are_remote = shard_settings(vllm_config) is not None
        self._num_layers: int = vllm_config.model_config.hf_config.num_hidden_layers
        if current_platform.is_cpu():
            use_native_rotary(self)  # type: ignore[arg-type]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        kept = (item for item in weights if not self.is_unused_checkpoint_weight(item[0]))
        loaded: set[str] = super().load_weights(kept)  # type: ignore[misc]
        return loaded

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Tensors that a shard must not read. Draft (MTP) layers are numbered after the model's own."""
        layer = LAYER.match(name)
        if layer is not None and int(layer[1]) >= self._num_layers:
            return True
        return self._experts_are_remote and HUGGING_FACE.expert_tensor.fullmatch(name) is not None


class DeepseekV2ForCausalLM(SplitModel, VllmDeepseekV2ForCausalLM):  # type: ignore[misc, unused-ignore]
    """vLLM's V2."""


class DeepseekV3ForCausalLM(SplitModel, VllmDeepseekV3ForCausalLM):  # type: ignore[misc, unused-ignore]
    """vLLM's V3."""


class DeepseekV32ForCausalLM(SplitModel, VllmDeepseekV32ForCausalLM):  # type: ignore[misc, unused-ignore]
    """vLLM's V3.2 (sparse attention: its CPU platform has none)."""


def use_native_rotary(model: nn.Module) -> None:
    """PyTorch's rotary embedding in the place of vLLM's CPU kernel.

    The kernel takes [T, heads x dim] and MLA hands it [T, heads, dim]: it takes the first T of the T x heads rows for
    the T tokens and leaves the others as they are, without an error (measured: |dlogprob| 3e-3 on a small random model,
    2e-7 without it). Models with YaRN scaling, as the published ones are, never reach the kernel.
    """
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            module._forward_method = module.forward_native
