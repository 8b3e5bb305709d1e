"""The proto is the contract: the committed code is its code, and strangers can use it alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import grpc
import pytest

from moeray.ingress.generate import PACKAGE_ROOT, PROTO_ROOT, generate

GENERATED = ("inference_pb2.py", "inference_pb2.pyi", "inference_pb2_grpc.py")


def test_the_committed_code_equals_the_proto(tmp_path: Path) -> None:
    generate(tmp_path)

    for name in GENERATED:
        assert (tmp_path / "moeray/v1" / name).read_text() == (PACKAGE_ROOT / "moeray/v1" / name).read_text(), name


def test_a_stranger_can_generate_and_import_it_without_our_package(tmp_path: Path) -> None:
    command = [
        "-m",
        "grpc_tools.protoc",
        f"-I{PROTO_ROOT}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
    ]
    subprocess.run([sys.executable, *command, "moeray/v1/inference.proto"], check=True, cwd=tmp_path)
    program = (
        "from moeray.v1 import inference_pb2 as a, inference_pb2_grpc as b; print(a.__file__, b.InferenceStub.__name__)"
    )
    # -S: no .pth files, so that an editable install of ours is not found; grpc and protobuf are, by path.
    path = os.pathsep.join([str(tmp_path), str(Path(grpc.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )

    assert done.stdout.split() == [str(tmp_path / "moeray/v1/inference_pb2.py"), "InferenceStub"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Installed."""
    target = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target)]
    subprocess.run([sys.executable, *command, str(PACKAGE_ROOT.parent)], check=True)
    (built,) = target.glob("moeray-*.whl")
    zipfile.ZipFile(built).extractall(target / "installed")
    return target / "installed"


def test_the_wheel_carries_a_client_that_imports_nothing_heavy(wheel: Path) -> None:
    program = (
        "import sys; from moeray.v1 import inference_pb2 as a, inference_pb2_grpc; print(a.__file__);"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'vllm', 'ray', 'torch', 'numpy', 'fastapi'}));"
        "print(sorted(name for name in sys.modules if name.startswith('moeray.')))"
    )
    # As above, and all of the environment can be found: what is imported is the stub's own choice.
    path = os.pathsep.join([str(wheel), str(Path(grpc.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    where, heavy, ours = done.stdout.splitlines()
    assert Path(where).is_relative_to(wheel)
    assert heavy == "[]"
    assert ours == str(["moeray.v1", "moeray.v1.inference_pb2", "moeray.v1.inference_pb2_grpc"])
