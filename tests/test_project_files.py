"""Files for hosts of repositories agree with the code: versions, limits, links and the citation."""

import re
import sys
import tomllib
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from reap_kernels import device
from tests import test_layering

ROOT = Path(__file__).parent.parent
NAME = "reap-kernels"


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_pre_commit_uses_the_versions_of_ci() -> None:
    content = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    tools = {
        "ruff-pre-commit": "ruff",
        "codespell": "codespell",
        "mirrors-clang-format": "clang-format",
        "mirrors-mypy": "mypy",
    }
    found = {Path(repo["repo"]).name: repo["rev"].removeprefix("v") for repo in content["repos"]}
    for repository, package in tools.items():
        assert found[repository] == pinned()[package], repository


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    [job] = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert (ROOT / ".ci/run").stat().st_mode & 0o100


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == import_module("reap_kernels").__version__
    assert "2510.13999" in str(citation["references"])
    assert f"## {citation['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_contributing_states_the_limits_that_tests_hold() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    held = test_layering
    limits = (held.FILE_LINES, held.FUNCTION_LINES, held.KERNEL_LINES)
    stated = re.search(r"under (\d+) lines; functions .{,40}under (\d+), kernels under (\d+)", text)
    assert stated is not None, "CONTRIBUTING.md states no limits"
    assert tuple(map(int, stated.groups())) == limits


def project(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / name).read_text())


def test_floors_have_reasons() -> None:
    seen = 0
    for name in ("pyproject.toml", "core/pyproject.toml"):
        lines = (ROOT / name).read_text().splitlines()
        start = lines.index("dependencies = [")
        end = lines.index("]", start)
        for before, line in pairwise(lines[start:end]):
            if line.strip().startswith('"'):
                assert before.strip().startswith("#"), f"{line.strip()} has no reason above it"
                assert ">=" in line, f"{line.strip()} has no floor"
                seen += 1
    kernels = project("core/pyproject.toml")["project"]["dependencies"]
    assert seen == len(kernels) + len(project("pyproject.toml")["tool"][NAME]["dependencies"])


# Where a package is imported by another name than it is installed by.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "compressed_tensors": "compressed-tensors",
}


@pytest.mark.parametrize("package", [test_layering.KERNELS, test_layering.DRIVER])
def test_what_a_package_imports_is_declared(package: Path) -> None:
    """As a dependency of its distribution (or of the one it is built on), or as an extra."""
    core, whole = project("core/pyproject.toml"), project("pyproject.toml")
    declared = [*core["project"]["dependencies"]]
    extras = core["project"]["optional-dependencies"]
    if package == test_layering.DRIVER:
        declared += whole["tool"][NAME]["dependencies"]
        extras = whole["project"]["optional-dependencies"]
    known = ("triton", "data", "eval", "llmcompressor", "merging", "vllm")
    declared += [r for name in known for r in extras.get(name, ())]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in declared}
    imported = {
        name.partition(".")[0]
        for path in test_layering.sources(package)
        for name in test_layering.imported(path)
    }
    foreign = imported - sys.stdlib_module_names - {"reap_kernels", "reap_driver"}
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} - names == set()
    assert "torch" in foreign


def test_both_distributions_are_built_and_described_alike() -> None:
    core, whole = project("core/pyproject.toml"), project("pyproject.toml")
    assert core["build-system"] == whole["build-system"]
    for field in ("requires-python", "license", "authors"):
        assert core["project"][field] == whole["project"][field]


def test_the_oldest_triton_is_the_floor() -> None:
    """The backend refuses what the extra would not install."""
    for name in ("pyproject.toml", "core/pyproject.toml"):
        floors = project(name)["project"]["optional-dependencies"]["triton"]
        assert floors == [f"triton>={'.'.join(map(str, device.OLDEST_TRITON))}"]
