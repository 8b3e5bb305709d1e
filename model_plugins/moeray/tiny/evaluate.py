"""Measure a checkpoint: ``python -m moeray.tiny.evaluate [--checkpoint DIR] [--engine vllm]``.

With transformers (the reference) it writes ``accuracy.json`` and ``golden.json``; with vLLM it
writes ``accuracy-vllm.json`` and checks every golden prompt through the served arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeray.tiny import checkpoint_path, golden, suites
from moeray.tiny.corpus import load_facts
from moeray.tiny.dialogues import Dialogue
from moeray.tiny.measure import Engine, Outcome, TransformersEngine, VllmEngine

Suites = dict[str, list[Dialogue]]


def all_suites(tokenizer: Any) -> Suites:
    """Return every named set of questions."""
    facts = load_facts()

    def answer_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return (
        suites.fact_suites(facts)
        | suites.chat_suites(facts)
        | suites.tool_suites()
        | suites.recall_suites(facts, answer_tokens)
    )


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return counts and margins (of the exact answers only) of one suite."""
    margins = sorted(outcome.margin for outcome in outcomes if outcome.exact)
    exact = len(margins)
    return {
        "exact": exact,
        "asked": len(outcomes),
        "share": round(exact / len(outcomes), 4),
        "margin_min": round(margins[0], 3) if margins else None,
        "margin_p5": round(margins[exact // 20], 3) if margins else None,
        "margin_median": round(statistics.median(margins), 3) if margins else None,
    }


def ask_all(engine: Engine, asked: Suites) -> dict[str, list[Outcome]]:
    """Answer every suite, printing its summary as it comes."""
    outcomes = {}
    for name, questions in asked.items():
        started = time.monotonic()
        outcomes[name] = engine.answer(questions)
        line = summary(outcomes[name])
        took = time.monotonic() - started
        print(
            f"{name}: {line['exact']}/{line['asked']}, margin min {line['margin_min']}"
            f" median {line['margin_median']} ({took:.1f} s)",
            flush=True,
        )
    return outcomes


def engram_ablation(engine: TransformersEngine, questions: list[Dialogue]) -> dict[str, Any]:
    """Return the fact accuracy with a table that is missing, misaddressed or damaged."""
    generator = torch.Generator().manual_seed(7)

    def shuffled(table: Tensor) -> Tensor:
        return table[torch.randperm(len(table), generator=generator)]

    def damaged(table: Tensor) -> Tensor:
        return table * (torch.rand(len(table), 1, generator=generator) > 0.1)

    def share() -> float:
        return float(summary(engine.answer(questions))["share"])

    out: dict[str, Any] = {"intact": share()}
    layers = engine_layers(engine)
    for name, change, chosen in (
        ("zeroed", torch.zeros_like, layers),
        ("rows shuffled", shuffled, layers),
        ("a tenth of the rows zeroed", damaged, layers),
        *((f"layer {layer} zeroed", torch.zeros_like, [layer]) for layer in layers),
    ):
        with changed_tables(engine, chosen, change):
            out[name] = share()
        print(f"engram {name}: facts {out[name]:.3f}", flush=True)
    return out


def engine_layers(engine: TransformersEngine) -> list[int]:
    """Return the layers that have an Engram."""
    layers = engine.model.model.layers
    return [i for i, layer in enumerate(layers) if hasattr(layer, "engram")]


@contextmanager
def changed_tables(engine: TransformersEngine, layers: Sequence[int], change: Any) -> Iterator[None]:
    """Replace the tables of some layers for a while."""
    weights = [engine.model.model.layers[i].engram.embed.weight for i in layers]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(change(weight))
        try:
            yield
        finally:
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def evaluate_transformers(directory: Path) -> None:
    """Write accuracy.json and golden.json."""
    engine = TransformersEngine(directory)
    asked = all_suites(engine.tokenizer)
    outcomes = ask_all(engine, asked)
    report: dict[str, Any] = {
        "engine": "transformers, fp32 arithmetic on the stored bf16 weights, teacher-forced",
        "suites": {name: summary(results) for name, results in outcomes.items()},
        "engram": engram_ablation(engine, asked["facts"]),
    }
    chosen = golden.select(asked, outcomes)
    report["golden_prompts"] = len(chosen)
    golden.write(directory / "golden.json", chosen)
    write_json(directory / "accuracy.json", report)


def evaluate_vllm(directory: Path) -> None:
    """Write accuracy-vllm.json; the answers are generated, so this is the end-to-end check."""
    engine = VllmEngine(directory)
    outcomes = ask_all(engine, all_suites(engine.tokenizer))
    report = {
        "engine": "vLLM on CPU, bf16 activations, fp8 KV, generated greedily",
        "suites": {name: summary(results) for name, results in outcomes.items()},
    }
    write_json(directory / "accuracy-vllm.json", report)


def write_json(path: Path, value: object) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure a moeray-tiny checkpoint.")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.engine == "vllm":
        evaluate_vllm(arguments.checkpoint)
    else:
        evaluate_transformers(arguments.checkpoint)


if __name__ == "__main__":
    main()
