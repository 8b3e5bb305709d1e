"""How vLLM's registry learns of our DeepSeek classes without importing them.

For a class given by name, vLLM starts a Python process that imports the class only to ask which interfaces it has
(seconds, and again after every change of the file). The ingress, which has no model, would pay that for nothing. The
interfaces are known: a skeleton class states them, and a test holds it to the real class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_V3_MODULE = "moeray.vllm_hooks.deepseek_v3_model"

MODEL_MODULES: Mapping[str, str] = {
    "DeepseekV4ForCausalLM": "moeray.vllm_hooks.model",
    "DeepseekV32ForCausalLM": _V3_MODULE,
    "DeepseekV3ForCausalLM": _V3_MODULE,
    "DeepseekV2ForCausalLM": _V3_MODULE,
}
"""Architecture -> the module with our class of that name."""


def register() -> None:
    """Put our classes in the place of vLLM's own."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    for architecture, module in MODEL_MODULES.items():
        if current_platform.is_cpu():
            ModelRegistry.models[architecture] = _known_model(architecture, module)
        else:  # the other platforms' classes have other interfaces: let vLLM find out
            ModelRegistry.register_model(architecture, f"{module}:{architecture}")


def _known_model(architecture: str, module: str) -> Any:
    from vllm.model_executor.models.registry import _LazyRegisteredModel, _ModelInfo

    class KnownModel(_LazyRegisteredModel):  # type: ignore[misc, unused-ignore]
        """Loaded by name like any lazy model, but inspected without an import."""

        def inspect_model_cls(self) -> Any:
            return _ModelInfo.from_model_cls(skeleton(architecture))

    return KnownModel(module, architecture)


def skeleton(architecture: str) -> type[Any]:
    """A class with the interfaces that our classes have on CPU, all the same ones, and nothing else."""
    import torch
    from vllm.config import VllmConfig
    from vllm.model_executor.models.interfaces import SupportsEagle3, SupportsPP

    class Skeleton(torch.nn.Module, SupportsPP, SupportsEagle3):  # type: ignore[misc, unused-ignore]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__()

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def forward(  # type: ignore[override, unused-ignore]
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Any = None,
        ) -> torch.Tensor:
            raise NotImplementedError

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    Skeleton.__name__ = architecture
    return Skeleton
