"""What the routed experts of one layer cost on one core: our kernel, vLLM's, and reading the same weights.

    python benchmarks/experts.py [--quick] [--json FILE]

Both kernels get the same tokens, routing and weights, and walk over several layers, so that the larger model's weights
come from memory as they do in a model. In every round all three take their turn. vLLM's `cpu_fused_moe`, with which
its CPU engine computes unquantised experts, applies router weights and leaves out the clamp that a V4 model needs; ours
gives one row per pair. The floor is NumPy's sum over the bytes of the experts that the call needs.

`ratio` is ours to the floor, `vllm_ratio` ours to vLLM's; medians over the rounds, with `_min` and `_max` as noise.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import records
import torch
from pinned import pin, two_cores

from moeray.deepseek_v4.expert_formula import ExpertWeights
from moeray.deepseek_v4.experts import given_experts

MODELS = {"tiny": (256, 128, 32, 4, 6), "bench": (1024, 512, 64, 6, 8)}
"""Hidden size, expert width, experts, experts per token, layers."""
BATCHES = (1, 8, 32, 128)
LIMIT = 10.0


class Model:
    """The weights of one model for each contender."""

    def __init__(self, hidden: int, width: int, num_experts: int, top_k: int, num_layers: int) -> None:
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.layers = range(num_layers)
        generator = torch.Generator().manual_seed(0)
        self.w13 = [_random(generator, num_experts, 2 * width, hidden) for _ in self.layers]
        self.w2 = [_random(generator, num_experts, hidden, width) for _ in self.layers]
        weights = {
            layer: {e: ExpertWeights(self.w13[layer][e], self.w2[layer][e]) for e in range(num_experts)}
            for layer in self.layers
        }
        self.ours = given_experts(
            weights, num_layers=num_layers, num_experts=num_experts, swiglu_limit=LIMIT, num_threads=1
        )
        self.packed = [(_packed(w13), _packed(w2)) for w13, w2 in zip(self.w13, self.w2, strict=True)]

    def contenders(self, num_tokens: int) -> dict[str, Callable[[], None]]:
        """Each does one call of every layer."""
        generator = torch.Generator().manual_seed(num_tokens)
        x_TD = torch.randn(num_tokens, self.hidden, generator=generator).bfloat16()
        ids_TK = torch.rand(num_tokens, self.num_experts, generator=generator).topk(self.top_k).indices.int()
        weights_TK = torch.rand(num_tokens, self.top_k, generator=generator)
        active = ids_TK.unique().tolist()
        matrices = [m[e].view(torch.int64).numpy() for m in self.w13 + self.w2 for e in active]

        def ours() -> None:
            for layer in self.layers:
                self.ours(layer, x_TD, ids_TK)

        def vllm() -> None:
            for layer in self.layers:
                out_TD = torch.empty_like(x_TD)
                torch.ops._C.cpu_fused_moe(
                    out_TD, x_TD, *self.packed[layer], None, None, weights_TK, ids_TK, False, "silu", "vec"
                )

        def floor() -> None:
            for each in matrices:
                np.add.reduce(each, axis=None)

        return {"ours": ours, "vllm": vllm, "floor": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds (under a minute)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pin(two_cores()[:1])
    _load_vllms_kernels()
    found = []
    for name, shape in MODELS.items():
        model = Model(*shape)
        found += [_measure(name, model, num_tokens, 5 if options.quick else 15) for num_tokens in BATCHES]
    if options.json is not None:
        records.write(options.json, found)


def _measure(name: str, model: Model, num_tokens: int, rounds: int) -> records.Record:
    contenders = model.contenders(num_tokens)
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {each: [] for each in contenders}
    for _ in range(rounds):
        for each, contender in contenders.items():
            times[each].append(min(_microseconds(contender) for _ in range(2)) / len(model.layers))
    to_floor, to_vllm = (
        records.spread([ours / other for ours, other in zip(times["ours"], times[against], strict=True)])
        for against in ("floor", "vllm")
    )
    record = {
        "model": name, "hidden": model.hidden, "batch": num_tokens,
        **{f"{each}_us": round(statistics.median(values), 1) for each, values in times.items()},
        **to_floor, **{f"vllm_{key}": value for key, value in to_vllm.items()},
    }  # fmt: skip
    print(
        f"{name:6} {num_tokens:4} tokens: ours {record['ours_us']:8.0f} us, vLLM {record['vllm_us']:8.0f}, "
        f"floor {record['floor_us']:8.0f}; {to_vllm['ratio']:.2f} of vLLM's, {to_floor['ratio']:.2f} of the floor",
        flush=True,
    )
    return record


def _microseconds(work: Callable[[], None]) -> float:
    started = perf_counter()
    work()
    return (perf_counter() - started) * 1e6


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).bfloat16()


def _packed(weights: torch.Tensor) -> torch.Tensor:
    packed = torch.empty_like(weights)
    torch.ops._C.prepack_moe_weight(weights, packed, "vec")
    return packed


def _load_vllms_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()


if __name__ == "__main__":
    main()
