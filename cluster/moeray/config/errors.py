"""The one error a person gets for a bad cluster.yaml."""

from __future__ import annotations


class ConfigError(ValueError):
    """Names the key (dotted path), what is wrong with it and what to do; printed as it is."""
