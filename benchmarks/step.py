"""What one decode step costs when the experts are elsewhere, beside the same engine with its experts inside.

    python benchmarks/step.py [--quick] [--json FILE] [--only MODEL]

All engines are up at the same time, pinned to the same two cores, and decode in turn, so that every pair sees the same
noise; the idle ones sleep. `batch` is the number of requests in the whole topology. `ms` is the time in which each of
them gets one token; `throughput_ratio` is the median over pairs of tokens per second against the monolithic engine,
above 1 the split is faster.

    monolithic  plain vLLM with its own MoE kernel, one thread on one core or two threads on both; the faster of the
                two at each batch is the baseline. On CPU that kernel leaves out DeepSeek-V4's clamp (swiglu_limit):
                it is a baseline of speed and answers wrongly.
    unsplit     one engine with moeray's experts inside, on one core: the right answers without a hop (not in --quick)
    1x1         one attention shard on one core, one expert group on the other
    2x1         a core for each of two attention shards, their expert group runs on both
    1x1 wide, 2x1 wide   the group computes with two threads on both cores (not in --quick)
    2x1 shared  the two attention shards share one core, their expert group has the other (not in --quick)

`stages` are microseconds per layer call at the shard: pack, post, shared (expert, while the hop is under way), wait
(of which `expert_compute` is the group's own), combine; `other` is the rest of a step, attention for the most part,
in microseconds per MoE layer.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
import records
from bench_model import NAME as LARGE
from bench_model import large_checkpoint
from pinned import Process, pin, two_cores
from step_engines import Decoded, Engine, Group

from moeray.deepseek_v4 import Checkpoint
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.settings import SPIN_S

TINY = "moeray-tiny"
BATCHES = (1, 8, 32)


@dataclass(frozen=True)
class Effort:
    """Per model its batches and the decode steps of one run; how many pairs; whether every topology takes part."""

    batches: dict[str, tuple[int, ...]]
    steps: dict[str, int]
    pairs: int
    all_topologies: bool


QUICK = Effort({TINY: BATCHES, LARGE: (8, 32)}, {TINY: 20, LARGE: 4}, pairs=5, all_topologies=False)
THOROUGH = Effort({TINY: BATCHES, LARGE: BATCHES}, {TINY: 64, LARGE: 16}, pairs=9, all_topologies=True)
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Run:
    """One topology's part of a pair."""

    tokens_per_s: float
    stages: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter pairs (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts and plot beside it")
    parser.add_argument("--only", choices=(TINY, LARGE), help="one of the models")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    found: list[records.Record] = []
    for model in [options.only] if options.only else list(effort.batches):
        checkpoint = checkpoint_path() if model == TINY else large_checkpoint()
        with topologies_of(model, checkpoint, effort) as topologies:
            for batch in effort.batches[model]:
                new = compare(topologies, batch, effort)
                print("\n".join(map(describe, new)), flush=True)
                found += new
    if options.json:
        records.write(options.json, found, pairs=effort.pairs)
        plots.step(found, options.json.with_suffix(".svg"))


@dataclass(frozen=True)
class Experts:
    """An expert group's process, where it listens, and its cores."""

    process: Process
    address: str
    cores: Sequence[int]


@dataclass(frozen=True)
class Topology:
    """Engines that decode together, each with its cores, and the group behind them, if any.

    `backend`: of the engines' transport; None is plain vLLM.
    """

    model: str
    name: str
    layers: int
    engines: Sequence[tuple[Process, Sequence[int]]]
    backend: str | None = None
    experts: Experts | None = None

    def run(self, batch: int, steps: int) -> Run:
        """Every engine with its share of the requests; they start together."""
        if self.experts is not None:
            self.experts.process.ask("move", self.experts.cores)
        for number, (engine, cores) in enumerate(self.engines):
            engine.ask("move", cores)
            if self.backend is not None:
                address = self.experts.address if self.experts else ""
                engine.ask("connect", address, number, self.backend, SPIN_S if self._is_uncrowded() else 0.0)
        working = [process for process, _ in self.engines]
        for number, engine in enumerate(working):
            engine.ask("prefill", len(range(number, batch, len(working))))
        if self.experts is not None:
            self.experts.process.ask("take_spent_us")
        for engine in working:
            engine.tell("decode", steps)
        decoded: list[Decoded] = [engine.answer() for engine in working]
        for engine in working if self.backend is not None else ():
            engine.ask("disconnect")
        seconds = max(each.ended for each in decoded) - min(each.began for each in decoded)
        return Run(sum(each.tokens for each in decoded) / seconds, self._stages(decoded, steps))

    def _is_uncrowded(self) -> bool:
        """Whether nobody shares an engine's core: then the product lets a shard poll."""
        cores = [core for _, cores in self.engines for core in cores] + list(self.experts.cores if self.experts else ())
        return len(set(cores)) == len(cores)

    def _stages(self, decoded: Sequence[Decoded], steps: int) -> dict[str, float]:
        if self.experts is None:
            return {}
        calls = self.layers * steps
        stages = {name: statistics.fmean(each.stages[name] for each in decoded) for name in decoded[0].stages}
        per_layer_us = statistics.fmean(each.ended - each.began for each in decoded) / calls * 1e6
        computing_us = self.experts.process.ask("take_spent_us") / calls / len(decoded)
        return {**stages, "expert_compute": computing_us, "other": per_layer_us - sum(stages.values())}


@contextlib.contextmanager
def topologies_of(model: str, checkpoint: Path, effort: Effort) -> Iterator[list[Topology]]:
    """All topologies of one model, loaded and connected."""
    first, second = ([core] for core in two_cores())
    both = first + second
    layers = len(Checkpoint.open(checkpoint).shape.moe_layers)
    with contextlib.ExitStack() as stack:

        def process(subject: Any, cores: Sequence[int]) -> Process:
            made = Process(subject, cores)
            stack.callback(made.end)
            return made

        one, two = process(Engine, first), process(Engine, both)
        a, b = process(Engine, first), process(Engine, first)
        groups = {threads: process(Group, both) for threads in ((1, 2) if effort.all_topologies else (1,))}
        for threads, group in groups.items():
            group.tell("serve", checkpoint, threads, threads == 1)  # with two it shares a core
        for engine in (one, two, a, b):
            engine.tell("start", checkpoint, engine in (a, b))
        for engine in (one, two, a, b):
            print(f"{model}: an engine with {engine.answer()}", flush=True)
        addresses = {threads: group.answer() for threads, group in groups.items()}
        beside = Experts(groups[1], addresses[1], second)
        around = Experts(groups[1], addresses[1], both)
        found = [
            Topology(model, "monolithic, 1 thread", layers, [(one, first)]),
            Topology(model, "monolithic, 2 threads", layers, [(two, both)]),
            Topology(model, "1x1", layers, [(a, first)], "gloo", beside),
            Topology(model, "2x1", layers, [(a, first), (b, second)], "gloo", around),
        ]
        if effort.all_topologies:
            wide = Experts(groups[2], addresses[2], both)
            found += [
                Topology(model, "1x1 wide", layers, [(a, first)], "gloo", wide),
                Topology(model, "2x1 wide", layers, [(a, first), (b, second)], "gloo", wide),
                Topology(model, "2x1 shared", layers, [(a, first), (b, first)], "gloo", beside),
                Topology(model, "unsplit", layers, [(a, first)], "local"),
            ]
        yield found


def compare(topologies: Sequence[Topology], batch: int, effort: Effort) -> list[records.Record]:
    """All topologies that `batch` requests keep busy, in turn."""
    taking_part = [each for each in topologies if batch >= len(each.engines)]
    for each in taking_part:
        each.run(batch, WARM_UP_STEPS)
    runs: dict[str, list[Run]] = {each.name: [] for each in taking_part}
    for _ in range(effort.pairs):
        for each in taking_part:
            runs[each.name].append(each.run(batch, effort.steps[each.model]))
    return records_of(topologies[0].model, batch, runs)


def records_of(model: str, batch: int, runs: dict[str, list[Run]]) -> list[records.Record]:
    """Each topology against the faster monolithic engine, pair by pair."""
    speed = {name: statistics.median(run.tokens_per_s for run in each) for name, each in runs.items()}
    baseline = max((name for name in runs if name.startswith("monolithic")), key=speed.__getitem__)
    return [
        {
            "model": model,
            "topology": name,
            "batch": batch,
            "ms": round(1e3 * batch / speed[name], 2),
            "monolithic_ms": round(1e3 * batch / speed[baseline], 2),
            **_ratios(each, runs[baseline]),
            "stages": {
                stage: round(statistics.median(run.stages[stage] for run in each), 1) for stage in each[0].stages
            },
            "tokens_per_s": round(speed[name], 1),
            "baseline": baseline,
        }
        for name, each in runs.items()
    ]


def _ratios(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[str, float]:
    pairs = zip(ours, theirs, strict=True)
    found = records.spread([each.tokens_per_s / other.tokens_per_s for each, other in pairs])
    return {f"throughput_{name}": value for name, value in found.items()}


def describe(record: records.Record) -> str:
    stages = ", ".join(f"{name} {value:.0f}" for name, value in record["stages"].items())
    return (
        f"{record['model']} {record['topology']:>21} batch {record['batch']:2}: {record['ms']:7.2f} ms, "
        f"{record['tokens_per_s']:6.1f} tokens/s, {record['throughput_ratio']:.2f} x {record['baseline']} "
        f"({record['throughput_ratio_min']:.2f}..{record['throughput_ratio_max']:.2f})"
        f"{'  us/layer: ' + stages if stages else ''}"
    )


if __name__ == "__main__":
    pin(two_cores())
    main()
