"""Packages reap_kernels (top level) and reap_driver (under python/) as one distribution.

Everything declarative stands in pyproject.toml; this file holds what it cannot: two package roots,
the version read from the source without importing torch, and the build of reap_kernels._C, which
CMakeLists.txt describes.

REAP_BUILD_CUDA says whether to build it: auto (default) where nvcc is found, 1 insists, 0 leaves it
out. nvcc is the one CUDACXX names, else CUDA_HOME's, else PATH's. CMAKE_ARGS adds arguments of
CMake, such as -DREAP_ARCHS=90a-real for one architecture only.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

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
    if wanted == "0" or nvcc():
        return wanted != "0"
    missing = "no nvcc by CUDACXX, CUDA_HOME or PATH"
    if wanted == "1":
        sys.exit(
            f"REAP_BUILD_CUDA=1, but there is {missing}; install the CUDA toolkit (12.8 or newer) "
            "and set CUDA_HOME to it, or set REAP_BUILD_CUDA=0 to leave reap_kernels._C out"
        )
    print(f"reap_kernels._C is left out: {missing} (REAP_BUILD_CUDA=1 would insist)", flush=True)
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


setup(
    version=VERSION[1],
    packages=[
        *find_packages(".", include=["reap_kernels", "reap_kernels.*"]),
        *find_packages("python", include=["reap_driver", "reap_driver.*"]),
    ],
    package_dir={"reap_kernels": "reap_kernels", "reap_driver": "python/reap_driver"},
    package_data={
        "reap_kernels": ["py.typed", "configs/*.json"],
        "reap_driver": ["py.typed", "demo/model/*", "data/recipes/*.yaml", "*/templates/*"],
    },
    # None at all makes the wheel a pure one.
    ext_modules=(
        [Extension("reap_kernels._C", sources=[])]
        if BUILDS & set(sys.argv) and builds_cuda()
        else []
    ),
    cmdclass={"build_ext": CMakeBuild},
)
