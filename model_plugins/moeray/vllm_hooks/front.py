"""The front as one object: vLLM's AsyncLLM over a pool and its OpenAI application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeray.vllm_hooks.engine_core import FrontLLM, RequestPool
    from moeray.vllm_hooks.openai_app import OpenAIApp


@dataclass(frozen=True, slots=True)
class Front:
    """vLLM without a model."""

    llm: FrontLLM
    openai: OpenAIApp


def front_config(settings: dict[str, Any]) -> tuple[Any, Any]:
    """vLLM's (engine arguments, configuration) for a process that loads no model; imports vLLM, takes seconds of CPU.

    Args:
        settings: keyword arguments of `front_engine_args`.
    """
    from vllm.usage.usage_lib import UsageContext

    from moeray.vllm_hooks.engine_args import front_engine_args

    engine_args = front_engine_args(**settings)
    return engine_args, engine_args.create_engine_config(UsageContext.API_SERVER)


def handshake(vllm_config: Any) -> tuple[str, str]:
    """(vLLM's version, the model's fingerprint): what a shard must have in common with this front."""
    import vllm

    from moeray.vllm_hooks.fingerprint import model_fingerprint

    return vllm.__version__, model_fingerprint(vllm_config.model_config)


async def build_front(pool: RequestPool, engine_args: Any, vllm_config: Any, *, parser: str | None) -> Front:
    """Run vLLM's front over `pool`, on the running loop."""
    from moeray.vllm_hooks.engine_core import front_over
    from moeray.vllm_hooks.openai_app import build_openai_app

    llm = front_over(pool, vllm_config)
    return Front(llm, await build_openai_app(llm, engine_args, parser=parser))
