"""What a benchmark leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import records


def test_the_file_is_a_list_of_records_and_the_facts_lie_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "new" / "hop.json"
    found = [{"transport": "gloo", "p50_us": 1.5}, {"transport": "channel", "p50_us": 1.0}]
    records.write(file, found, rounds=5)
    assert json.loads(file.read_text()) == found
    read, facts = records.read(file)
    assert read == found
    assert facts["rounds"] == 5
    assert {"machine", "commit", "command", "date", "load"} <= facts.keys()


def test_a_spread_is_the_median_between_its_extremes() -> None:
    assert records.spread([3.0, 1.0, 2.0]) == {"ratio": 2.0, "ratio_min": 1.0, "ratio_max": 3.0}


def test_a_percentile_is_one_of_the_values() -> None:
    values = list(range(1, 101))
    assert records.percentile(values, 99) == 99
    assert records.percentile(values, 50) == 50
    assert records.percentile([7.0], 99) == 7.0
