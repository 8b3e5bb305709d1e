"""Ray Serve LLM with its defaults, in a Ray of its own. Arguments: MODEL NAME HTTP_PORT; prints a line once it serves.

`ray[llm]` asks for more than Ray Serve LLM needs to answer a chat. Where `pyarrow` is missing, an empty module stands
in: Ray imports it to read models from clouds, and for nothing else on this way.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

_EMPTY = {
    "__init__.py": "",
    "fs.py": "class FileSystem: ...\nclass FileSelector: ...\nclass FileType: ...\n",
    "json.py": "class ReadOptions: ...\nclass ParseOptions: ...\n",
}


def main(model: str, name: str, port: int) -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for check in ("HEALTH", "READY"):  # a machine that starts other engines meanwhile is slow
        os.environ[f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S"] = "120"
    with tempfile.TemporaryDirectory(prefix="moeray-bench-") as folder:
        if find_spec("pyarrow") is None:
            _stand_in(Path(folder))
        serve_llm(model, name, port)
        print("serving", file=said, flush=True)
        sys.stdin.read()


def _stand_in(folder: Path) -> None:
    """Let this process, and those of its Ray, import an empty `pyarrow`."""
    (folder / "pyarrow").mkdir()
    for name, text in _EMPTY.items():
        (folder / "pyarrow" / name).write_text(text)
    sys.path.append(str(folder))
    os.environ["RAY_DISABLE_CUSTOM_ARROW_DATA_SERIALIZATION"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(folder)])


def serve_llm(model: str, name: str, port: int) -> None:
    import ray
    from doors import ENGINE_ARGS, EXECUTOR, HOST
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    from moeray.vllm_hooks.served_model import describe_model

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=True, configure_logging=False)
    serve.start(http_options={"host": HOST, "port": port})
    engine = {
        **ENGINE_ARGS,
        "disable_log_stats": True,
        "distributed_executor_backend": EXECUTOR,
        "tokenizer_mode": describe_model(Path(model)).dialect.tokenizer_mode,
    }
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": model},
        engine_kwargs=engine,
        accelerator_config={"kind": "cpu"},
        deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        log_engine_metrics=False,
    )
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=False)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
