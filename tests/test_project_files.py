"""Files for hosts of repositories agree with the code: versions, limits, links and the citation."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import yaml

from reap_kernels import device
from tests import test_layering

ROOT = Path(__file__).parent.parent


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


def test_floors_have_reasons() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start, end = lines.index("dependencies = ["), lines.index("[project.optional-dependencies]")
    for before, line in zip(lines[start:], lines[start + 1 : end], strict=False):
        if line.strip().startswith('"'):
            assert before.strip().startswith("#"), f"{line.strip()} has no reason above it"
            assert ">=" in line, f"{line.strip()} has no floor"


def test_the_oldest_triton_is_the_floor() -> None:
    """The backend refuses what the extra would not install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = project["optional-dependencies"]["triton"]
    assert floors == [f"triton>={'.'.join(map(str, device.OLDEST_TRITON))}"]
