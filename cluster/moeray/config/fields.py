"""Kinds of values in cluster.yaml that several of its parts use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import ConfigDict, Field

FROM_FILE = ConfigDict(extra="forbid", arbitrary_types_allowed=False)

Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
SecondsOrZero = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Labels = Mapping[str, str]


def bare_off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value
