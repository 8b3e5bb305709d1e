"""Every feature over every protocol that has it, with real SDKs, and docs/api.md says no more and no less."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest
from conformance.clients import Clients
from conformance.features import Feature
from conformance.table import DOCUMENT, FEATURES, render, replaced
from front_process import Ingress, ShardProcess

from moeray.config import BatchConfig, IngressConfig

NUM_QUICK = 3
"""Rows of each section that every test run asks; `make api-docs` and `make test-full` ask all."""

WAYS = [
    pytest.param(
        feature,
        way,
        id=f"{feature.section}: {feature.name} over {protocol}",
        marks=() if number < NUM_QUICK else pytest.mark.full,
    )
    for _, rows in groupby(FEATURES, key=lambda feature: feature.section)
    for number, feature in enumerate(rows)
    for protocol, way in (("HTTP", feature.http), ("gRPC", feature.grpc))
    if not isinstance(way, str)
]


@pytest.fixture(scope="module")
def clients(model: Path, shared_shard: ShardProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    batches = BatchConfig(directory=str(tmp_path_factory.mktemp("batches")))
    ingress = Ingress(model, limits=IngressConfig(batches=batches))
    ingress.set_shards(shared_shard)
    yield Clients(ingress)
    ingress.stop()


@pytest.mark.parametrize(("feature", "way"), WAYS)
def test_the_answer_is_what_the_feature_promises(clients: Clients, feature: Feature, way: object) -> None:
    assert callable(way)
    feature.holds(way(clients))


def test_names_are_not_used_twice() -> None:
    names = [(feature.section, feature.name) for feature in FEATURES]
    assert len(set(names)) == len(names)


def test_the_document_has_the_table_of_these_features() -> None:
    document = DOCUMENT.read_text()
    assert replaced(document, render(FEATURES)) == document, "run `make api-docs`"
