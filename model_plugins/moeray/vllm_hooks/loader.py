"""vLLM load format `moeray`: reads from the checkpoint exactly the tensors the shard keeps, and counts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.tensor_reader import TensorReader

LOAD_FORMAT = "moeray"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the last load took from the disk.

    Attributes:
        names: tensors read, as the checkpoint names them.
        skipped: tensors left unread.
        bytes_read, bytes_total: of all tensors.
    """

    names: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_read: int
    bytes_total: int


_last_report: LoadReport | None = None


def last_report() -> LoadReport | None:
    """The report of this process' last load; None where nothing was loaded with this format."""
    return _last_report


@register_model_loader(LOAD_FORMAT)
class ShardLoader(BaseModelLoader):  # type: ignore[misc, unused-ignore]
    """Leaves unread what `model.is_unused_checkpoint_weight` names."""

    def download_model(self, model_config: Any) -> None:
        """Nothing: the checkpoint is a directory on this machine."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill every parameter of `model`.

        Raises:
            CheckpointError: a file is missing or truncated, or a parameter got no tensor.
        """
        global _last_report
        directory = Path(model_config.model)
        checkpoint = Checkpoint.open(directory)
        unused: Any = model.is_unused_checkpoint_weight
        skipped = tuple(name for name in checkpoint.tensors if unused(name))
        names = tuple(name for name in checkpoint.tensors if not unused(name))
        with TensorReader() as reader:
            loaded: set[str] = model.load_weights(_read(checkpoint, names, reader))  # type: ignore[operator, unused-ignore]
            bytes_read = reader.bytes_read
        missing = sorted({name for name, _ in model.named_parameters()} - loaded)
        if missing:
            raise CheckpointError(directory, f"no tensor for {', '.join(missing)}", "download the checkpoint again")
        _last_report = LoadReport(names, skipped, bytes_read, checkpoint.bytes_of(checkpoint.tensors))


def _read(checkpoint: Checkpoint, names: tuple[str, ...], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, reader.read([checkpoint.tensors[name]])
