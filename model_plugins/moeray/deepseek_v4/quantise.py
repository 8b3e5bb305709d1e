"""Writes a copy of a plain checkpoint in a format that DeepSeek publishes.

    python -m moeray.deepseek_v4.quantise [--like v4|v4-base|v4.1] SOURCE TARGET

    like       routed experts           other large matrices     Engram tables    scales
    v4         FP4, blocks of 1x32      FP8, 128x128             as they are      e8m0
    v4-base    FP8, 128x128             FP8, 128x128             as they are      fp32
    v4.1       FP4, blocks of 1x32      FP8, 32x32               FP8, 1x32        e8m0

Other large matrices: attention projections, the indexer's query, shared experts. The rest stays as it is (embedding,
head, norms, router, compressors, mHC). Rounding to nearest; of the scales that could serve an FP4 block, the one with
the least squared error.

Suffixes: R rows, C columns, B blocks.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from moeray.deepseek_v4.checkpoint import CONFIG_FILE, Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import E2M1, ROW_BLOCK
from moeray.deepseek_v4.tensor_reader import TensorReader
from moeray.deepseek_v4.weight_files import SINGLE_FILE

FP8_MAX, FP4_MAX = 448.0, 6.0
SMALLEST_EXPONENT, LARGEST_EXPONENT = -127.0, 127.0
FP8_MATRIX = re.compile(
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight"
)
ENGRAM_TABLE = re.compile(r"layers\.\d+\.engram\.embed\.weight")
_MIDPOINTS = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1[:8])])


@dataclass(frozen=True, slots=True)
class Published:
    """One of the table's lines.

    Attributes:
        fp4_experts: or FP8 ones.
        fp8_block: rows and columns that share a scale.
        e8m0: or fp32 scales, of FP8.
        fp8_tables: Engram tables too.
    """

    fp4_experts: bool
    fp8_block: tuple[int, int]
    e8m0: bool
    fp8_tables: bool


LIKE = {
    "v4": Published(fp4_experts=True, fp8_block=(128, 128), e8m0=True, fp8_tables=False),
    "v4-base": Published(fp4_experts=False, fp8_block=(128, 128), e8m0=False, fp8_tables=False),
    "v4.1": Published(fp4_experts=True, fp8_block=(32, 32), e8m0=True, fp8_tables=True),
}


def quantise_fp8(weight_RC: Tensor, block: tuple[int, int], *, e8m0: bool = True) -> tuple[Tensor, Tensor]:
    """e4m3 [R, C] and its scales, one per block, such that nothing saturates; e8m0 or fp32."""
    rows, columns = weight_RC.shape
    high, wide = block
    padded = functional.pad(weight_RC.float(), (0, -columns % wide, 0, -rows % high))
    blocks = padded.view(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    exponents = _ceil_log2(scales)
    scales = exponents.exp2() if e8m0 else scales.clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), _e8m0(exponents) if e8m0 else scales


def quantise_fp4(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Packed e2m1 (int8 [R, C / 2], low half first) and e8m0 [R, C / 32].

    Raises:
        ValueError: C is not a multiple of 32.
    """
    rows, columns = weight_RC.shape
    width = ROW_BLOCK[1]
    if columns % width:
        raise ValueError(f"FP4 packs rows in blocks of {width}; this matrix has {columns} columns")
    blocks_RBC = weight_RC.float().view(rows, columns // width, width)
    safe = _ceil_log2(blocks_RBC.abs().amax(dim=2) / FP4_MAX)  # nothing saturates
    best, codes, error = safe, _e2m1(blocks_RBC, safe), _squared_error(blocks_RBC, safe)
    finer = (safe - 1).clamp_(min=SMALLEST_EXPONENT)  # the largest values saturate, the others round half as far
    better = _squared_error(blocks_RBC, finer) < error
    best = torch.where(better, finer, best)
    codes = torch.where(better.unsqueeze(2), _e2m1(blocks_RBC, finer), codes).view(rows, columns)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), _e8m0(best)


def _ceil_log2(values: Tensor) -> Tensor:
    return values.log2().ceil().clamp_(SMALLEST_EXPONENT, LARGEST_EXPONENT)


def _e8m0(exponents: Tensor) -> Tensor:
    return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def _e2m1(blocks_RBC: Tensor, exponents_RB: Tensor) -> Tensor:
    scaled = blocks_RBC / exponents_RB.exp2().unsqueeze(2)
    return torch.bucketize(scaled.abs(), _MIDPOINTS).to(torch.uint8) | (scaled.signbit().to(torch.uint8) << 3)


def _squared_error(blocks_RBC: Tensor, exponents_RB: Tensor) -> Tensor:
    values = torch.tensor(E2M1)[_e2m1(blocks_RBC, exponents_RB).long()] * exponents_RB.exp2().unsqueeze(2)
    return (values - blocks_RBC).square().sum(dim=2)


def quantise_checkpoint(source: Path, target: Path, like: str = "v4") -> Path:
    """Write the quantised copy of `source` to the new directory `target`; returns it.

    Raises:
        CheckpointError: `source` cannot be read, or is quantised already.
        FileExistsError: `target` exists.
    """
    checkpoint, published = Checkpoint.open(source), LIKE[like]
    if any(checkpoint.is_scale(name) for name in checkpoint.tensors):
        raise CheckpointError(source, "is quantised already", "give a BF16 or F32 checkpoint")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    tensors: dict[str, Tensor] = {}
    with TensorReader() as reader:
        for name, stored in checkpoint.tensors.items():
            tensor = reader.read([stored])
            quantised = _quantised(checkpoint, name, tensor, published)
            tensors[name] = tensor if quantised is None else quantised[0]
            if quantised is not None:
                tensors[checkpoint.names.scale_of(name)] = quantised[1]
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        **({"scale_fmt": "ue8m0"} if published.e8m0 else {}),
        "weight_block_size": list(published.fp8_block),
    }
    expert_dtype = "fp4" if published.fp4_experts else "fp8"
    config = {**checkpoint.config, "expert_dtype": expert_dtype, "quantization_config": quantization}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def _quantised(checkpoint: Checkpoint, name: str, tensor: Tensor, published: Published) -> tuple[Tensor, Tensor] | None:
    """Values and scales; None for what stays as it is."""
    is_expert = checkpoint.is_routed_expert(name)
    if is_expert and published.fp4_experts:
        return quantise_fp4(tensor)
    if is_expert or FP8_MATRIX.fullmatch(name):
        return quantise_fp8(tensor, published.fp8_block, e8m0=published.e8m0)
    if published.fp8_tables and ENGRAM_TABLE.fullmatch(name):
        return quantise_fp8(tensor, ROW_BLOCK)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy a plain DeepSeek-V4 checkpoint in a published format.")
    parser.add_argument("source", type=Path, help="directory of a BF16 or F32 checkpoint")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--like", choices=LIKE, default="v4", help="which format (default v4: FP4 experts, FP8 rest)")
    arguments = parser.parse_args()
    target = quantise_checkpoint(arguments.source, arguments.target, arguments.like)
    before, after = (
        sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (arguments.source, target)
    )
    print(f"{target}: {after / 2**20:.1f} MiB, was {before / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
