"""terraform/: form, references, documents, and what can be run of it without a cloud.

Providers come from a local mirror. It is looked for in Terraform's own places and under /opt; MOERAY_TERRAFORM_MIRROR
names another directory, or says `registry`: then they are downloaded, and every root can be validated. What a missing
provider leaves out is skipped by its name; the checks of the variables run all the same, for they need none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TERRAFORM = Path(__file__).parents[2] / "terraform"
MODULES = sorted(path.name for path in (TERRAFORM / "modules").iterdir() if path.is_dir())
EXAMPLES = sorted(str(path.parent.relative_to(TERRAFORM)) for path in TERRAFORM.glob("examples/*/*/main.tf"))
ROOTS = [f"modules/{name}" for name in MODULES] + EXAMPLES
TIMEOUT_S = 600.0
"""For one command: the AWS provider takes seconds to start alone, most of a minute on a busy machine."""

BLOCK = re.compile(r'^(\w+) (?:"([^"]+)" )?"([^"]+)" \{(?:\}|\n(.*?)^\})', re.MULTILINE | re.DOTALL)

needs_terraform = pytest.mark.skipif(
    shutil.which("terraform") is None, reason="the program `terraform` is not installed"
)
pytestmark = pytest.mark.timeout(2 * TIMEOUT_S)


# --- reading HCL, as far as it is needed: formatted files, whose blocks begin and end at the margin -----------------


def source_of(root: str) -> str:
    """All .tf files of a root, without comments."""
    text = "\n".join(path.read_text() for path in sorted((TERRAFORM / root).glob("*.tf")))
    return re.sub(r"^\s*#.*$|\s+#\s.*$", "", text, flags=re.MULTILINE)


def bodies(source: str, kind: str) -> dict[str, str]:
    """Body by name of the blocks of one kind; a resource's or data source's name is `type.name`."""
    return {
        f"{label}.{name}" if label else name: body
        for found, label, name, body in BLOCK.findall(source)
        if found == kind
    }


def local_names(source: str) -> set[str]:
    """Names that a root's `locals` blocks give."""
    found = re.findall(r"^locals \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    return {name for body in found for name in re.findall(r"^  (\w+) +?= ", body, re.MULTILINE)}


def providers_of(root: str) -> set[str]:
    """Providers that a root and the modules it calls need: `aws`, `google`, `helm`."""
    source = source_of(root)
    called = re.findall(r'source += "[./]+/(modules/[^"]+)"', source)
    return set(re.findall(r'source += "hashicorp/(\w+)"', source)).union(*map(providers_of, called))


def undeclared_references(root: str) -> set[str]:
    """What a root's files refer to and nothing declares: the part of `validate` that needs no provider."""
    source = source_of(root)
    declared = {f"var.{name}" for name in bodies(source, "variable")} | {
        f"local.{name}" for name in local_names(source)
    }
    declared |= set(bodies(source, "resource")) | {f"data.{name}" for name in bodies(source, "data")}
    for name, body in bodies(source, "module").items():
        declared |= {
            f"module.{name}",
            *(f"module.{name}.{output}" for output in bodies(source_of(module_path(body)), "output")),
        }
    referred = set(re.findall(r"(?<![\w.])(?:var|local)\.\w+", source))
    referred |= set(re.findall(r"(?<![\w.])(?:data\.)?(?:aws|google|helm)_\w+\.\w+", source))
    referred |= set(re.findall(r"(?<![\w.])module\.\w+(?:\.\w+)?", source))
    return referred - declared


def module_path(body: str) -> str:
    """`modules/NAME` of a module call."""
    found = re.search(r'source += "[./]+/(modules/[^"]+)"', body)
    assert found is not None, body
    return found[1]


# --- running Terraform on a copy ------------------------------------------------------------------------------------


def mirrors() -> list[Path]:
    """Directories that hold unpacked or zipped providers in Terraform's layout."""
    named = os.environ.get("MOERAY_TERRAFORM_MIRROR")
    places = [
        Path.home() / ".terraform.d/plugins",
        *map(Path, ("/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins")),
    ]
    places = [Path(named)] if named else [*places, *sorted(Path("/opt").glob("*"))]
    return [place for place in places if (place / "registry.terraform.io").is_dir()]


class Workspace:
    """A copy of terraform/ and an environment in which `terraform` finds providers in the mirrors alone."""

    def __init__(self, directory: Path) -> None:
        self.tree = directory / "terraform"
        shutil.copytree(TERRAFORM, self.tree, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
        self._initialised: dict[frozenset[str], Path] = {}
        self.downloads = os.environ.get("MOERAY_TERRAFORM_MIRROR") == "registry"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
        self.environment |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1"}
        if not self.downloads:
            settings = directory / "settings.tfrc"
            found = "".join(f'  filesystem_mirror {{\n    path = "{path}"\n  }}\n' for path in mirrors())
            settings.write_text(f"provider_installation {{\n{found}}}\n")
            self.environment["TF_CLI_CONFIG_FILE"] = str(settings)

    def run(self, directory: Path, *arguments: str) -> None:
        """One command; what it says is the failure's text."""
        done = subprocess.run(
            ["terraform", *arguments],
            cwd=directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"terraform {' '.join(arguments)} in {directory}:\n{done.stdout}{done.stderr}"

    def require(self, root: str) -> Path:
        """The copy of a root, initialised; skips by name what no mirror has."""
        needed = providers_of(root)
        missing = [
            name
            for name in sorted(needed)
            if not any((at / "registry.terraform.io/hashicorp" / name).is_dir() for at in mirrors())
        ]
        if missing and not self.downloads:
            named = " and ".join(f"hashicorp/{name}" for name in missing)
            pytest.skip(
                f"{root} was not validated: the provider {named} is in no local mirror (MOERAY_TERRAFORM_MIRROR)"
            )
        directory = self.tree / root
        if root in EXAMPLES:
            self.run(directory, "init", "-backend=false", "-input=false", "-no-color")
            return directory
        # Modules of one provider share one initialisation: hashing a provider takes longer than most of their tests.
        first = self._initialised.get(frozenset(needed))
        if first is None:
            self.run(directory, "init", "-backend=false", "-input=false", "-no-color")
            self._initialised[frozenset(needed)] = directory
        else:
            shutil.copy(first / ".terraform.lock.hcl", directory)
            shutil.copytree(first / ".terraform", directory / ".terraform", symlinks=True, dirs_exist_ok=True)
        return directory


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("terraform"))


# --- what needs neither Terraform nor a provider --------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS)
def test_nothing_is_referred_to_that_nothing_declares(root: str) -> None:
    assert undeclared_references(root) == set()


@pytest.mark.parametrize("root", ROOTS)
def test_every_variable_is_used(root: str) -> None:
    source = source_of(root)
    unused = {
        name
        for name in bodies(source, "variable")
        if len(re.findall(rf"(?<![\w.])var\.{name}\b", source)) <= mentions_of_itself(source, name)
    }
    assert unused == set()


def mentions_of_itself(source: str, name: str) -> int:
    """How often a variable's own block (its validations) names it."""
    return len(re.findall(rf"(?<![\w.])var\.{name}\b", bodies(source, "variable")[name]))


@pytest.mark.parametrize("root", EXAMPLES)
def test_module_calls_give_what_the_module_requires_and_nothing_it_does_not_know(root: str) -> None:
    for call, body in bodies(source_of(root), "module").items():
        known = bodies(source_of(module_path(body)), "variable")
        given = set(re.findall(r"^  (\w+) += ", body, re.MULTILINE)) - {"source", "for_each"}
        required = {name for name, text in known.items() if not re.search(r"^  default += ", text, re.MULTILINE)}
        assert given <= set(known), f"{root}: module.{call} does not know {given - set(known)}"
        assert required <= given, f"{root}: module.{call} lacks {required - given}"


@pytest.mark.parametrize("cloud", ["eks", "gke"])
def test_the_clusters_root_hands_on_the_variables_of_the_second_root(cloud: str) -> None:
    install = bodies(source_of(f"examples/{cloud}/cluster"), "output")["install"]
    handed_on = set(re.findall(r"^    (\w+) += ", install, re.MULTILINE))
    variables = bodies(source_of(f"examples/{cloud}/moeray"), "variable")
    required = {name for name, body in variables.items() if "default" not in body}
    assert handed_on <= set(variables)
    assert required - handed_on == {"model"}, "example.tfvars gives the rest"


@pytest.mark.parametrize("module", MODULES)
def test_every_variable_of_a_module_is_described_and_checked_and_every_output_described(module: str) -> None:
    source = source_of(f"modules/{module}")
    for name, body in bodies(source, "variable").items():
        assert "description = " in body, name
        # A bool has no wrong value.
        assert "validation {" in body or re.search(r"type += bool", body), name
        for message in re.findall(r'error_message = "(.+)"', body):
            assert name in message and message.endswith((".", ").")), (
                f"{name}: the message must name the variable: {message}"
            )
    for name, body in bodies(source, "output").items():
        assert "description = " in body, name


@pytest.mark.parametrize("module", MODULES)
def test_every_check_of_a_variable_is_tried_with_a_bad_value(module: str) -> None:
    checked = {
        name for name, body in bodies(source_of(f"modules/{module}"), "variable").items() if "validation {" in body
    }
    tests = "\n".join(path.read_text() for path in (TERRAFORM / "modules" / module / "tests").glob("*.tftest.hcl"))
    refused = {
        name
        for listed in re.findall(r"expect_failures = \[(.*?)\]", tests, re.DOTALL)
        for name in re.findall(r"var\.(\w+)", listed)
    }
    assert checked - refused == set()


@pytest.mark.parametrize(
    ("module", "resource", "line"),
    [
        ("cluster-gke", "google_container_cluster.this", "enable_private_nodes = true"),
        ("cluster-gke", "google_container_cluster.this", "enable_private_endpoint = true"),
        ("cluster-gke", "google_container_cluster.this", "gcp_public_cidrs_access_enabled = false"),
        ("cluster-gke", "google_container_cluster.this", "key_name = var.kms_key_id"),
        ("cluster-gke", "google_container_cluster.this", 'datapath_provider = "ADVANCED_DATAPATH"'),
        ("cluster-gke", "google_container_node_pool.system", 'mode = "GKE_METADATA"'),
        ("gpu-nodepool-gke", "google_container_node_pool.this", "enable_private_nodes = true"),
        ("gpu-nodepool-gke", "google_container_node_pool.this", "boot_disk_kms_key = var.kms_key_id"),
        ("gpu-nodepool-gke", "google_container_node_pool.this", "labels = local.labels"),
        ("gpu-nodepool-gke", "google_container_node_pool.this", "key = local.gpu_taint"),
        ("gpu-nodepool-gke", "google_container_node_pool.this", 'mode = "GKE_METADATA"'),
        ("storage-gcp", "google_storage_bucket.checkpoints", 'public_access_prevention = "enforced"'),
        ("storage-gcp", "google_storage_bucket.checkpoints", "default_kms_key_name = var.kms_key_id"),
        ("storage-gcp", "google_storage_bucket_iam_member.reader", 'role = "roles/storage.objectViewer"'),
        ("redis-gcp", "google_redis_instance.this", "auth_enabled = true"),
        ("redis-gcp", "google_redis_instance.this", 'transit_encryption_mode = "SERVER_AUTHENTICATION"'),
        ("redis-gcp", "google_redis_instance.this", "customer_managed_key = var.kms_key_id"),
        ("moeray", "helm_release.moeray", "values = local.values"),
    ],
)
def test_what_no_plan_can_show_here_is_at_least_written(module: str, resource: str, line: str) -> None:
    """Private, encrypted, selectable: for modules whose provider may be missing."""
    body = re.sub(r" +", " ", bodies(source_of(f"modules/{module}"), "resource")[resource])
    assert re.search(rf"^ {re.escape(line)}$", body, re.MULTILINE), f"{module}: {resource} must say {line}"


def test_no_security_group_rule_names_the_internet() -> None:
    for root in ROOTS:
        for name, body in bodies(source_of(root), "resource").items():
            if "security_group" in name or "firewall" in name:
                assert "0.0.0.0/0" not in body and "::/0" not in body, f"{root}: {name}"


def test_no_account_is_named() -> None:
    for path in TERRAFORM.rglob("*.*"):
        if path.suffix in {".tf", ".hcl", ".tfvars", ".md"}:
            assert set(re.findall(r"(?<![\w-])\d{12}(?![\w-])", path.read_text())) <= {"000000000000"}, path


def test_readmes_say_what_the_modules_say() -> None:
    done = subprocess.run(
        [sys.executable, TERRAFORM / "document.py", "--check"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


# --- what Terraform itself says -------------------------------------------------------------------------------------


@needs_terraform
def test_files_parse_and_are_formatted(workspace: Workspace) -> None:
    workspace.run(workspace.tree, "fmt", "-check", "-diff", "-recursive")


@needs_terraform
@pytest.mark.parametrize("module", [name for name in MODULES if (TERRAFORM / "modules" / name / "locals.tf").exists()])
def test_values_are_checked_without_the_provider(module: str, workspace: Workspace, tmp_path: Path) -> None:
    """Variables and locals alone, with the module's own tests: they say nothing of its resources."""
    source = TERRAFORM / "modules" / module
    for name in ("variables.tf", "locals.tf"):
        shutil.copy(source / name, tmp_path)
    tests = (source / "tests/values.tftest.hcl").read_text()
    (tmp_path / "values.tftest.hcl").write_text(re.sub(r"^mock_provider .*$", "", tests, flags=re.MULTILINE))
    workspace.run(tmp_path, "test", "-no-color")


@needs_terraform
@pytest.mark.parametrize("root", ROOTS)
def test_root_is_valid_and_passes_its_tests(root: str, workspace: Workspace) -> None:
    directory = workspace.require(root)
    if not (directory / "tests").is_dir():
        workspace.run(directory, "validate", "-no-color")
        return
    # `terraform test` validates before it runs.
    values = ["-var-file=example.tfvars"] if root in EXAMPLES else []
    workspace.run(directory, "test", "-no-color", *values)


@pytest.mark.skipif(
    importlib.util.find_spec("checkov") is None,
    reason="the package `checkov` is not installed: its policies were not checked",
)
def test_checkov_finds_nothing_that_is_not_argued_inline() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "checkov.main",
            "--directory",
            TERRAFORM,
            "--framework",
            "terraform",
            "--compact",
            "--quiet",
            "--skip-download",
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
