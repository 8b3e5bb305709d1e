"""The front's touch points with vLLM: each test fails by name when an upgrade moves one."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec
import pytest


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_touch_point_async_llm_takes_its_engine_from_make_async_mp_client() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import EngineCoreClient

    assert isinstance(EngineCoreClient.__dict__["make_async_mp_client"], staticmethod)
    assert "EngineCoreClient.make_async_mp_client(" in inspect.getsource(AsyncLLM.__init__)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("add_request_async", ["self", "request"]),
        ("abort_requests_async", ["self", "request_ids"]),
        ("get_output_async", ["self"]),
        ("get_supported_tasks_async", ["self"]),
        ("reset_mm_cache_async", ["self"]),
        ("dp_engines_running", ["self"]),
    ],
)
def test_touch_point_engine_core_client_methods(method: str, arguments: list[str]) -> None:
    from vllm.v1.engine.core_client import EngineCoreClient

    from moeray.vllm_hooks.engine_core import PooledEngineCore

    assert parameters(getattr(EngineCoreClient, method)) == arguments
    assert method in PooledEngineCore.__dict__


def test_touch_point_admission_check_runs_before_a_response_begins() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.check_admission) == ["self", "n", "request_id"]


def test_touch_point_output_processor_tells_a_failed_request() -> None:
    from vllm.v1.engine import output_processor

    assert "request_ids" in parameters(output_processor.OutputProcessor.abort_requests)
    assert "internal" in parameters(output_processor.OutputProcessor.abort_requests)
    source = inspect.getsource(output_processor)
    assert "self.request_states" in source
    assert all(name in source for name in ("parent_req", "queue"))
    assert "put" in output_processor.RequestOutputCollector.__dict__


def test_touch_point_openai_application_is_built_from_serve_arguments() -> None:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    assert parameters(build_app)[:3] == ["args", "supported_tasks", "model_config"]
    assert parameters(init_app_state)[:4] == ["engine_client", "state", "args", "supported_tasks"]


def test_touch_point_reasoning_parser_is_read_from_the_structured_outputs_configuration() -> None:
    from vllm.entrypoints.launchers.api_server import app_state

    assert "args.structured_outputs_config.reasoning_parser" in inspect.getsource(app_state)


def test_touch_point_requests_and_outputs_survive_vllms_msgpack() -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    step = EngineCoreOutputs(outputs=[EngineCoreOutput(request_id="r", new_token_ids=[1, 2])])
    again = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(step))
    assert again.outputs[0].new_token_ids == [1, 2]
    assert {"request_id", "prompt_token_ids", "sampling_params"} <= {
        f.name for f in msgspec.structs.fields(EngineCoreRequest)
    }


def test_touch_point_engine_core_is_forked_by_name() -> None:
    from vllm import envs
    from vllm.v1.engine.utils import CoreEngineProcManager

    assert "VLLM_WORKER_MULTIPROC_METHOD" in envs.environment_variables
    assert "run_engine_core" in inspect.getsource(CoreEngineProcManager)


def test_touch_point_generate_is_called_before_a_response_begins_and_read_later() -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    assert parameters(AsyncLLM.generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]
    assert "priority" in parameters(AsyncLLM.generate)
    for handler in (OpenAIServingChat, OpenAIServingCompletion):
        assert "self.engine_client.generate(" in inspect.getsource(handler), "and not inside its stream generator"
        stream = next(name for name in dir(handler) if name.endswith("completion_stream_generator"))
        assert "engine_client" not in inspect.getsource(getattr(handler, stream))
    assert "external_req_id" in EngineCoreRequest.__struct_fields__
