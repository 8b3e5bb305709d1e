"""Every `moeray` command that a document tells people to type is one that there is; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moeray.cli.commands import main

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^(?:\$ |[A-Z_]+=\S+ |\.venv/bin/)*(moeray [a-z].*)$", re.MULTILINE)
QUOTED = re.compile(r"`(moeray [a-z][^`]*)`")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINKED = [*DOCUMENTS, *sorted((ROOT / "helm").rglob("*.md")), *sorted((ROOT / "terraform").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")


def commands(document: Path) -> list[str]:
    """As typed, without what a shell would do with them."""
    text = document.read_text(encoding="utf-8")
    found = [line for block in FENCED.findall(text) for line in LINE.findall(block)]
    found += QUOTED.findall(FENCED.sub("", text))
    return [re.split(r"\s#\s|\s#$|\s{3,}| [|>&;] ?", each)[0].strip() for each in found]


def test_documents_name_commands() -> None:
    assert sum(len(commands(each)) for each in DOCUMENTS) > 40


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if commands(each)], ids=lambda each: each.name)
def test_what_documents_say_to_type_is_understood(
    document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moeray.cli.commands._run", lambda options: 0)
    for command in commands(document):
        arguments = [re.sub(r"[\[\]]|\.\.\.$", "", each) for each in shlex.split(command.replace("...", " "))[1:]]
        arguments = [re.sub(r"=(N|M|POOL)$", "=2", each) for each in arguments if each]
        if "|" in command or len(arguments) == 1:
            continue  # a command's name in a sentence
        assert _understood(arguments), f"{document.name}: {command}: {capsys.readouterr().err}"


def _understood(arguments: list[str]) -> bool:
    try:
        return main(arguments) == 0
    except SystemExit as stopped:
        return stopped.code == 0


@pytest.mark.parametrize("document", LINKED, ids=lambda each: str(each.relative_to(ROOT)))
def test_links_within_the_repository_lead_to_files(document: Path) -> None:
    text = FENCED.sub("", document.read_text(encoding="utf-8"))
    targets = [each for each in LINK.findall(text) if "://" not in each and not each.startswith("mailto:")]
    assert [each for each in targets if not (document.parent / each).exists()] == []


def test_the_page_of_metrics_is_what_its_script_writes() -> None:
    checked = subprocess.run(
        [sys.executable, ROOT / "scripts" / "document_metrics.py", "--check"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
