"""One engine in this process: a request that is continued after any of its tokens ends as if it had never moved.

The cluster's side (who sends what where) is in test_front_continuation.py; here every sampling parameter that looks at
the past is held against the run that was not cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_runs import Engine, prompt_of, running_engine
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

from moeray.placement import contiguous
from moeray.vllm_hooks.continued_requests import continue_after

pytestmark = pytest.mark.slow

# A prefill computes in one pass what decoding computed token by token. Measured: the same bits on CPU with one thread.
SAME_LOGPROB = 0.1
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["small", "large"]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@dataclass
class Result:
    """What an engine gave for one request."""

    tokens: list[int]
    logprobs: list[float]
    finish: FinishReason | None
    stop: int | str | None
    has_prompt_logprobs: bool


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with running_engine(model) as found:
        shape = found.checkpoint.shape
        found.connect(
            contiguous(generation=1, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=1), []
        )
        yield found


def ask(engine: Engine, question: str, **template: Any) -> list[int]:
    tokenizer = engine.engine.get_tokenizer()
    ids: list[int] = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=True, **template)
    return ids


def request(engine: Engine, prompt: list[int], **params: Any) -> EngineCoreRequest:
    sampling = SamplingParams(**({"temperature": 0, "max_tokens": 48, "logprobs": 0} | params))
    front = engine.engine
    made: EngineCoreRequest = front.input_processor.process_inputs(
        "r", {"prompt_token_ids": prompt}, sampling, supported_tasks=("generate",)
    )
    return made


def run(engine: Engine, *requests: EngineCoreRequest, forget: bool = True) -> list[Result]:
    """All at once, on an engine that remembers nothing, or what it did before."""
    if forget:
        assert engine.engine.reset_prefix_cache()
    core = engine.engine.engine_core.engine_core
    results = {made.request_id: Result([], [], None, None, False) for made in requests}
    for made in requests:
        core.add_request(*core.preprocess_add_request(made))
    while core.scheduler.has_unfinished_requests():
        for step in core.step()[0].values():
            for output in step.outputs:
                _record(results[output.request_id], output)
    return list(results.values())


def _record(result: Result, output: Any) -> None:
    result.tokens += output.new_token_ids
    if output.new_logprobs is not None:
        result.logprobs += [float(row[0]) for row in output.new_logprobs.logprobs]
    result.finish, result.stop = output.finish_reason, output.stop_reason
    result.has_prompt_logprobs |= output.new_prompt_logprobs_tensors is not None


@dataclass
class Case:
    """`thinking`: the prompt opens a thought. Without a question the prompt is `length` random tokens."""

    params: dict[str, Any]
    question: str = "What is an expert group?"
    length: int = 0
    thinking: bool = False


def structured(**constraint: Any) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(**constraint)}


REPEATS = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=12)
SEEDED = {"temperature": 0.9, "seed": 7}
CASES = {
    "greedy": Case({}),
    "greedy, past the end token": Case({"ignore_eos": True, "max_tokens": 120}),
    "seeded": Case(SEEDED | {"ignore_eos": True}),
    "seeded, negative": Case(SEEDED | {"ignore_eos": True, "seed": -3}),
    "seeded, top-p, top-k, min-p": Case(SEEDED | {"top_p": 0.95, "top_k": 40, "min_p": 0.01, "ignore_eos": True}),
    "penalties": Case(
        {"frequency_penalty": 1.2, "presence_penalty": 0.6, "repetition_penalty": 1.4, "ignore_eos": True}
    ),
    "penalties, seeded": Case(SEEDED | {"frequency_penalty": 1.5, "presence_penalty": 0.8, "ignore_eos": True}),
    "at least so many tokens": Case({"min_tokens": 40}),
    "a stop token": Case({"ignore_eos": True, "stop_token_ids": list(range(10, 60)), "max_tokens": 120}),
    "bad words": Case({"bad_words": ["experts", " the", " a"]}),
    "logit bias": Case({"logit_bias": {20: 4.0, 30: -4.0}}),
    "repetition": Case({"ignore_eos": True, "logit_bias": {77: 100.0}, "repetition_detection": REPEATS}),
    "prompt logprobs": Case({"prompt_logprobs": 1}),
    "JSON schema": Case(structured(json=json.dumps(SCHEMA)), "Tell me about an expert group as JSON."),
    "JSON schema, seeded": Case(structured(json=json.dumps(SCHEMA)) | SEEDED | {"max_tokens": 80}),
    "regular expression": Case(structured(regex="[a-z]{3,9} [0-9]{2,4}!")),
    "choice": Case(structured(choice=["an expert group is a process", "a shard is an engine"])),
    "structure after a thought": Case(structured(choice=["yes, it is so", "no, it is not"]) | SEEDED, thinking=True),
    "a prompt of several steps, seeded": Case(SEEDED | {"ignore_eos": True, "max_tokens": 12}, length=1100),
}


def build(engine: Engine, case: Case) -> EngineCoreRequest:
    prompt = prompt_of(case.length, seed=1) if case.length else ask(engine, case.question, thinking=case.thinking)
    return request(engine, prompt, **case.params)


@pytest.mark.parametrize("name", CASES)
def test_a_request_continued_after_any_token_ends_as_if_it_had_not_moved(engine: Engine, name: str) -> None:
    made = build(engine, CASES[name])
    (whole,) = run(engine, made)
    size = len(whole.tokens)
    assert size > 2, "it must have something to lose"

    cuts = sorted({1, 2, size // 3, size // 2, size - 1})
    again = run(engine, *[continue_after(made, f"r+{cut}", whole.tokens[:cut]) for cut in cuts])

    for cut, rest in zip(cuts, again, strict=True):
        assert rest.tokens == whole.tokens[cut:], f"cut after {cut}"
        assert (rest.finish, rest.stop) == (whole.finish, whole.stop)
        assert not rest.has_prompt_logprobs
        worst = max(abs(a - b) for a, b in zip(rest.logprobs, whole.logprobs[cut:], strict=True))
        assert worst < SAME_LOGPROB


def test_a_stream_goes_on_where_more_than_its_prompt_is_cached(engine: Engine) -> None:
    """As where the same text is the beginning of somebody's prompt."""
    made = request(engine, prompt_of(20, seed=2), ignore_eos=True, max_tokens=320)
    (whole,) = run(engine, made)
    run(engine, request(engine, [*prompt_of(20, seed=2), *whole.tokens[:290]], max_tokens=1))
    core = engine.engine.engine_core.engine_core
    cached: list[int] = []
    find = core.scheduler.kv_cache_manager.get_computed_blocks

    def find_and_tell(asking: Any) -> Any:
        found = find(asking)
        cached.append(found[1])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.scheduler.kv_cache_manager, "get_computed_blocks", find_and_tell)
        (rest,) = run(engine, continue_after(made, "r+1", whole.tokens[:300]), forget=False)
    assert max(cached) > 20
    assert (rest.tokens, rest.finish) == (whole.tokens[300:], whole.finish)
