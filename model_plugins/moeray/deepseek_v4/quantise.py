"""Writes a copy of a plain checkpoint in the format that DeepSeek publishes: FP4 experts, FP8 for other matrices.

    python -m moeray.deepseek_v4.quantise SOURCE TARGET

Routed experts: e2m1 in blocks of 1x32; attention projections, the indexer's query and shared experts: e4m3 in blocks of
128x128; both with e8m0 scales. The rest stays as it is (embedding, head, norms, router, compressors, mHC, Engram).
Rounding to nearest; of the scales that could serve an FP4 block, the one with the least squared error.

Suffixes: R rows, C columns, B blocks.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from moeray.deepseek_v4.checkpoint import CONFIG_FILE, Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import E2M1, FP4_BLOCK
from moeray.deepseek_v4.names import DEEPSEEK
from moeray.deepseek_v4.tensor_reader import TensorReader
from moeray.deepseek_v4.weight_files import SINGLE_FILE

FP8_BLOCK = 128
FP8_MAX, FP4_MAX = 448.0, 6.0
SMALLEST_EXPONENT, LARGEST_EXPONENT = -127.0, 127.0
FP8_MATRIX = re.compile(
    r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight"
)
_MIDPOINTS = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1[:8])])


def quantise_fp8(weight_RC: Tensor, block: int = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """e4m3 [R, C] and e8m0 [ceil(R / block), ceil(C / block)], each block scaled so that nothing saturates."""
    rows, columns = weight_RC.shape
    padded = functional.pad(weight_RC.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
    exponents = _ceil_log2(blocks.abs().amax(dim=(1, 3)) / FP8_MAX)
    scaled = (blocks / exponents.exp2()[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return scaled.to(torch.float8_e4m3fn).contiguous(), _e8m0(exponents)


def quantise_fp4(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """Packed e2m1 (int8 [R, C / 2], low half first) and e8m0 [R, C / 32].

    Raises:
        ValueError: C is not a multiple of 32.
    """
    rows, columns = weight_RC.shape
    width = FP4_BLOCK[1]
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


def quantise_checkpoint(source: Path, target: Path) -> Path:
    """Write the quantised copy of `source` to the new directory `target`; returns it.

    Raises:
        CheckpointError: `source` cannot be read, or its experts are quantised already.
        FileExistsError: `target` exists.
    """
    checkpoint = Checkpoint.open(source)
    if any(checkpoint.is_scale(name) for name in checkpoint.tensors):
        raise CheckpointError(source, "is quantised already", "give a BF16 or F32 checkpoint")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    tensors: dict[str, Tensor] = {}
    with TensorReader() as reader:
        for name, stored in checkpoint.tensors.items():
            tensor = reader.read([stored])
            if checkpoint.is_routed_expert(name):
                tensors[name], tensors[DEEPSEEK.scale_of(name)] = quantise_fp4(tensor)
            elif FP8_MATRIX.fullmatch(name):
                tensors[name], tensors[DEEPSEEK.scale_of(name)] = quantise_fp8(tensor)
            else:
                tensors[name] = tensor
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }
    config = {**checkpoint.config, "expert_dtype": "fp4", "quantization_config": quantization}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy a plain DeepSeek-V4 checkpoint as FP4 experts and FP8 matrices.")
    parser.add_argument("source", type=Path, help="directory of a BF16 or F32 checkpoint")
    parser.add_argument("target", type=Path, help="directory to make")
    arguments = parser.parse_args()
    target = quantise_checkpoint(arguments.source, arguments.target)
    before, after = (
        sum(file.stat().st_size for file in each.glob("*.safetensors")) for each in (arguments.source, target)
    )
    print(f"{target}: {after / 2**20:.1f} MiB, was {before / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
