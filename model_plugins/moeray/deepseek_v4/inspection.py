"""What a checkpoint holds and what of it does not fit, told from config.json and the weight files' headers alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import StoredMatrix, stored_matrix
from moeray.deepseek_v4.shape import ModelShape, text_config

MAX_PROBLEMS = 20
# The first that matches wins. DeepSeek's names and Hugging Face's.
_ROLES = tuple(
    (role, re.compile(pattern))
    for role, pattern in {
        "shared experts": r"\.shared_experts\.",
        "router": r"\.(ffn|mlp)\.gate\.",
        "Engram tables": r"\.engram\.embed\.",
        "Engram gates": r"\.engram\.",
        "residual streams (mHC)": r"(^|\.)hc_(attn|ffn|head)",
        "attention": r"\.(self_)?attn\.",
        "embedding and head": r"^(model\.)?embed|^(lm_)?head\.",
        "norms": r"norm\.weight$",
        "dense FFN": r"\.mlp\.",
        "vision": r"^(vision|aligner|image_)",
    }.items()
)
ROUTED, DRAFT, OTHER = "routed experts", "draft layers", "other"
_NOT_HELD = (DRAFT, "Engram tables", "vision")
# What vLLM's CPU kernels for V4 are built for; everything else may have any size.
_CPU_KERNELS: Mapping[str, tuple[int, ...]] = {
    "head_dim": (512,),
    "qk_rope_head_dim": (64,),
    "index_head_dim": (128,),
    "index_topk": (512,),
    "compress_ratios": (0, 4, 128),
}


@dataclass(slots=True)
class Role:
    """The tensors that serve one purpose.

    Attributes:
        num_values: numbers they stand for, scales not counted.
        num_bytes: as stored, scales included.
        formats: format -> bytes.
    """

    num_tensors: int = 0
    num_values: int = 0
    num_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    def add(self, matrix: StoredMatrix) -> None:
        self.num_tensors += len(matrix.tensors)
        self.num_values += matrix.num_values
        self.num_bytes += matrix.num_bytes
        self.formats[matrix.format] = self.formats.get(matrix.format, 0) + matrix.num_bytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """Attributes:
    roles: purpose -> its tensors, largest first.
    problems: what keeps it from being served with experts on groups of their own.
    cpu_problems: sizes that vLLM's CPU kernels for V4 do not have.
    """

    path: Path
    shape: ModelShape
    roles: Mapping[str, Role]
    problems: tuple[str, ...]
    cpu_problems: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(role.num_bytes for role in self.roles.values())


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Sort every tensor by role and format, and list what does not fit; `checkpoint` may be one with problems."""
    found = (str(problem) for problem in checkpoint.problems())
    problems = list(islice(found, MAX_PROBLEMS))
    if (more := sum(1 for _ in found)) > 0:
        problems.append(f"and {more} more")
    return Inspection(
        path=checkpoint.path,
        shape=checkpoint.shape,
        roles=_roles(checkpoint),
        problems=tuple(problems),
        cpu_problems=tuple(_cpu_problems(checkpoint)),
    )


def value_bytes(checkpoint: Checkpoint) -> tuple[int, int]:
    """Memory on CPU, where quantised weights are held as values of two bytes: (all but routed experts, routed experts).

    Engram tables are mapped, draft layers and vision are not read: they count for nothing.
    """
    roles = _roles(checkpoint)
    held = {name: max(role.num_bytes, 2 * role.num_values) for name, role in roles.items() if name not in _NOT_HELD}
    experts = held.pop(ROUTED, 0)
    return sum(held.values()), experts


def _roles(checkpoint: Checkpoint) -> dict[str, Role]:
    """Every tensor by its role, largest role first."""
    roles: dict[str, Role] = defaultdict(Role)
    for name, weight in checkpoint.tensors.items():
        if checkpoint.is_scale(name):
            continue
        scale = checkpoint.tensors.get(checkpoint.names.scale_of(name))
        role = roles[role_of(checkpoint, name)]
        try:
            role.add(stored_matrix(weight, scale, checkpoint.shape.fp8_block))
        except CheckpointError:  # told among the problems; integers (token tables) are what they are
            role.add(StoredMatrix(weight, None, weight.shape, None))
    return dict(sorted(roles.items(), key=lambda item: -item[1].num_bytes))


def role_of(checkpoint: Checkpoint, name: str) -> str:
    """What the tensor is for."""
    if checkpoint.is_draft(name):
        return DRAFT
    if checkpoint.is_routed_expert(name):
        return ROUTED
    return next((role for role, pattern in _ROLES if pattern.search(name)), OTHER)


def _cpu_problems(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.shape.family != "deepseek_v4":
        return
    config: Mapping[str, Any] = text_config(checkpoint.config)
    for key, legal in _CPU_KERNELS.items():
        values = config.get(key)
        odd = {repr(each) for each in (values if isinstance(values, list) else [values]) if each not in (None, *legal)}
        if odd:
            yield f"{key} is {', '.join(sorted(odd))}: vLLM's CPU kernels for V4 have {', '.join(map(str, legal))}"
