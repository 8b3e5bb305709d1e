"""After the warm-up no request for log-probabilities makes the engine compile."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from moeray.vllm_hooks.warm_up import compile_logprobs

VOCAB = 61


def gather(num_rows: int, vocab_size: int, num_logprobs: int = 3) -> None:
    """As vLLM's step does it."""
    with torch.inference_mode():
        logprobs = torch.randn(num_rows, vocab_size).log_softmax(-1)
        tensors = Sampler.gather_logprobs(logprobs, num_logprobs, torch.zeros(num_rows, dtype=torch.int64))
    assert tensors.selected_token_ranks.shape == (num_rows,)


def test_touch_point_counting_ranks_compiles_nothing_after_the_warm_up() -> None:
    torch.compiler.reset()
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(Exception, match="compil"):
        gather(1, VOCAB)
    compile_logprobs(VOCAB, torch.device("cpu"))
    with torch.compiler.set_stance("fail_on_recompile"):
        for num_rows in (1, 2, 7):
            gather(num_rows, VOCAB)


def test_an_engine_without_a_compiler_starts_and_says_what_will_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Sampler, "gather_logprobs", staticmethod(fails))
    compile_logprobs(VOCAB, torch.device("cpu"))
    assert "log-probabilities will fail" in caplog.text
