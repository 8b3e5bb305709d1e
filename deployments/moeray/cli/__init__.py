"""The `moeray` command."""

from moeray.cli.commands import main

__all__ = ["main"]
