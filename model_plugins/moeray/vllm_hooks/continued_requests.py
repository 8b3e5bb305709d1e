"""A request that began on another shard goes on after the tokens that it has, as after a preemption.

The ingress sends the request as it was made, with the tokens that came back so far beside it (`continue_after`). Here
they become *generated* tokens of the new `Request`, not a longer prompt: max_tokens, min_tokens, penalties, bad words,
a thinking budget, stop tokens and the context's end all count them, and their KV is computed with the prompt's. A
grammar is shown them before the scheduler gets it.

What a token's randomness depends on must move, too. A seeded request's generator is therefore seeded anew for every
token, from the request's seed and the token's number: nothing else about the past matters, neither how many shards ran
it nor how its prompt was cut into chunks (1 us per token; drawing the past again would cost 2 us for each of its
tokens).

Touch points: `Request.from_engine_core_request` and `.prefill_stats`, `StructuredOutputManager._create_grammar` and
`.accept_tokens`, `CachedRequestState.__post_init__`, `GPUModelRunner._sample` and the generators' offset in
`_bookkeeping_sync`. vLLM's second model runner (GPU) needs neither of the last two groups: it is given all token ids,
and seeds by position.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

GENERATED = "moeray_generated_token_ids"
"""Key of `SamplingParams.extra_args`, the one field that reaches scheduler and runner; no client can set it."""

_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_64_BITS = (1 << 64) - 1


def continue_after(request: EngineCoreRequest, request_id: str, token_ids: Sequence[int]) -> EngineCoreRequest:
    """The request as the next engine must see it; `request` is left as it is.

    Args:
        request_id: what that engine shall call it.
        token_ids: every token already generated, in order; empty for a request that has to begin (again).
    """
    params = copy.copy(request.sampling_params)
    if params is not None:
        extra = {key: value for key, value in (params.extra_args or {}).items() if key != GENERATED}
        if token_ids:
            extra[GENERATED] = list(token_ids)
            _without_prompt_logprobs(params)
        params.extra_args = extra or None
    return msgspec.structs.replace(request, request_id=request_id, sampling_params=params)


def generated_before(params: SamplingParams | None) -> list[int]:
    """The tokens that a request had generated before it came to this engine."""
    return list((params.extra_args or {}).get(GENERATED, ())) if params is not None else []


def token_seed(seed: int, token_number: int) -> int:
    """Seed of one token's draw, 64 well-mixed bits (SplitMix64's finaliser): CPU generators read only the low half.

    Args:
        seed: the request's.
        token_number: generated tokens before this one.
    """
    mixed = (seed + (token_number + 1) * _MIX[0]) & _64_BITS
    mixed = ((mixed ^ mixed >> 30) * _MIX[1]) & _64_BITS
    mixed = ((mixed ^ mixed >> 27) * _MIX[2]) & _64_BITS
    return mixed ^ mixed >> 31


class TokenGenerator(torch.Generator):
    """Randomness of one seeded request; seeded anew before each draw."""

    def get_offset(self) -> int:
        """For vLLM, which takes back the draw of a prompt's unfinished chunk.

        On CPU a generator has no offset and raises, which would end EngineCore. There is nothing to take back: the next
        draw is seeded anew.
        """
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """See `get_offset`."""
        return self


def install() -> None:
    """Teach vLLM's scheduler and its first model runner in this process; idempotent. Imports both."""
    from vllm.v1.worker.gpu_input_batch import CachedRequestState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    install_in_scheduler()
    _wrap(CachedRequestState, "__post_init__", _fill_state)
    _wrap(GPUModelRunner, "_sample", _seed_draws)


def install_in_scheduler() -> None:
    """The part of `install` that EngineCore needs where its workers are other processes."""
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    _wrap(Request, "from_engine_core_request", _begin_with_tokens)
    _wrap(StructuredOutputManager, "_create_grammar", _advance_grammar)


def _wrap(owner: type, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = owner.__dict__[name]
    is_classmethod = isinstance(original, classmethod)
    function = original.__func__ if is_classmethod else original
    if not getattr(function, "continues_requests", False):
        wrapped: Any = functools.wraps(function)(around(function))  # with the marks of who wrapped it before
        wrapped.continues_requests = True
        setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def _begin_with_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_engine_core_request(cls: type, request: Any, block_hasher: Any) -> Any:
        made = original(cls, request, block_hasher)
        if token_ids := generated_before(request.sampling_params):
            made.append_output_token_ids(token_ids)
            # The client has them from the first shard. vLLM makes them of a prompt that was never longer than what is
            # cached of it, which a shard that has just had the same stream ends with.
            made.prefill_stats = None
        return made

    return from_engine_core_request


def _fill_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def __post_init__(state: Any) -> None:  # noqa: N807
        original(state)
        if not state.output_token_ids:
            state.output_token_ids.extend(generated_before(state.sampling_params))
        if state.generator is not None:
            state.generator = TokenGenerator(device=state.generator.device)

    return __post_init__


def _seed_draws(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sample(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        for index, generator in batch.generators.items():
            state = runner.requests[batch.req_ids[index]]
            generator.manual_seed(token_seed(state.sampling_params.seed, len(state.output_token_ids)))
        return original(runner, *args, **kwargs)

    return _sample


def _advance_grammar(original: Callable[..., Any]) -> Callable[..., Any]:
    def _create_grammar(manager: Any, request: Any) -> Any:
        """Runs beside the scheduler, which leaves the request alone until it has the grammar.

        Raises:
            ValueError: the grammar does not admit what was generated; vLLM ends this request only.
        """
        grammar = original(manager, request)
        if token_ids := generated_before(request.sampling_params):
            _accept(manager, request, grammar, token_ids)
        return grammar

    return _create_grammar


def _accept(manager: Any, request: Any, grammar: Any, token_ids: list[int]) -> None:
    """Show the grammar the tokens after the reasoning, and let the request know if that is over.

    A stand-in carries the grammar: the request itself must not have it before it has seen the tokens.
    """
    own = request.structured_output_request
    stand_in = copy.copy(request)
    stand_in.structured_output_request = dataclasses.replace(own, _grammar=grammar)
    if not manager.accept_tokens(stand_in, token_ids):
        raise ValueError(f"request {request.request_id}: its grammar rejects the tokens that it has generated")
    own.reasoning_ended = stand_in.structured_output_request.reasoning_ended


def _without_prompt_logprobs(params: SamplingParams) -> None:
    """The client has them: they came with the first token."""
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        params.prompt_logprobs = params.prompt_logprob_token_ids = None
        params.skip_reading_prefix_cache = False  # it was for their sake: a hit has no logits
