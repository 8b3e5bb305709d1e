"""Every deliberately broken variant is noticed by the test that is named for it, and by nothing but the change."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, Mutation, applied, copy_tree, run_tests, verdict


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("mutated"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_to_change_is_there_once(mutation: Mutation) -> None:
    text = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.name}: write this mutation anew, {mutation.file} has changed"
    assert mutation.new != mutation.old


@pytest.mark.full
@pytest.mark.timeout(900)
def test_without_a_mutation_every_named_test_passes(tree: Path) -> None:
    done = run_tests(tree, *dict.fromkeys(mutation.test for mutation in MUTATIONS))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_named_test_fails(mutation: Mutation, tree: Path) -> None:
    with applied(mutation, tree):
        done = run_tests(tree, mutation.test)
    assert verdict(done), done.stdout[-4000:] + done.stderr[-1000:]
