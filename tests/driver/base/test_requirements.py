"""What is missing or does not fit is named in one line, with what to install."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import reap_driver as rd
import reap_kernels
from reap_driver.base import requirements
from reap_driver.cli.main import main
from reap_kernels.requirements import OLDEST_TORCH

ROOT = Path(__file__).parents[3]


def alone(*command: str, packages: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python that has the sources, these packages, and no others."""
    path = [str(ROOT), str(ROOT / "python"), *([str(packages)] if packages else [])]
    return subprocess.run(
        [sys.executable, "-S", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_floors_are_those_of_pyproject() -> None:
    core, whole = (
        tomllib.loads((ROOT / name).read_text())
        for name in ("core/pyproject.toml", "pyproject.toml")
    )
    least, below = (".".join(map(str, version)) for version in requirements.TRANSFORMERS)
    wanted = f"transformers>={least},<{below}"
    assert wanted in whole["tool"]["reap-kernels"]["dependencies"]
    torch = f"torch>={'.'.join(map(str, OLDEST_TORCH))}"
    assert torch in core["project"]["dependencies"]
    assert reap_kernels.__version__ == requirements.VERSION


@pytest.mark.parametrize("words", [["--version"], ["doctor"], ["prune", "m", "--ratio", "0.5"]])
def test_without_torch_every_command_says_so_in_one_line(words: list[str]) -> None:
    done = alone("-m", "reap_driver", *words, *(["--data", "d.jsonl"] if "prune" in words else []))
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "reap_kernels needs torch 2.10 or newer, which is not installed; run `pip" in done.stderr
    assert "--index-url https://download.pytorch.org/whl/cpu" in done.stderr


def test_an_old_torch_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('__version__ = "2.9.1+cu128"\n')
    done = alone("-c", "import reap_kernels", packages=tmp_path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "ImportError: reap_kernels needs torch 2.10 or newer, this is 2.9.1+cu128" in last


@pytest.mark.parametrize("version", ["5.16.4", "6.0.0", "4.57.1"])
def test_transformers_out_of_range_is_named(version, monkeypatch, capsys) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    requirements.check.cache_clear()
    assert main(["--version"]) == 4
    said = capsys.readouterr().err
    assert f"needs transformers 5.17 or newer, below 6, this is {version}; run `pip" in said
    assert "'transformers>=5.17,<6'" in said


def test_no_transformers_is_named_from_python(monkeypatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    requirements.check.cache_clear()
    with pytest.raises(ImportError, match="below 6, which is not installed; run"):
        _ = rd.prune


def test_the_two_packages_must_have_one_version(monkeypatch, capsys) -> None:
    monkeypatch.setattr(reap_kernels, "__version__", "0.0.9")
    requirements.check.cache_clear()
    assert main(["doctor"]) == 4
    said = capsys.readouterr().err
    assert f"needs reap_kernels {requirements.VERSION}, this is 0.0.9 in {ROOT}" in said
    assert f"run `pip install reap-kernels-core=={requirements.VERSION}`" in said


def test_no_reap_kernels_is_named(monkeypatch) -> None:
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    requirements.check.cache_clear()
    with pytest.raises(requirements.Unmet, match="which is not installed; run `pip install reap-k"):
        requirements.check()


def test_a_package_that_two_distributions_own_is_a_problem(monkeypatch) -> None:
    """As after `pip install .` in a clone and then of another tool that needs the kernels."""
    both = ["reap-kernels", "reap-kernels-core"]
    owners = {"reap_kernels": both, "reap_driver": ["reap-kernels"]}
    monkeypatch.setattr(
        requirements, "metadata", SimpleNamespace(packages_distributions=lambda: owners)
    )
    found = requirements.installation()
    assert found["reap_driver"]["folder"] == str(ROOT / "python" / "reap_driver")
    [problem] = found["problems"]
    assert problem.startswith("reap_kernels is installed twice, by reap-kernels and reap-kernels-c")
    assert "`pip uninstall reap-kernels reap-kernels-core`" in problem
