"""DeepSeek-V4: its checkpoint files and the mathematics of its routed experts (no vLLM, no transformers)."""

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError, ExpertError
from moeray.deepseek_v4.experts import RoutedExperts
from moeray.deepseek_v4.shape import ModelShape

__all__ = ["Checkpoint", "CheckpointError", "ExpertError", "ModelShape", "RoutedExperts"]
