"""setup.py builds two distributions from one tree, whole, without overlap, with CUDA or without,
and says what is missing where it cannot.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("reap_kernels", "csrc", "CMakeLists.txt", "setup.py", "LICENSE")  # of core/
DRIVER, KERNELS = "reap-kernels", "reap-kernels-core"
# What a checkout holds beside the sources.
OTHER = (".git", ".venv", ".*_cache", ".benchmarks", "build", "dist", "out", "*.egg-info")
OTHER = (*OTHER, "__pycache__", "*.so")
# For one architecture, and not optimized: half of the time, and what is in the wheel is the same.
QUICK = (
    "-DREAP_ARCHS=90a-real",
    "-DCMAKE_INTERPROCEDURAL_OPTIMIZATION=OFF",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
    "-DCMAKE_CUDA_FLAGS_RELEASE=-O0 -Xcicc -O0 -Xptxas -O0",
)
# No nvcc by any of the three ways to find one.
NO_NVCC = {"PATH": "/nowhere", "CUDACXX": "", "CUDA_HOME": ""}


def build(kind: str, source: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m build`, with the build requirements of this environment."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)]
    return subprocess.run(
        [*command, str(source)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def wheel_of(done: subprocess.CompletedProcess[str], out: Path) -> Path:
    """The one wheel a build has left."""
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


class Wheel(NamedTuple):
    """A wheel's packages, facts, and entry points by group."""

    name: str
    files: set[str]
    metadata: Message
    entry_points: dict[str, dict[str, str]]

    @classmethod
    def of(cls, path: Path) -> "Wheel":
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (text,) = (archive.read(n).decode() for n in names if n.endswith("/METADATA"))
            points = ConfigParser()
            points.read_string(
                "".join(archive.read(n).decode() for n in names if n.endswith("/entry_points.txt"))
            )
        files = {name for name in names if ".dist-info/" not in name}
        groups = {group: dict(points[group]) for group in points.sections()}
        return cls(path.name, files, message_from_string(text), groups)

    @property
    def packages(self) -> set[str]:
        return {name.partition("/")[0] for name in self.files}

    @property
    def requirements(self) -> set[str]:
        """What it needs without any extra."""
        return {r for r in self.metadata.get_all("Requires-Dist") or () if "extra ==" not in r}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The sources as a clone has them."""
    if not (ROOT / "core" / "setup.py").exists():
        pytest.skip("a source distribution has no links, from which core/ is built")
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    ignored = shutil.ignore_patterns(*OTHER)
    return Path(shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True))


@pytest.fixture(scope="module")
def sources(checkout, tmp_path_factory) -> dict[str, Path]:
    """Both source distributions, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    found = {}
    for name, place in ((DRIVER, checkout), (KERNELS, checkout / "core")):
        done = build("sdist", place, folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (archive,) = folder.glob(f"{name.replace('-', '_')}-[0-9]*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        found[name] = archive.with_name(archive.name.removesuffix(".tar.gz"))
    return found


@pytest.fixture
def fresh(sources, tmp_path: Path) -> Path:
    """A copy of the kernel library's sources to build in, which no other build has touched."""
    return Path(shutil.copytree(sources[KERNELS], tmp_path / "source"))


@pytest.fixture(scope="module")
def wheels(checkout, sources, tmp_path_factory) -> dict[str, Wheel]:
    """The wheel of each source distribution, and of a clone."""
    found = {}
    for name, source in {**sources, "clone": checkout}.items():
        out = tmp_path_factory.mktemp("wheel")
        copy = shutil.copytree(source, out / "source", symlinks=True)
        done = build("wheel", copy, out, REAP_BUILD_CUDA="0")
        assert "would be ignored" not in done.stdout + done.stderr
        found[name] = Wheel.of(wheel_of(done, out))
    return found


def files_in(folder: Path) -> set[str]:
    """Names of all files in a folder, but for what builds leave there; links are files."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    names = {path.relative_to(folder).as_posix() for path in paths}
    return {name for name in names if ".egg-info/" not in name}


def test_a_source_distribution_has_everything(checkout, sources) -> None:
    """Tests, benchmarks, documentation and all; and the kernels' what compiles them."""
    links = {f"core/{name}" for name in LINKS}
    assert links < files_in(checkout)
    there = files_in(sources[DRIVER])
    assert files_in(checkout) - there == links
    assert there - files_in(checkout) == {"PKG-INFO", "setup.cfg"}

    kernels = {name for name in files_in(checkout) if name.startswith(("csrc/", "reap_kernels/"))}
    needed = {*kernels, "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert needed - files_in(sources[KERNELS]) == set()


def test_the_tests_of_a_source_distribution_can_be_collected(sources) -> None:
    some = ("tests/driver/writer", "tests/ops/test_cuda.py", "tests/test_project_files.py")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *some]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=sources[DRIVER], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "tests/driver/writer/test_locks.py::" in done.stdout


def test_the_two_wheels_have_every_file_and_none_in_common(checkout, wheels) -> None:
    assert wheels[DRIVER].packages == {"reap_driver"}
    assert wheels[KERNELS].packages == {"reap_kernels"}
    both = wheels[DRIVER].files | wheels[KERNELS].files
    assert both == wheels["clone"].files  # a clone has no other place to take the kernels from
    places = {"reap_kernels": checkout, "reap_driver": checkout / "python"}
    assert both == {
        f"{name}/{file}" for name, place in places.items() for file in files_in(place / name)
    }  # templates, tables and the bundled model too; its training and csrc/ are elsewhere
    assert {"reap_kernels/configs/sm90.json", "reap_driver/demo/model/model.safetensors"} < both


def test_the_wheels_need_one_another_in_one_version(wheels) -> None:
    version = wheels[KERNELS].metadata["Version"]
    assert {wheel.metadata["Version"] for wheel in wheels.values()} == {version}
    names = {key: wheel.metadata["Name"] for key, wheel in wheels.items()}
    assert names == {DRIVER: DRIVER, KERNELS: KERNELS, "clone": DRIVER}
    kernels, driver = wheels[KERNELS].requirements, wheels[DRIVER].requirements
    assert {name.partition(">")[0] for name in kernels} == {"torch", "safetensors", "numpy"}
    assert driver - wheels["clone"].requirements == {f"{KERNELS}=={version}"}
    assert wheels["clone"].requirements - driver == kernels


@pytest.mark.parametrize("name", [DRIVER, KERNELS])
def test_a_wheel_says_what_it_is(wheels, name: str) -> None:
    facts = wheels[name].metadata
    assert facts["Author"] == "The reap-kernels authors"
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["License-File"] == "LICENSE"
    assert "Typing :: Typed" in facts.get_all("Classifier")
    assert facts.get_payload().startswith(f"# {name}\n")  # its own README


def test_the_driver_has_the_command_and_the_plugins_of_vllm(wheels) -> None:
    """vLLM finds them by the wheel's entry points alone; each names a module in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected = {"console_scripts": project["scripts"], **project["entry-points"]}
    assert set(expected) > {"vllm.general_plugins", "vllm.endpoint_plugins"}
    assert wheels[DRIVER].entry_points == wheels["clone"].entry_points == expected
    assert wheels[KERNELS].entry_points == {}
    for points in expected.values():
        for target in points.values():
            assert f"{target.partition(':')[0].replace('.', '/')}.py" in wheels[DRIVER].files


def test_an_older_python_is_told_the_remedy(monkeypatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer, this is .*; install"):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("variables", [{"REAP_BUILD_CUDA": "0"}, NO_NVCC], ids=["off", "no nvcc"])
def test_without_cuda_the_wheel_is_pure(fresh, tmp_path, variables) -> None:
    done = build("wheel", fresh, tmp_path, **variables)
    wheel = wheel_of(done, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    said = [line for line in done.stdout.splitlines() if "reap_kernels._C" in line]
    assert len(said) == ("REAP_BUILD_CUDA" not in variables), said


def test_insisting_without_nvcc_fails_with_the_remedy(fresh, tmp_path) -> None:
    done = build("wheel", fresh, tmp_path, REAP_BUILD_CUDA="1", **NO_NVCC)
    assert done.returncode
    assert "no nvcc by CUDACXX, CUDA_HOME or PATH" in done.stderr
    assert "CUDA_HOME to it, or set REAP_BUILD_CUDA=0" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_value_nobody_knows_is_refused(fresh, tmp_path) -> None:
    done = build("wheel", fresh, tmp_path, REAP_BUILD_CUDA="yes")
    assert done.returncode
    assert "REAP_BUILD_CUDA='yes' is not known; set it to auto, 1 or 0" in done.stderr


def test_a_build_that_fails_is_no_wheel_without_cuda(fresh, tmp_path) -> None:
    """nvcc is there, so a pure wheel would hide that its kernels do not compile."""
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    done = build("wheel", fresh, tmp_path, CUDACXX=str(broken))
    assert done.returncode
    assert f"could not be built with {broken}" in done.stderr
    assert "set REAP_BUILD_CUDA=0" in done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")
def test_with_nvcc_the_wheel_has_the_module(fresh, tmp_path) -> None:
    """And a clean environment imports it, where neither torch nor a GPU is."""
    variables = {"CMAKE_ARGS": shlex.join(QUICK), "CUDACXX": "", "CUDA_HOME": ""}
    wheel = wheel_of(build("wheel", fresh, tmp_path, REAP_BUILD_CUDA="1", **variables), tmp_path)
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    (module,) = (name for name in names if name.endswith(".so"))
    assert module.startswith("reap_kernels/_C.")
    assert not [name for name in names if "csrc" in name or "CMake" in name]

    clean = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True)
    (packages,) = clean.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile", "--quiet"]
    subprocess.run([*install, "--target", str(packages), str(wheel)], check=True)
    script = (
        "import importlib.util as u; "
        f"s = u.spec_from_file_location('_C', {str(packages / module)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.CUDA_VERSION, m.error(1))"
    )
    command = [str(clean / "bin/python"), "-I", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "cudaErrorInvalidValue" in done.stdout, done.stderr
