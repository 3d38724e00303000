"""Programs of CUDA C++ for the CPU, which tests compile and run in several orders of threads."""

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
EMULATION = ("host/emulation.cpp", "host/hopper.cpp")
# One natural order, and two of each other kind; see `set_order` in csrc/host/emulation.h.
ORDERS = range(6)


def compile_cpp(built: Path, *arguments: Path | str) -> None:
    """Runs the C++ compiler of `make host` with `arguments`; the result is `built`."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler, "tests need a C++ compiler; install g++"
    command = [
        compiler,
        "-std=c++20",
        "-DREAP_HOST",
        "-w",
        "-Wno-psabi",
        f"-I{CSRC}",
        *arguments,
        "-o",
        built,
    ]
    subprocess.run(list(map(str, command)), check=True)


def compile_emulation(folder: Path) -> list[Path]:
    """The object files of the emulation, to be linked to a program."""
    objects = []
    for source in EMULATION:
        objects.append(folder / f"{Path(source).stem}.o")
        compile_cpp(objects[-1], "-O2", "-c", CSRC / source)
    return objects


def run(program: Path, case: str, order: int = 0) -> subprocess.CompletedProcess[str]:
    """One run of `case`; a program that aborts has a negative return code."""
    command = [str(program), case, str(order)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
