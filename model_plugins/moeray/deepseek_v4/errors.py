"""Errors of the checkpoint on disk and of the experts' computation."""

from __future__ import annotations

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint file that cannot be used: names the file, what is wrong with it and what to do."""

    def __init__(self, file: Path, wrong: str, do: str) -> None:
        super().__init__(f"{file}: {wrong}; {do}")
        self.file = file
        self.wrong = wrong
        self.do = do


class ExpertError(RuntimeError):
    """An expert group cannot answer this call: an expert it does not hold, bad input or a non-finite result."""
