"""Write each module's README.md from its own text: the comment that opens main.tf, its variables, its outputs.

python terraform/document.py            write them
python terraform/document.py --check    say which are out of date, and fail
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

MODULES = Path(__file__).parent / "modules"
BLOCK = re.compile(r'^(variable|output) "([^"]+)" \{\n(.*?)^\}', re.MULTILINE | re.DOTALL)
PROVIDER = re.compile(r'source\s+= "([^"]+)"\s+version = "([^"]+)"')


def blocks(text: str, kind: str) -> dict[str, str]:
    """Name -> body of the top-level blocks of one kind (`variable`, `output`) in formatted HCL."""
    return {name: body for found, name, body in BLOCK.findall(text) if found == kind}


def argument(body: str, name: str) -> str | None:
    """A block's own argument as it stands there; None where it has none. It ends where its brackets end."""
    start = re.search(rf"^  {name} +?= *", body, re.MULTILINE)
    if start is None:
        return None
    lines: list[str] = []
    for line in body[start.end() :].splitlines():
        lines.append(line)
        text = "".join(lines)
        if all(text.count(opening) <= text.count(closing) for opening, closing in ("()", "[]", "{}")):
            break
    return re.sub(r"\s+", " ", " ".join(lines)).strip()


def opening_comment(text: str) -> str:
    """The comment at the very beginning, without its marks; an empty comment line parts paragraphs."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def _inputs(text: str) -> list[str]:
    rows = ["| variable | type | default | what |", "|---|---|---|---|"]
    for name, body in blocks(text, "variable").items():
        default = argument(body, "default")
        what = (argument(body, "description") or "").strip('"').replace('\\"', '"')
        kind = argument(body, "type") or "any"
        rows.append(f"| `{name}` | {_code(kind)} | {_code(default) if default else 'required'} | {what} |")
    return rows


def _outputs(text: str) -> list[str]:
    rows = ["| output | what |", "|---|---|"]
    for name, body in blocks(text, "output").items():
        rows.append(f"| `{name}` | {(argument(body, 'description') or '').strip(chr(34))} |")
    return rows


def readme(module: Path) -> str:
    """What README.md of a module must say."""
    providers = PROVIDER.findall((module / "versions.tf").read_text())
    needs = ", ".join(f"{source} {version}" for source, version in providers)
    return "\n".join(
        [
            f"# {module.name}",
            "",
            opening_comment((module / "main.tf").read_text()),
            "",
            f"Needs Terraform 1.11 or later, {needs}. Written by `python terraform/document.py` from the `.tf` files.",
            "",
            "## Variables",
            *_inputs((module / "variables.tf").read_text()),
            "",
            "## Outputs",
            *_outputs((module / "outputs.tf").read_text()),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Write each module's README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where one is out of date")
    check: bool = parser.parse_args().check
    stale = []
    for module in sorted(path for path in MODULES.iterdir() if path.is_dir()):
        path, text = module / "README.md", readme(module)
        if path.exists() and path.read_text() == text:
            continue
        stale.append(path)
        if not check:
            path.write_text(text)
    for path in stale:
        print(f"{'out of date' if check else 'written'}: {path}", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
