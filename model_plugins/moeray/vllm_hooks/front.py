"""The front as one object: vLLM's AsyncLLM over a pool and its OpenAI application."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeray.vllm_hooks.served_model import Dialect, describe_model

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
    from moeray.vllm_hooks.engine_args import engine_config, front_engine_args

    engine_args = front_engine_args(**settings)
    return engine_args, engine_config(engine_args)


def handshake(vllm_config: Any) -> tuple[str, str]:
    """(vLLM's version, the model's fingerprint): what a shard must have in common with this front."""
    import vllm

    from moeray.vllm_hooks.fingerprint import model_fingerprint

    return vllm.__version__, model_fingerprint(vllm_config.model_config)


def front_dialect(settings: dict[str, Any], engine_args: Any) -> Dialect:
    """The model's dialect with the parsers that the configuration chose; arguments as of and from `front_config`."""
    from moeray.vllm_hooks.engine_args import TOOL_PARSER

    own = describe_model(Path(settings["model"])).dialect
    return replace(
        own,
        tool_parser=settings["engine_args"].get(TOOL_PARSER, own.tool_parser),
        reasoning_parser=engine_args.reasoning_parser or None,
    )


async def build_front(pool: RequestPool, engine_args: Any, vllm_config: Any, *, dialect: Dialect) -> Front:
    """Run vLLM's front over `pool`, on the running loop."""
    from moeray.vllm_hooks.engine_core import front_over
    from moeray.vllm_hooks.openai_app import build_openai_app

    llm = front_over(pool, vllm_config)
    return Front(llm, await build_openai_app(llm, engine_args, dialect=dialect))
