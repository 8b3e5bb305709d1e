"""The bundled model ``moeray-tiny``: a small trained DeepSeek-V4 checkpoint and what makes it."""

from pathlib import Path


def checkpoint_path() -> Path:
    """Return the directory of the bundled checkpoint (config, weights, tokenizer, golden prompts)."""
    return Path(__file__).resolve().parent / "checkpoint"
