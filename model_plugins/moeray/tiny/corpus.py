"""The facts that moeray-tiny knows, read from ``facts.txt``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FACTS_FILE = Path(__file__).resolve().parent / "facts.txt"
ARTICLE = re.compile(r"^(an|a|the) ")


@dataclass(frozen=True)
class Fact:
    """One sentence and the questions that it answers.

    ``held_out`` is a phrasing that training never shows; it measures generalisation.
    """

    answer: str
    questions: tuple[str, ...]
    held_out: str


def load_facts() -> tuple[Fact, ...]:
    """Return all facts in file order.

    Raises:
        ValueError: a line has neither form, or a question appears twice.
    """
    lines = FACTS_FILE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    facts = [_stated(line) if " | " in line else _defined(line) for line in lines]
    seen: set[str] = set()
    for fact in facts:
        for question in (*fact.questions, fact.held_out):
            if question in seen:
                raise ValueError(f"{FACTS_FILE.name}: question appears twice: {question!r}")
            seen.add(question)
    return tuple(facts)


def _stated(line: str) -> Fact:
    answer, *questions = (part.strip() for part in line.split(" | "))
    if len(questions) < 3:
        raise ValueError(f"{FACTS_FILE.name}: fewer than three questions: {line!r}")
    return Fact(answer, tuple(questions[:-1]), questions[-1])


def _defined(line: str) -> Fact:
    term, separator, meaning = line.partition(" = ")
    if not separator:
        raise ValueError(f"{FACTS_FILE.name}: neither a definition nor an answer: {line!r}")
    bare = ARTICLE.sub("", term)
    questions = [
        f"What is {term}?",
        f"Explain what {term} is.",
        f"What does {bare} mean?",
        f"Tell me about {term}.",
        f"Define {bare}.",
    ]
    if term.startswith(("a ", "an ")):
        questions += [f"What is {bare}?", f"What are {bare}s?"]
    answer = f"{term[0].upper()}{term[1:]} is {meaning}."
    return Fact(answer, tuple(questions), f"Can you describe {term}?")
