"""`model:` finds a bundled model or a directory, and says what it tried otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeray.config import ConfigError
from moeray.deepseek_v4.source import locate
from moeray.tiny import checkpoint_path


def test_a_bundled_name_is_found_in_the_package() -> None:
    assert locate("moeray-tiny") == checkpoint_path()


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert locate("mine") == locate("./mine") == tmp_path / "mine"


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "~nobody/x", "a/b/c"])
def test_nothing_of_that_name_says_what_was_tried(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a bundled model \\(moeray-tiny\\), nor a directory"):
        locate(name)
