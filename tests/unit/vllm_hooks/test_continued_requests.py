"""What a continued request is made of, and the places of vLLM that make it go on; behaviour is in tests/integration."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from moeray.vllm_hooks.continued_requests import (
    GENERATED,
    TokenGenerator,
    _seed_draws,
    continue_after,
    generated_before,
    install,
    token_seed,
)


def request(**params: Any) -> EngineCoreRequest:
    return EngineCoreRequest("r", [7, 8], None, SamplingParams(max_tokens=9, **params), None, 0.0, None, None, None)


def test_tokens_survive_the_wire_and_the_original_is_left_as_it_was() -> None:
    original = request(extra_args={"theirs": 1}, seed=3)

    sent = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(continue_after(original, "r+1", [5, 6])))

    assert (sent.request_id, sent.prompt_token_ids, generated_before(sent.sampling_params)) == ("r+1", [7, 8], [5, 6])
    assert sent.sampling_params.extra_args["theirs"] == 1 and sent.sampling_params.seed == 3
    assert (original.request_id, original.sampling_params.extra_args) == ("r", {"theirs": 1})


def test_a_request_that_begins_has_no_tokens_whatever_its_client_says() -> None:
    assert generated_before(continue_after(request(extra_args={GENERATED: [1]}), "r", []).sampling_params) == []
    assert continue_after(request(), "r", []) == request()


def test_prompt_logprobs_are_asked_for_until_the_first_token_has_brought_them() -> None:
    asked = request(prompt_logprobs=2)
    assert continue_after(asked, "r+1", []).sampling_params.prompt_logprobs == 2
    later = continue_after(asked, "r+1", [5]).sampling_params
    assert later.prompt_logprobs is None and later.skip_reading_prefix_cache is False


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63, -(2**63)])
def test_every_token_of_a_seed_has_a_draw_of_its_own(seed: int) -> None:
    generator = TokenGenerator()
    draws = set()
    for number in range(500):
        generator.manual_seed(token_seed(seed, number))
        draws.add(torch.randint(2**31, (1,), generator=generator).item())
    assert len(draws) == 500
    assert token_seed(seed, 3) == token_seed(seed, 3) != token_seed(seed + 1, 3)


def test_a_drawn_token_can_be_taken_back_on_cpu() -> None:
    generator = TokenGenerator()
    generator.set_offset(generator.get_offset() - 4)
    with pytest.raises(RuntimeError):
        torch.Generator().get_offset()


def test_touch_point_a_request_is_made_from_the_engine_core_request() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.request import Request

    assert isinstance(Request.__dict__["from_engine_core_request"], classmethod)
    assert list(inspect.signature(Request.from_engine_core_request).parameters) == ["request", "block_hasher"]
    source = inspect.getsource(EngineCore.preprocess_add_request)
    assert source.index("Request.from_engine_core_request(") < source.index("grammar_init(req)")
    install()
    made = Request.from_engine_core_request(continue_after(request(), "r+1", [5, 6]), None)
    assert (made.num_prompt_tokens, made.num_output_tokens, list(made.all_token_ids)) == (2, 2, [7, 8, 5, 6])
    assert made.prefill_stats is None and Request.from_engine_core_request(request(), None).prefill_stats is not None


def test_touch_point_a_grammar_is_made_aside_and_accepts_tokens() -> None:
    from vllm.v1.structured_output import StructuredOutputManager
    from vllm.v1.structured_output.request import StructuredOutputRequest

    assert len(inspect.signature(StructuredOutputManager._create_grammar).parameters) == 2
    assert list(inspect.signature(StructuredOutputManager.accept_tokens).parameters)[1:] == ["request", "new_token_ids"]
    assert "self._create_grammar" in inspect.getsource(StructuredOutputManager.grammar_init)
    assert {"_grammar", "reasoning_ended"} <= {field.name for field in dataclasses.fields(StructuredOutputRequest)}


def test_touch_point_the_runner_keeps_a_state_of_each_request() -> None:
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._update_states)
    assert "CachedRequestState(" in source and "output_token_ids=[]" in source and "generator=generator" in source
    install()
    generator = torch.Generator()
    params = continue_after(request(seed=3), "r+1", [5, 6]).sampling_params
    state = CachedRequestState("r+1", [7, 8], [], params, generator, ([],), 0, [])
    assert state.output_token_ids == [5, 6] and state.num_tokens == 4
    assert isinstance(state.generator, TokenGenerator)


def test_every_token_is_drawn_anew_wherever_its_request_runs() -> None:
    generator = TokenGenerator()
    state = SimpleNamespace(sampling_params=SamplingParams(seed=3), output_token_ids=[5])
    batch = SimpleNamespace(generators={0: generator}, req_ids=["r"])
    runner, drawn = SimpleNamespace(input_batch=batch, requests={"r": state}), []
    sample = _seed_draws(lambda _: drawn.append(torch.rand(4, generator=generator).tolist()))
    for tokens in ([5], [5, 6], [5, 6, 7], [5, 6]):
        state.output_token_ids = tokens
        sample(runner)
    assert drawn[1] == drawn[3] and len({tuple(each) for each in drawn}) == 3


def test_touch_point_a_seeded_request_draws_from_its_generator_in_sample() -> None:
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    install()
    original = inspect.getclosurevars(GPUModelRunner._sample).nonlocals["original"]
    assert "self.sampler(" in inspect.getsource(original)
    assert "self.generators[req_index] = request.generator" in inspect.getsource(InputBatch.add_request)
    assert "gen.set_offset(gen.get_offset() - 4)" in inspect.getsource(GPUModelRunner._bookkeeping_sync)
