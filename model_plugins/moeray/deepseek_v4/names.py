"""How the checkpoints of the family name their tensors: DeepSeek's own names (V4) and Hugging Face's (V2, V3, V3.2).

A routed expert has three matrices, in this package always called by DeepSeek's names: w1 (gate), w2 (down), w3 (up).
A quantised matrix is two tensors, the packed values and their block scales.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

PARTS = ("w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class TensorNames:
    """One way of naming.

    Attributes:
        expert: name of a routed expert's matrix, with the fields layer, expert and part.
        part_names: w1, w2, w3 -> what stands for `part` in `expert`.
        scale_suffix: a quantised tensor `X.weight` has its scales in `X` + this.
        embedding: name of the token embedding.
        router_of: name of a layer's router, with the field layer.
        expert_tensor: matches weights and scales of routed experts; groups: layer, expert.
    """

    expert: str
    part_names: Mapping[str, str]
    scale_suffix: str
    embedding: str
    router_of: str
    expert_tensor: re.Pattern[str]

    def expert_weight(self, layer: int, expert: int, part: str) -> str:
        """Name of one matrix of one routed expert."""
        return self.expert.format(layer=layer, expert=expert, part=self.part_names[part])

    def router(self, layer: int) -> str:
        """Name of a MoE layer's router."""
        return self.router_of.format(layer=layer)

    def scale_of(self, weight: str) -> str:
        """Name of the tensor that would hold the scales of `weight`."""
        return weight.removesuffix(".weight") + self.scale_suffix

    def weight_of(self, scale: str) -> str | None:
        """The tensor that `scale` would belong to; None if it is not named like scales."""
        return scale.removesuffix(self.scale_suffix) + ".weight" if scale.endswith(self.scale_suffix) else None


def _naming(
    *, expert: str, part_names: Mapping[str, str], scale_suffix: str, embedding: str, router_of: str
) -> TensorNames:
    before, between, after = (re.escape(text) for text in re.split(r"\{layer\}|\{expert\}|\{part\}.weight", expert)[:3])
    ends = rf"(?:\.weight|{re.escape(scale_suffix)})"
    pattern = re.compile(rf"{before}(\d+){between}(\d+){after}(?:{'|'.join(part_names.values())}){ends}")
    return TensorNames(expert, MappingProxyType(dict(part_names)), scale_suffix, embedding, router_of, pattern)


DEEPSEEK = _naming(
    expert="layers.{layer}.ffn.experts.{expert}.{part}.weight",
    part_names={part: part for part in PARTS},
    scale_suffix=".scale",
    embedding="embed.weight",
    router_of="layers.{layer}.ffn.gate.weight",
)
HUGGING_FACE = _naming(
    expert="model.layers.{layer}.mlp.experts.{expert}.{part}.weight",
    part_names={"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    scale_suffix=".weight_scale_inv",
    embedding="model.embed_tokens.weight",
    router_of="model.layers.{layer}.mlp.gate.weight",
)
