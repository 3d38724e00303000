"""Two distributions from one tree: reap-kernels-core (package reap_kernels) and reap-kernels
(package reap_driver), which requires it in the same version.

`core/`, whose sources are links, builds the first. This folder builds the second where it is a
source distribution (it has PKG-INFO) or becomes one. A clone, which has no other place to take
reap_kernels from, installs both packages as one, so that `pip install -e .` is all it takes.

Everything declarative stands in the two pyproject.toml; this file holds what they cannot: which
packages there are, the version read from the source without importing torch, and the build of
reap_kernels._C, which CMakeLists.txt describes.

REAP_BUILD_CUDA says whether to build it: auto (default) on Linux where nvcc is found, 1 insists, 0
leaves it out. nvcc is the one CUDACXX names, else CUDA_HOME's, else PATH's. CMAKE_ARGS adds
arguments of CMake, such as -DREAP_ARCHS=90a-real for one architecture only.
"""

from __future__ import annotations  # so that an older Python comes to the message below

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 11):  # noqa: UP036  pip may run this before it compares versions
    sys.exit(
        f"reap-kernels needs Python 3.11 or newer, this is {sys.version.split()[0]}; install a "
        "newer one and run its pip, such as `python3.12 -m pip install ...`"
    )
import tomllib

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (ROOT / "reap_kernels/__init__.py").read_text(), re.MULTILINE
)
assert VERSION, "reap_kernels/__init__.py states no __version__"
# Commands that build; others (sdist, egg_info) need no decision.
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def nvcc() -> str | None:
    """The CUDA compiler to use, or None."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc")
    return shutil.which(named)


def builds_cuda() -> bool:
    """Whether to build reap_kernels._C, by REAP_BUILD_CUDA and what this machine has."""
    wanted = os.environ.get("REAP_BUILD_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        sys.exit(f"REAP_BUILD_CUDA={wanted!r} is not known; set it to auto, 1 or 0, or unset it")
    if wanted == "0":
        return False
    if nvcc() and (wanted == "1" or sys.platform == "linux"):
        return True
    why = "there is no nvcc by CUDACXX, CUDA_HOME or PATH"
    if nvcc():
        why = f"nobody has built it on {sys.platform}"
    if wanted == "1":
        sys.exit(
            f"REAP_BUILD_CUDA=1, but {why}; install the CUDA toolkit (12.8 or newer) and set "
            "CUDA_HOME to it, or set REAP_BUILD_CUDA=0 to leave reap_kernels._C out"
        )
    print(f"reap_kernels._C is left out: {why} (REAP_BUILD_CUDA=1 would insist)", flush=True)
    return False


class CMakeBuild(build_ext):
    """Builds an extension by CMake and Ninja, and installs it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        # A new configuration every time: pip's build environments, which CMake's cache names, go.
        configure = ["--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", self.build_temp]
        configure += [f"-DPython_EXECUTABLE={sys.executable}"]
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        steps = (
            [*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))],
            ["--build", self.build_temp],
            ["--install", self.build_temp, "--prefix", str(target)],
        )
        # Ninja may lie beside a Python whose environment nobody activated.
        path = os.pathsep.join((os.environ["PATH"], sysconfig.get_path("scripts")))
        variables = {**os.environ, "PATH": path, "CUDACXX": str(nvcc())}
        for step in steps:
            command = [sys.executable, "-m", "cmake", *step]
            done = subprocess.run(command, env=variables, check=False)
            if done.returncode:
                sys.exit(
                    f"reap_kernels._C could not be built with {nvcc()}: `{shlex.join(command)}` "
                    f"failed with status {done.returncode}, its output is above (pip shows it with "
                    "-v); set REAP_BUILD_CUDA=0 to leave reap_kernels._C out"
                )


def extensions() -> list[Extension]:
    """reap_kernels._C; none at all makes the wheel a pure one."""
    builds = BUILDS & set(sys.argv) and builds_cuda()
    return [Extension("reap_kernels._C", sources=[])] if builds else []


def packages(folder: str, name: str) -> list[str]:
    """A package and those in it, folders of data included: setuptools warns of others."""
    found: list[str] = find_namespace_packages(
        folder, include=[name, f"{name}.*"], exclude=["*.__pycache__"]
    )
    return found


def dependencies(*place: str) -> Any:
    """A list of pyproject.toml, by its place in there."""
    found: Any = tomllib.loads((ROOT / place[0]).read_text(encoding="utf-8"))
    for key in place[1:]:
        found = found[key]
    return found


def distribution() -> dict[str, Any]:
    """What this folder builds: see the first lines of this file."""
    kernels = packages(".", "reap_kernels")
    if not (ROOT / "python").is_dir():  # core/
        return {"packages": kernels, "ext_modules": extensions()}
    driver = packages("python", "reap_driver")
    own = dependencies("pyproject.toml", "tool", "reap-kernels", "dependencies")
    if (ROOT / "PKG-INFO").exists() or "sdist" in sys.argv:
        kernels_of_it = f"reap-kernels-core=={VERSION[1]}"
        return {"packages": driver, "install_requires": [kernels_of_it, *own]}
    core = dependencies("core/pyproject.toml", "project", "dependencies")
    return {
        "packages": [*kernels, *driver],
        "install_requires": [*core, *own],
        "ext_modules": extensions(),
    }


setup(
    version=VERSION[1],
    package_dir={"reap_driver": "python/reap_driver"},
    package_data={
        "reap_kernels": ["py.typed", "configs/*.json"],
        "reap_driver": ["py.typed", "demo/model/*", "data/recipes/*.yaml", "*/templates/*"],
    },
    cmdclass={"build_ext": CMakeBuild},
    **distribution(),
)
