"""setup.py builds wheels with and without CUDA, and says what is missing where it cannot."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What a checkout holds beside the sources.
OTHER = (".*", "build", "dist", "out", "*.egg-info", "__pycache__", "*.so")
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


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The sources as a source distribution has them."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*OTHER))
    done = build("sdist", folder / "checkout", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


@pytest.fixture
def fresh(source: Path, tmp_path: Path) -> Path:
    """A copy to build in, which no other build has touched."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def test_a_source_distribution_has_the_kernels(source: Path) -> None:
    here = {path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    there = {path.relative_to(source) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert there == here
    assert (source / "CMakeLists.txt").exists()


@pytest.mark.parametrize("variables", [{"REAP_BUILD_CUDA": "0"}, NO_NVCC], ids=["off", "no nvcc"])
def test_without_cuda_the_wheel_is_pure(fresh, tmp_path, variables) -> None:
    done = build("wheel", fresh, tmp_path, **variables)
    wheel = wheel_of(done, tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "reap_kernels/configs/sm90.json" in names
    assert "reap_driver/demo/model/model.safetensors" in names
    assert "reap_driver/writer/templates/card.md.jinja" in names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "reap_driver",
        "reap_kernels",
    }  # the training of the bundled model stays in bench/
    assert not [name for name in names if name.endswith(".so") or "csrc" in name]
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
