"""Which model two processes mean, without comparing paths."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig

_NAMED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def model_fingerprint(model_config: ModelConfig) -> str:
    """Short content hash of the configuration and tokenizer (not the weights), plus the context length.

    A directory is hashed by content, so that two nodes may keep it at different paths; a hub id by its revision.
    """
    digest = hashlib.sha256()
    directory = Path(model_config.model)
    if directory.is_dir():
        for name in _NAMED_FILES:
            if (file := directory / name).is_file():
                digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    else:
        revision = getattr(model_config.hf_config, "_commit_hash", None) or model_config.revision or ""
        digest.update(f"{model_config.model}@{revision}".encode())
    return f"{digest.hexdigest()[:16]}/{model_config.max_model_len}"
