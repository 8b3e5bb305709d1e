"""Make the checkout's virtual environment what the lock says; return at once when it already is.

`make setup` runs this with the system's Python, so it uses the standard library alone and stays readable for older
Pythons up to the version check. The steps and why they are split: docs/adr/0001-packaging.md.

An interrupted run is safe: an `installing` mark lies in the environment from its first to its last change, and one
found at the start means that nothing in there can be trusted, so it is made anew (pip's cache keeps the downloads).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
PROJECT = ROOT / "pyproject.toml"
STAMP_NAME, MARK_NAME, LOG_NAME = "moeray-setup.json", "moeray-installing", "moeray-setup.log"
PYTHONS = ((3, 11), (3, 12))
# Measured: the environment takes 2.7 GB, pip's downloads 0.9 GB; the rest is room to work.
NEEDED_BYTES = {"environment": 4_000_000_000, "downloads": 1_000_000_000}
# pip would compile all 25,000 modules, half of the setup's time. Left for their first use (if ever): tests and models
# that we do not serve.
NOT_COMPILED = (
    r"site-packages/.*/tests?/",
    r"site-packages/torch/testing/_internal/",
    r"site-packages/transformers/models/(?!auto/|deepseek_v4/)",
    r"site-packages/vllm/model_executor/models/",
    r"site-packages/ray/rllib/",
)
CHECK_INSTALLED = """
import importlib.metadata, json, re, sys
pins, forbidden = json.load(sys.stdin)
have = {re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}
wrong = [f"{n}=={v} is locked, {have.get(n, 'nothing')} is installed" for n, v in pins.items() if have.get(n) != v]
wrong += [f"{n} is installed and breaks vLLM on CPU: pip uninstall {n}" for n in forbidden if n in have]
print("\\n".join(wrong))
"""


class SetupError(Exception):
    """What stops the setup, in words that say what to do."""


class Drift(SetupError):
    """The environment is not what the lock says."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_project() -> tuple[str, tuple[str, ...]]:
    """The torch version of the `cpu` extra, and the distributions that must never be installed.

    Raises:
        SetupError: pyproject.toml no longer says one of them.
    """
    import tomllib  # 3.11: after the version check

    project = tomllib.loads(PROJECT.read_text())
    torch = [pin for pin in project["project"]["optional-dependencies"]["cpu"] if pin.startswith("torch==")]
    if len(torch) != 1:
        raise SetupError("pyproject.toml: the extra 'cpu' must pin torch exactly once, as torch==VERSION")
    overrides = project["tool"]["uv"]["override-dependencies"]
    return torch[0].split("==")[1], tuple(canonical(override.split(";")[0].strip()) for override in overrides)


def read_pins() -> dict[str, str]:
    """{canonical name: version} of the lock."""
    return {canonical(n): v for n, v in re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", LOCK.read_text(), re.MULTILINE)}


def wanted_stamp(venv: Path) -> dict[str, str]:
    """What the environment depends on. `base` forces a new one, `lock` a sync, `project` our own package's install."""

    def digest(*paths: Path) -> str:
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()

    return {
        "base": f"{ROOT} {venv} {sys.version_info[0]}.{sys.version_info[1]}",
        "lock": digest(LOCK, Path(__file__)),
        "project": digest(PROJECT),
    }


def check_machine(venv: Path) -> None:
    """Raises: SetupError naming what the machine lacks."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise SetupError(f"the lock is for Linux on x86_64; this is {sys.platform} on {os.uname().machine}")
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: install its venv module (Debian, Ubuntu: "
            f"apt-get install python{version}-venv)"
        ) from None
    for purpose, path in (("environment", venv.parent), ("downloads", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(path).free
        if free < NEEDED_BYTES[purpose]:
            hint = "" if purpose == "environment" else " or point TMPDIR to another disk"
            raise SetupError(
                f"{path} has {free / 1e9:.1f} GB free, the {purpose} need{'s' * (purpose == 'environment')} "
                f"{NEEDED_BYTES[purpose] / 1e9:.1f} GB: make room{hint}"
            )


def run(venv: Path, title: str, command: list[str], num_expected: int = 0) -> str | None:
    """Run one step: its output goes to the log, its progress (pip's "Collecting" lines) here.

    Returns:
        None if the step worked, its output if it failed.
    """
    started, seen, output = time.monotonic(), 0, []
    say(title)
    with (venv / LOG_NAME).open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        # Set in some containers: it would make every start compile vLLM anew.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        # close_fds=False: the step shares main()'s guard, which so holds until the step ends, even if we are killed.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env, close_fds=False
        )
        for line in process.stdout or ():
            log.write(line)
            output.append(line)
            if line.startswith("Collecting "):
                seen += 1
                if num_expected and seen % 40 == 0:
                    say(f"  {seen} of {num_expected} packages fetched, {time.monotonic() - started:.0f} s")
            elif line.startswith("Installing collected packages") and num_expected:
                say(f"  all fetched, {time.monotonic() - started:.0f} s; unpacking")
    return "".join(output) if process.wait() else None


def fail(venv: Path, what: str, output: str) -> SetupError:
    tail = "\n".join(output.strip().splitlines()[-15:])
    return SetupError(f"{what}. The end of what it said (all of it: {venv / LOG_NAME}):\n{tail}")


def make_environment(venv: Path) -> None:
    """Raises: SetupError also for an environment that is somebody else's: that one is not ours to remove."""
    if venv.exists() and any(venv.iterdir()) and not any((venv / name).exists() for name in (STAMP_NAME, MARK_NAME)):
        raise SetupError(f"{venv} was not made by `make setup`: remove it, or name another place: make setup VENV=PATH")
    if venv.exists():
        say(f"removing the incomplete or outdated {venv}")
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    (venv / MARK_NAME).touch()
    # Not sys.executable: with the environment activated, that lies in the folder just removed.
    python = getattr(sys, "_base_executable", sys.executable)
    output = run(venv, f"creating {venv} with {python}", [python, "-m", "venv", str(venv)])
    if output is not None:
        raise fail(venv, "the virtual environment could not be created", output)


def install_lock(venv: Path, num_pins: int) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    command += ["--no-compile", "--progress-bar", "off", "--require-hashes", "--only-binary", ":all:", "-r", str(LOCK)]
    output = run(venv, f"installing {num_pins} locked packages", command, num_pins)
    if output is not None:
        raise fail(venv, "the locked packages could not be installed", output)


def install_torch(venv: Path, version: str) -> None:
    """The CPU build has the local version `+cpu`. Some indexes carry it; otherwise uv knows where PyTorch keeps it."""
    build = f"torch=={version}+cpu"
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    by_pip = run(
        venv, f"installing {build}", [*pip, "--no-compile", "--progress-bar", "off", "--only-binary", ":all:", build]
    )
    if by_pip is None:
        return
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(venv / "bin" / "python"), "--no-deps"]
    by_uv = run(
        venv, "  not in pip's index; asking PyTorch's own", [*uv, "--torch-backend", "cpu", f"torch=={version}"]
    )
    if by_uv is not None:
        raise fail(venv, f"{build} was found neither by pip nor by uv", f"{by_pip}\n{by_uv}")


def compile_modules(venv: Path) -> None:
    """Write the bytecode of what we import. A file that does not compile (a template, say) is no failure."""
    python = str(venv / "bin" / "python")
    command = [python, "-m", "compileall", "-qq", "-j", "0", "-x", "|".join(NOT_COMPILED), str(venv / "lib")]
    run(venv, "compiling modules", command)


def install_project(venv: Path) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    output = run(venv, "installing moeray (editable)", [*command, "--no-build-isolation", "-e", str(ROOT)])
    if output is not None:
        raise fail(venv, "moeray itself could not be installed", output)


def verify(venv: Path, pins: dict[str, str], forbidden: tuple[str, ...]) -> None:
    """Raises: Drift naming each package that differs from the lock."""
    question = json.dumps([pins, forbidden])
    command = [str(venv / "bin" / "python"), "-c", CHECK_INSTALLED]
    wrong = subprocess.run(command, input=question, text=True, capture_output=True, check=True).stdout.strip()
    if wrong:
        raise Drift(f"{venv} differs from the lock (`make setup` again restores locked versions):\n{wrong}")


def bring_up_to_date(venv: Path) -> None:
    stamp, wanted = venv / STAMP_NAME, wanted_stamp(venv)
    present = json.loads(stamp.read_text()) if stamp.exists() else {}
    if present == wanted and not (venv / MARK_NAME).exists():
        return
    started = time.monotonic()
    check_machine(venv)
    torch, forbidden = read_project()
    pins = read_pins()
    if present.get("base") != wanted["base"] or (venv / MARK_NAME).exists():
        make_environment(venv)
        present = {}
    (venv / MARK_NAME).touch()
    if present.get("lock") != wanted["lock"]:
        install_lock(venv, len(pins))
    try:
        install_torch(venv, torch)
        compile_modules(venv)
        install_project(venv)
        verify(venv, {**pins, "torch": f"{torch}+cpu"}, forbidden)
    except SetupError as error:
        # The step failed by itself and left order behind: the next run continues here. After Drift, from the lock on.
        done = ("base",) if isinstance(error, Drift) else ("base", "lock")
        stamp.write_text(json.dumps({key: wanted[key] for key in done}))
        (venv / MARK_NAME).unlink()
        raise
    stamp.write_text(json.dumps(wanted, indent=1))
    (venv / MARK_NAME).unlink()
    say(f"ready in {time.monotonic() - started:.0f} s: {venv}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Create or update the checkout's virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    venv = Path.cwd() / parser.parse_args().venv
    if sys.version_info[:2] not in PYTHONS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        print(f"setup: error: moeray needs Python {wanted}; {sys.executable} is {here}.", file=sys.stderr)
        print("setup: name another one: make setup PYTHON=python3.11", file=sys.stderr)
        return 2
    guard = os.open(ROOT, os.O_RDONLY)
    os.set_inheritable(guard, True)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another setup of this checkout is running; waiting for it")
        fcntl.flock(guard, fcntl.LOCK_EX)
    try:
        bring_up_to_date(venv)
    except (SetupError, OSError) as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; the next run starts the environment anew", file=sys.stderr)
        return 130
    finally:
        os.close(guard)
    return 0


if __name__ == "__main__":
    sys.exit(main())
