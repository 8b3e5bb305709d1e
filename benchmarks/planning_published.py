"""What others published about serving DeepSeek-V3/R1, beside what `moeray plan` predicts with its default numbers.

    python benchmarks/planning_published.py [--json FILE]

No number was fitted to a row. Where a batch was not published, it is the largest that memory and the published (or, if
there is none, a generous) time per token allow. Figures are tokens/s per GPU; a prefill's are those that were computed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import records
from records import Record

from moeray.planning import Efficiency, Machines, Topology, Work, step_time
from moeray.planning.formats import KV_BYTES, FormatName, Formats
from moeray.planning.hardware import catalogue
from moeray.planning.memory import shard_memory
from moeray.planning.spec import load_shape

MODEL = "deepseek-v3"
MOST_BATCH = 1024


@dataclass(frozen=True)
class Published:
    """Attributes:
    figure: tokens/s per GPU.
    context: tokens per request, in the middle.
    tpot_s: time per token that was published, or allowed.
    """

    system: str
    source: str
    device: str
    topology: Topology
    phase: str
    figure: float
    context: int
    tpot_s: float = 0.1
    routed: FormatName = "fp8"
    kv: str = "bf16"


SGLANG = "lmsys.org/blog/2025-05-05-large-scale-ep: 52.3k input and 22.3k output tokens/s per node, inputs of 2,000"
DEEPSEEK = (
    "DeepSeek-V3/R1 inference system overview: 73.7k input (56.3 % cached), 14.8k output tokens/s per node, 20-22/s"
)
GB200_1 = "lmsys.org/blog/2025-06-16-gb200-part-1: 7,583 tokens/s per GPU, 12 nodes of 4 decode, inputs of 2,000"
GB200_2 = "lmsys.org/blog/2025-09-25-gb200-part-2: 26,156 and 13,386 (FP8 attention, NVFP4), 18,471 and 9,087 per GPU"
VLLM = "blog.vllm.ai/2025/12/17/large-scale-serving: 2.2k tokens/s per H200 with wide EP"
AMD = "rocm.blogs.amd.com/artificial-intelligence/DeepSeekR1-Part2: 128 concurrent within 50 ms on a node of MI300X"
STEP3 = "Step-3 technical report: DeepSeek-V3 on H800 2,324 tokens/s per GPU at 50 ms, context 4,096"

FP4: tuple[float, FormatName, str] = (0.1, "fp4", "fp8")

ROWS = (
    Published("SGLang, 96 H100", SGLANG, "H100", Topology("data", 72), "decode", 22_300 / 8, 2050),
    Published("SGLang, 96 H100", SGLANG, "H100", Topology("data", 32), "prefill", 52_300 / 8, 1000),
    Published("DeepSeek, H800", DEEPSEEK, "H800", Topology("data", 144), "decode", 14_800 / 8, 5000, 0.048),
    Published("DeepSeek, H800", DEEPSEEK, "H800", Topology("data", 32), "prefill", 73_700 * 0.437 / 8, 2000),
    Published("Step-3's DeepSeek-V3, H800", STEP3, "H800", Topology("data", 144), "decode", 2324, 4096, 0.05),
    Published("vLLM wide EP, H200", VLLM, "H200", Topology("data", 16), "decode", 2200, 2050),
    Published("SGLang, GB200, first", GB200_1, "GB200", Topology("data", 48), "decode", 7583, 2050),
    Published("SGLang, GB200, BF16 + FP8", GB200_2, "GB200", Topology("data", 48), "decode", 9087, 2050),
    Published("SGLang, GB200, FP8 + FP4", GB200_2, "GB200", Topology("data", 48), "decode", 13_386, 2050, *FP4),
    Published("SGLang, GB200, FP8 + FP4", GB200_2, "GB200", Topology("data", 8), "prefill", 26_156, 1000, *FP4),
    Published("SGLang, MI300X node", AMD, "MI300X", Topology("tensor", 8), "decode", 128 / 0.05 / 8, 4000, 0.05),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    found = [record_of(each) for each in ROWS]
    for each in found:
        figures = (
            f"published {each['published']:6.0f}  predicted {each['predicted']:6.0f}  {100 * each['error']:+4.0f} %"
        )
        print(f"{each['system']:30} {each['devices']:42} {each['phase']:8} {figures}  (batch {each['batch']})")
    if options.json:
        records.write(options.json, found)


def record_of(row: Published) -> Record:
    batch, per_device = predicted(row)
    return {
        "system": row.system,
        "devices": f"{row.device}, {row.topology.name}",
        "phase": row.phase,
        "context": row.context,
        "published": round(row.figure),
        "predicted": round(per_device),
        "error": round(per_device / row.figure - 1, 2),
        "batch": batch,
        "source": row.source,
    }


def predicted(row: Published) -> tuple[int, float]:
    """Batch of a rank (tokens of a step of prefill), tokens/s per device."""
    shape, device = load_shape(MODEL), catalogue()[row.device]
    formats = Formats(row.routed, "fp8", *KV_BYTES[row.kv], 1.03, 2.0)
    machines = Machines(device, device, Efficiency())
    ranks = row.topology.devices if row.topology.kind == "tensor" else 1
    if row.phase == "prefill":
        step = step_time(shape, formats, row.topology, machines, Work(16_384, row.context, True))
        return 16_384, 16_384 * 1e6 / step.total / ranks
    fits = shard_memory(shape, formats, device, row.topology, row.context).requests
    best = (0, 0.0)
    for batch in range(1, max(1, min(fits, MOST_BATCH)) + 1):
        step = step_time(shape, formats, row.topology, machines, Work(batch, row.context))
        if step.total <= 1e6 * row.tpot_s:
            best = max(best, (batch, batch * 1e6 / step.total / ranks), key=lambda each: each[1])
    return best


if __name__ == "__main__":
    main()
