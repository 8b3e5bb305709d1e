"""A Dockerfile as data, strictly: what is not understood is an error."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = ("ARG", "FROM", "WORKDIR", "COPY", "RUN", "LABEL", "ENV", "USER", "CMD")


@dataclass(frozen=True)
class Instruction:
    """`options` are those that begin with --; `words` the rest as a shell would split it; `text` all of it."""

    name: str
    text: str
    options: dict[str, str]
    words: list[str]


@dataclass
class Stage:
    """From one FROM to the next. `base` as written."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions if each.name == name]

    @property
    def commands(self) -> list[str]:
        """Of all RUN lines, one after the other."""
        return [part.strip() for each in self.all("RUN") for part in re.split(r"&&|\|\|", each.text)]


@dataclass
class Dockerfile:
    arguments: dict[str, str]
    stages: list[Stage]


def parse(path: Path) -> Dockerfile:
    """Raises ValueError: an instruction that is not known, or one before the first FROM that is no ARG."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    found = Dockerfile({}, [])
    for text in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not text.strip():
            continue
        name, _, rest = text.partition(" ")
        if name not in KNOWN:
            raise ValueError(f"{path.name}: {name} is not known")
        _add(found, name, rest.strip(), path)
    return found


def _add(found: Dockerfile, name: str, text: str, path: Path) -> None:
    if name == "FROM":
        base, _, stage = text.partition(" AS ")
        found.stages.append(Stage(base, stage))
    elif found.stages:
        words = shlex.split(text)
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        is_copy = name == "COPY"
        rest = [word for word in words if not (is_copy and word.startswith("--"))]
        found.stages[-1].instructions.append(Instruction(name, text, options if is_copy else {}, rest))
    elif name == "ARG":
        key, _, value = text.partition("=")
        found.arguments[key] = value
    else:
        raise ValueError(f"{path.name}: {name} before the first FROM")
