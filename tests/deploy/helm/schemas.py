"""Strict schemas: what Kubernetes or a custom resource's definition does not know is an error."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from deploy.helm.chart import HOW, Manifest

CRDS = Path(__file__).parents[1] / "crds"
WITHOUT_SCHEMA = {("cert-manager.io/v1", "Certificate")}
"""Custom resources whose schema was not at hand."""


def errors_of(manifest: Manifest, kubernetes: str) -> list[str]:
    """What is wrong with one object for this version of Kubernetes ("1.33")."""
    if (manifest["apiVersion"], manifest["kind"]) in WITHOUT_SCHEMA:
        return []
    if (CRDS / f"{manifest['kind']}.json").exists():
        found = custom_resource(manifest["kind"]).iter_errors(manifest)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]
    validator = pytest.importorskip("kubernetes_validate", reason=f"kubernetes-validate is not installed: {HOW}")
    try:
        validator.validate(manifest, kubernetes, strict=True)
    except validator.ValidationError as error:
        return [str(error)[:300]]
    return []


@cache
def custom_resource(kind: str) -> jsonschema.Draft7Validator:
    schema = json.loads((CRDS / f"{kind}.json").read_text())
    _make_strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(schema)


def _make_strict(schema: Any) -> None:
    """In place: unknown keys are refused unless the definition keeps them; Kubernetes' own marks become JSON schema."""
    if isinstance(schema, list):
        for each in schema:
            _make_strict(each)
    if not isinstance(schema, dict):
        return
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps:
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    for each in list(schema.values()):
        _make_strict(each)
