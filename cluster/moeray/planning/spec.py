"""plan.yaml: what is to be served, on what, how fast. Strict: unknown keys are errors that name the field."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moeray.config.explain import explain
from moeray.planning.efficiency import Efficiency
from moeray.planning.formats import KV_BYTES, FormatName, Formats
from moeray.planning.hardware import Hardware, catalogue
from moeray.planning.shape import ModelShape, ShapeError, shape_of

FROM_FILE = ConfigDict(extra="forbid")
Count = Annotated[int, Field(strict=True, ge=1)]
Part = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
KvFormat = Literal["float32", "bf16", "fp8"]


class PlanError(ValueError):
    """A plan.yaml that cannot be planned; one line per wrong key."""


@dataclass(frozen=True, config=FROM_FILE)
class ModelSpec:
    """Attributes:
    config: a bundled name (`moeray plan --models`), a config.json, or a checkpoint's directory.
    routed, other, kv, dispatch: formats of routed experts, of other weights, of cached keys and values, of rows on
        their way to the experts (they come back in bf16).
    engram_parameters: values of n-gram tables in host memory, beside what the model has.
    """

    config: str
    routed: FormatName = "bf16"
    other: FormatName = "bf16"
    kv: KvFormat = "bf16"
    dispatch: Literal["bf16", "fp8", "float32"] = "bf16"
    engram_parameters: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True, config=FROM_FILE)
class HardwareSpec:
    """Attributes:
    attention: device of shards, and of plain expert parallelism; a name of the catalogue.
    experts: device of groups; by default the same.
    most: devices of one replica of the model.
    price, experts_price: per device and hour, in the currency of the answer; by default the catalogue's.
    shared_cores: devices are cores of one machine that has so many for all processes; 0: each process has its own.
    """

    attention: str
    experts: str | None = None
    most: Count = 64
    price: Positive | None = None
    experts_price: Positive | None = None
    shared_cores: Annotated[int, Field(strict=True, ge=0)] = 0


@dataclass(frozen=True, config=FROM_FILE)
class WorkloadSpec:
    """Attributes:
    prompt, output: tokens of a mean request.
    cached: share of the prompt whose KV is fetched and not computed.
    rate: requests per second in all; None: what one replica can do.
    """

    prompt: Count = 1024
    output: Count = 256
    cached: Part = 0.0
    rate: Positive | None = None


@dataclass(frozen=True, config=FROM_FILE)
class GoalSpec:
    """Attributes:
    ttft_s: mean time to the first token.
    tpot_s: mean time between later tokens.
    """

    ttft_s: Positive = 2.0
    tpot_s: Positive = 0.05


@dataclass(frozen=True, config=FROM_FILE)
class PlanSpec:
    """A plan.yaml."""

    model: ModelSpec
    hardware: HardwareSpec
    workload: WorkloadSpec = Field(default_factory=WorkloadSpec)
    goals: GoalSpec = Field(default_factory=GoalSpec)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Task:
    """A plan.yaml with its names looked up."""

    shape: ModelShape
    formats: Formats
    attention: Hardware
    experts: Hardware
    most: int
    workload: WorkloadSpec
    goals: GoalSpec
    efficiency: Efficiency
    shared_cores: int = 0

    @property
    def context(self) -> int:
        """Tokens of a request in the middle of its answer."""
        return self.workload.prompt + self.workload.output // 2


def load_plan(path: Path) -> PlanSpec:
    """Raises PlanError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanError(f"{path}: is not YAML: {error}") from error
    return parse_plan(data, str(path))


def parse_plan(data: object, source: str = "plan") -> PlanSpec:
    """Raises PlanError."""
    if not isinstance(data, Mapping):
        raise PlanError(f"{source}: must be a mapping with `model` and `hardware`")
    try:
        return TypeAdapter(PlanSpec).validate_python(data)
    except ValidationError as error:
        raise PlanError("\n".join(f"{source}: {explain(item, PlanSpec)}" for item in error.errors())) from error


def task_of(spec: PlanSpec, efficiency: Efficiency, places: Mapping[str, Path] = MappingProxyType({})) -> Task:
    """With the names looked up.

    Args:
        places: checkpoints by names of their own.
    Raises:
        PlanError: a name is not known, or the model is not of a family that can be planned.
    """
    model, kv = spec.model, KV_BYTES[spec.model.kv]
    shape = load_shape(str(places.get(model.config, model.config)))
    context = spec.workload.prompt + spec.workload.output
    if context > shape.max_context:
        raise PlanError(f"workload: prompt and output are {context} tokens, the model has {shape.max_context}")
    dispatch = {"float32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128}[model.dispatch]
    back = 4.0 if model.dispatch == "float32" else 2.0
    priced = spec.hardware
    return Task(
        shape=replace(shape, engram=shape.engram + int(model.engram_parameters)),
        formats=Formats(model.routed, model.other, *kv, dispatch, back),
        attention=_device("hardware.attention", priced.attention, priced.price),
        experts=_device("hardware.experts", priced.experts or priced.attention, priced.experts_price or priced.price),
        most=priced.most,
        workload=spec.workload,
        goals=spec.goals,
        efficiency=efficiency,
        shared_cores=priced.shared_cores,
    )


def bundled_models() -> list[str]:
    """Names that `model.config` may be."""
    folder = files("moeray.planning") / "data" / "models"
    return sorted(each.name.removesuffix(".json") for each in folder.iterdir() if each.name.endswith(".json"))


def load_shape(name: str) -> ModelShape:
    """Of a bundled name, a config.json, or a checkpoint's directory; raises PlanError."""
    folder = files("moeray.planning") / "data" / "models"
    path = Path(name)
    try:
        if name in bundled_models():
            text = (folder / f"{name}.json").read_text(encoding="utf-8")
        else:
            text = (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8")
        return shape_of(json.loads(text), name if name in bundled_models() else path.resolve().name)
    except OSError as error:
        near = difflib.get_close_matches(name, bundled_models(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"bundled are {', '.join(bundled_models())}"
        raise PlanError(f"model.config: {name!r} is no bundled name and cannot be read; {hint}") from error
    except ShapeError as error:
        raise PlanError(f"model.config: {name}: {error}") from error
    except ValueError as error:
        raise PlanError(f"model.config: {name}: is not a config.json: {error}") from error


def _device(key: str, name: str, price: float | None) -> Hardware:
    if name not in catalogue():
        raise PlanError(f"{key}: {name!r} is not in the catalogue: {', '.join(catalogue())}")
    device = catalogue()[name]
    return device if price is None else replace(device, price=price)
