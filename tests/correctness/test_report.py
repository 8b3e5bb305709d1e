"""docs/correctness.md and what makes it belong together."""

from __future__ import annotations

import re

import pytest
from knobs import MATRIX
from mutations import MUTATIONS
from report import DOCUMENT, SECTIONS, replace_section

TEXT = DOCUMENT.read_text(encoding="utf-8")


def section(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)
    assert found, f"docs/correctness.md has no section {name}"
    return found[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_has_a_table_that_says_how_it_was_made(name: str) -> None:
    assert len([line for line in section(name).splitlines() if line.startswith("|")]) > 2
    assert f"report.py --only {name}" in section(name)


def test_every_mutation_is_listed_as_noticed() -> None:
    rows = [line.split(" | ") for line in section("mutations").splitlines() if line.startswith("| ")]
    noticed = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    assert {each.name: noticed.get(each.name) for each in MUTATIONS} == {each.name: "yes" for each in MUTATIONS}


def test_every_knob_is_listed() -> None:
    assert [str(each) for each in MATRIX if f"`{each}`" not in section("knobs")] == []


def test_writing_one_section_leaves_the_others_alone() -> None:
    changed = replace_section(TEXT, "knobs", "| new |")
    assert "<!-- knobs -->\n| new |\n<!-- /knobs -->" in changed
    assert section("experts") in changed
    with pytest.raises(ValueError, match="0 sections 'nothing'"):
        replace_section(TEXT, "nothing", "")
