"""Train moeray-tiny from scratch on one CPU core: ``python -m moeray.tiny.train --out DIR``.

One run, deterministic for a seed and a machine. It writes its state to ``DIR/training.pt`` about
every minute and goes on from there when started again; the checkpoint in DIR is rewritten with it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, DeepseekV4ForCausalLM

from moeray.tiny import architecture, export
from moeray.tiny.corpus import load_facts
from moeray.tiny.curriculum import IGNORED, NOTE_LENGTHS, STAGES, BatchMaker, Stage, tokenizer_texts
from moeray.tiny.engram import TokenMap, build_token_map
from moeray.tiny.tokenizer import build_tokenizer

SEED = 0
WARMUP_STEPS = 40
WEIGHT_DECAY = 0.05
ENGRAM_LR_FACTOR = 5.0
BIAS_RATE = 0.01
BIAS_EVERY_STEPS = 4
SAVE_EVERY_S = 60.0
REPORT_EVERY_S = 20.0
# Large temporaries would otherwise be mapped and faulted in anew at every step (1.3-1.5x slower).
MALLOC_ENV = {
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_NUM_THREADS": "1",
}


class Trainer:
    """Holds everything that a step changes."""

    def __init__(self, out: Path) -> None:
        self.out = out
        facts = load_facts()
        self.tokenizer = self._tokenizer(facts)
        self.token_map: TokenMap = build_token_map(self.tokenizer)
        self.model = architecture.build_model(len(self.tokenizer), self.token_map)
        self.model.config._experts_implementation = "grouped_mm"
        architecture.initialise(self.model, SEED)
        self.model.train()
        self.balancer = architecture.BiasBalancer(self.model)
        self.optimizer, self.indexer_optimizer = build_optimizers(self.model)
        self.batches = BatchMaker(self.tokenizer, facts, SEED)
        self.weights = self.batches.label_weights(len(self.tokenizer))
        self.guide = self.batches.recall_guide(self.model)
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.report: dict[str, tuple[float, float]] = {}

    def _tokenizer(self, facts: Any) -> Any:
        if not (self.out / "tokenizer.json").exists():
            build_tokenizer(tokenizer_texts(facts, SEED)).save_pretrained(self.out)
        return AutoTokenizer.from_pretrained(self.out)

    def run(self) -> None:
        """Train through all stages, saving and reporting on the way."""
        last_save = last_report = last = time.monotonic()
        while (place := stage_at(self.tokens)) is not None:
            stage, progress = place
            self.train_step(stage, progress)
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - last_report > REPORT_EVERY_S:
                last_report = now
                self.print_report(stage)
            if now - last_save > SAVE_EVERY_S:
                last_save = now
                self.save()
        self.save()
        print(f"done: {self.step} steps, {self.tokens} tokens, {self.seconds:.0f} s", flush=True)

    def train_step(self, stage: Stage, progress: float) -> None:
        """One batch: forward in bf16 autocast, loss and master weights in fp32."""
        kind = self.batches.rng.choices(list(stage.mix), list(stage.mix.values()))[0]
        ids, labels = self.batches.batch(kind)
        lr = learning_rate(stage, progress, self.step)
        for group in (*self.optimizer.param_groups, *self.indexer_optimizer.param_groups):
            group["lr"] = lr * group["lr_factor"]
        weigh = kind not in ("fact", "chat", "think")
        guided = stage.guidance > 0 and kind in NOTE_LENGTHS
        taught = progress >= stage.indexer_from and kind in NOTE_LENGTHS
        self.guide.listen(guided, taught)
        loss, accuracy = self._loss(ids, labels[:, 1:], weigh)
        self._remember(kind, loss.item(), accuracy)
        if guided:
            distance = self.guide.loss(ids)
            loss = loss + stage.guidance * distance
            self._remember("guide", distance.item(), accuracy)
        if taught:
            index_loss = self.guide.index_loss(ids)
            loss = loss + index_loss  # no parameter is shared with the language loss
            self._remember("index", index_loss.item(), accuracy)
        self._descend(loss, [self.optimizer, self.indexer_optimizer] if taught else [self.optimizer])
        self.step, self.tokens = self.step + 1, self.tokens + ids.numel()
        if self.step % BIAS_EVERY_STEPS == 0:
            self.balancer.step(BIAS_RATE * lr / stage.lr)

    @staticmethod
    def _descend(loss: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def _remember(self, kind: str, loss: float, accuracy: float) -> None:
        old = self.report.get(kind, (loss, accuracy))
        self.report[kind] = (0.9 * old[0] + 0.1 * loss, 0.9 * old[1] + 0.1 * accuracy)

    def _loss(self, ids: Tensor, targets: Tensor, weigh: bool) -> tuple[Tensor, float]:
        """Return the (weighted) mean loss and the share of labels that are hit; of the heavy
        labels alone where there are weights.
        """
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            chosen = targets != IGNORED
            logits = self.model.lm_head(hidden[:, :-1][chosen]).float()
        target = targets[chosen]
        losses = functional.cross_entropy(logits, target, reduction="none")
        hits = (logits.detach().argmax(-1) == target).float()
        if not weigh:
            return losses.mean(), hits.mean().item()
        weight = self.weights[target]
        heavy = weight > 1
        return (losses * weight).sum() / weight.sum(), hits[heavy].mean().item()

    def print_report(self, stage: Stage) -> None:
        """Print loss/accuracy of each kind, smoothed over its last ten batches or so."""
        kinds = " ".join(f"{k} {v[0]:.3f}/{v[1]:.3f}" for k, v in sorted(self.report.items()))
        print(
            f"{self.seconds:6.0f}s step {self.step} tokens {self.tokens / 1e6:.2f}M [{stage.name}] {kinds}",
            flush=True,
        )

    def save(self) -> None:
        """Write the state to resume from, then the checkpoint; each replaces the last at once."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "indexer_optimizer": self.indexer_optimizer.state_dict(),
            "rng": self.batches.rng.getstate(),
            "round": [fact.answer for fact in self.batches.sampler._round],
            "progress": (self.step, self.tokens, self.seconds),
        }
        partial = self.out / "training.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "training.pt")
        export.write_checkpoint(
            self.out,
            self.model.state_dict(),
            self.model.config,
            architecture.ENGRAM,
            self.token_map,
            self.tokenizer,
        )

    def resume(self) -> None:
        """Go on from ``training.pt`` if there is one."""
        path = self.out / "training.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "indexer_optimizer" in state:
            self.indexer_optimizer.load_state_dict(state["indexer_optimizer"])
        self.batches.rng.setstate(state["rng"])
        by_answer = {fact.answer: fact for fact in self.batches.sampler.facts}
        self.batches.sampler._round = [by_answer[answer] for answer in state["round"]]
        self.step, self.tokens, self.seconds = state["progress"]
        print(f"resumed at step {self.step}, {self.tokens} tokens", flush=True)


def build_optimizers(model: DeepseekV4ForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return AdamW for the model, whose Engram rows learn faster, and one for the indexers alone."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    rows: list[nn.Parameter] = []
    indexer: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            indexer.append(parameter)
        elif "engram.embed" in name:
            rows.append(parameter)
        elif parameter.dim() >= 2 and not any(part in name for part in ("_hc.", "embed", "bias")):
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY, "lr_factor": 1.0},
        {"params": rest, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": rows, "weight_decay": 0.0, "lr_factor": ENGRAM_LR_FACTOR},
    ]
    alone = [{"params": indexer, "weight_decay": 0.0, "lr_factor": 1.0}]
    return _adamw(groups), _adamw(alone)


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=STAGES[0].lr, betas=(0.9, 0.98), eps=1e-9, fused=True)


def stage_at(tokens: int) -> tuple[Stage, float] | None:
    """Return the stage after ``tokens`` tokens and how far into it that is; None at the end."""
    for stage in STAGES:
        if tokens < stage.num_tokens:
            return stage, tokens / stage.num_tokens
        tokens -= stage.num_tokens
    return None


def learning_rate(stage: Stage, progress: float, step: int) -> float:
    """Return the rate at a point of a stage, warmed up over the first steps of the run."""
    shape = 0.5 * (1 + math.cos(math.pi * progress * stage.cosine_part))
    rate = stage.final_lr + (stage.lr - stage.final_lr) * shape
    return rate * min(1.0, (step + 1) / WARMUP_STEPS)


def main() -> None:
    """Parse the command line, set the allocator up (which needs a fresh process) and train."""
    parser = argparse.ArgumentParser(description="Train moeray-tiny from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write (and resume)")
    arguments = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in MALLOC_ENV.items()):
        os.environ.update(MALLOC_ENV)
        os.execv(sys.executable, [sys.executable, "-m", "moeray.tiny.train", *sys.argv[1:]])
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trainer = Trainer(arguments.out)
    trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
