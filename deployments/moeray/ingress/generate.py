"""Generate `moeray.v1` from the proto: `python -m moeray.ingress.generate [target]` (extra `dev`: grpcio-tools)."""

from __future__ import annotations

import sys
from pathlib import Path

PROTO_ROOT = Path(__file__).parent / "proto"
PROTO_FILE = "moeray/v1/inference.proto"
PACKAGE_ROOT = Path(__file__).parents[2]
"""The folder that holds `moeray/v1`: the generated import path is the proto package."""


def generate(target: Path) -> None:
    """Write `moeray/v1/inference_pb2.py`, `.pyi` and `inference_pb2_grpc.py` below `target`.

    Raises:
        RuntimeError: protoc refused the file (its message is on stderr).
    """
    from importlib.resources import files

    from grpc_tools import protoc

    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    includes = [f"-I{PROTO_ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    if protoc.main(["protoc", *includes, *outputs, PROTO_FILE]) != 0:
        raise RuntimeError(f"protoc failed on {PROTO_ROOT / PROTO_FILE}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE_ROOT)
