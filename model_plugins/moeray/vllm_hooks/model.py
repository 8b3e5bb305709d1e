"""DeepSeek-V4 as moeray serves it: vLLM's class of this platform, plus Engram, minus the routed experts' weights.

Imported only by the process that loads the model. Importing it closes the CPU gaps and installs the remote experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.models.deepseek_v4 import DeepseekV4ForCausalLM as VllmDeepseekV4ForCausalLM
from vllm.platforms import current_platform

from moeray.deepseek_v4.engram import EngramError, EngramLayout
from moeray.engram import EngramRows
from moeray.vllm_hooks import cpu_kernels, cpu_routing, lookback, micro_batches, remote_experts  # noqa: F401  remote_experts registers itself
from moeray.vllm_hooks.engram_layer import EngramStep
from moeray.vllm_hooks.settings import shard_settings

ROUTED_EXPERT = re.compile(r"\.ffn\.experts\.\d+\.")
ENGRAM_TABLE = re.compile(r"\.engram\.embed\.(weight|scale)$")

if current_platform.is_cpu():
    cpu_kernels.install()
    cpu_routing.install()
    lookback.hand_to_model()
    micro_batches.install()


class DeepseekV4ForCausalLM(VllmDeepseekV4ForCausalLM):  # type: ignore[misc, unused-ignore]
    """vLLM's V4 with Engram on the layers of `engram_layer_ids`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        _spell_none(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._experts_are_remote = shard_settings(vllm_config) is not None
        layout = EngramLayout.from_config(vllm_config.model_config.hf_config)
        self._engram: EngramStep | None = None
        if layout is not None:
            if not current_platform.is_cpu():
                raise EngramError("Engram on a V4 body runs on CPU only in this version: use V4.1's own class on a GPU")
            self._engram = EngramStep(vllm_config, self.model.layers, layout)

    @property
    def engram_rows(self) -> EngramRows | None:
        """Where the layers get their rows; None where the model has no Engram."""
        return None if self._engram is None else self._engram.rows

    @property
    def token_lookback_depth(self) -> int:
        """How many tokens before each chunk vLLM's runner hands to `forward`."""
        return 0 if self._engram is None else self._engram.layout.lookback

    def forward(  # type: ignore[override, unused-ignore]
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        lookback_token_ids: Tensor | None = None,
    ) -> Any:
        if self._engram is not None:
            self._begin_engram(self._engram, input_ids, lookback_token_ids)
        context: Any = get_forward_context()
        if not micro_batches.is_cut(context):
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        forward = super().forward

        def on_turn(half: int) -> None:
            if self._engram is not None:
                self._engram.use(context.ubatch_slices[half].token_slice)

        def compute(part: Any) -> Any:
            return forward(input_ids[part.token_slice], positions[part.token_slice])

        return micro_batches.Halves(context, on_turn).run(compute)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(item for item in weights if not self.is_unused_checkpoint_weight(item[0]))

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Tensors that a shard must not read: routed experts (they are elsewhere) and Engram tables (mapped)."""
        return (self._experts_are_remote and ROUTED_EXPERT.search(name) is not None) or ENGRAM_TABLE.search(
            name
        ) is not None

    def _begin_engram(self, engram: EngramStep, input_ids: Tensor, lookback_token_ids: Tensor | None) -> None:
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            engram.skip()
            return
        if lookback_token_ids is None:  # going on would read other rows, and answer wrongly without any error
            raise EngramError("vLLM's runner did not hand over the tokens before this step (see lookback.py)")
        first_layer: Any = self.model.layers[0]
        name = first_layer.attn.swa_cache_layer.prefix
        if isinstance(metadata, list):
            context: Any = get_forward_context()
            starts_R1 = micro_batches.whole_starts(
                context.ubatch_slices, [half[name].query_start_loc for half in metadata]
            )
        else:
            starts_R1 = metadata[name].query_start_loc
        engram.begin(input_ids, starts_R1, lookback_token_ids)


def _spell_none(config: Any) -> None:
    """Say None where config.json says 0 for "no shared expert" or "no clamp".

    With 0 vLLM asks for the weights of an expert of no width, and clamps a shared expert to nothing without an error.
    """
    for key in ("n_shared_experts", "swiglu_limit"):
        if not getattr(config, key, None):
            setattr(config, key, None)
