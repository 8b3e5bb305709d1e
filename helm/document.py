"""Write what of the chart follows from other files: README.md from values.yaml, `config` in values.schema.json from
moeray.config.

python helm/document.py            write them
python helm/document.py --check    say which are out of date, and fail
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from moeray.config import ClusterConfig

CHART = Path(__file__).parent / "moeray"
KEY = re.compile(r"^( *)(\w+):(.*)$")
SAID = re.compile(r"^ *# -- (.*)$")
GOES_ON = re.compile(r"^ *# (.*)$")


def documented(text: str) -> list[tuple[str, str]]:
    """(dotted key, what `# --` says above it), in the file's order."""
    found: list[tuple[str, str]] = []
    path: list[tuple[int, str]] = []
    said: list[str] = []
    for line in text.splitlines():
        if begins := SAID.match(line):
            said = [begins[1]]
        elif said and (more := GOES_ON.match(line)):
            said.append(more[1])
        elif key := KEY.match(line):
            path = [(depth, name) for depth, name in path if depth < len(key[1])] + [(len(key[1]), key[2])]
            if said:
                found.append((".".join(name for _, name in path), " ".join(said)))
            said = []
        else:
            said = []
    return found


def value_at(values: dict[str, Any], key: str) -> Any:
    """What values.yaml has at a dotted key."""
    for part in key.split("."):
        values = values[part]
    return values


def readme() -> str:
    """The chart's README.md."""
    text = (CHART / "values.yaml").read_text()
    values = yaml.safe_load(text)
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    rows = []
    for key, said in documented(text):
        default = json.dumps(value_at(values, key), ensure_ascii=False)
        shown = f"`{default}`" if len(default) <= 60 else "see values.yaml"
        rows.append(f"| `{key}` | {shown.replace('|', chr(92) + '|')} | {said.replace('|', chr(92) + '|')} |")
    examples = sorted(path.name for path in CHART.glob("values-*.yaml"))
    lines = [f"- `{name}`: {(CHART / name).read_text().splitlines()[0].removeprefix('# ')}" for name in examples]
    return "\n".join(
        [
            f"# Chart {about['name']} {about['version']}",
            "",
            f"{about['description']} How to install and run it: [docs/kubernetes.md](../../docs/kubernetes.md).",
            "",
            "Values to begin with:",
            *lines,
            "",
            "Written by `python helm/document.py` from values.yaml; values.schema.json refuses what is not here.",
            "",
            "| key | default | what |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def config_definitions() -> dict[str, Any]:
    """JSON schema of cluster.yaml; a key that is unknown there is one here."""
    schema = TypeAdapter(ClusterConfig).json_schema(ref_template="#/definitions/{model}")
    parts: dict[str, Any] = schema.pop("$defs")
    return {name: _bare(part) for name, part in {**parts, "ClusterConfig": schema}.items()}


def _bare(part: Any, names: bool = False) -> Any:
    """Without titles, defaults and descriptions, which Helm does not show; `names`: keys are names of properties."""
    if isinstance(part, list):
        return [_bare(each) for each in part]
    if not isinstance(part, dict):
        return part
    left = {key: each for key, each in part.items() if names or key not in ("title", "default", "description")}
    return {key: _bare(each, names=key == "properties" and not names) for key, each in left.items()}


def schema() -> str:
    """values.schema.json: its own text, with the definitions of `config` as moeray.config has them now."""
    whole = json.loads((CHART / "values.schema.json").read_text())
    ours = {name: part for name, part in whole["definitions"].items() if not name.endswith("Config")}
    whole["definitions"] = {**ours, **config_definitions()}
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write README.md and values.schema.json of the chart.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is out of date")
    check = parser.parse_args().check
    stale = []
    for name, text in (("values.schema.json", schema()), ("README.md", readme())):
        path = CHART / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python helm/document.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
