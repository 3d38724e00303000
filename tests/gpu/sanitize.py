"""`python -m tests.gpu.sanitize`: every CUDA kernel under NVIDIA's compute-sanitizer.

memcheck finds accesses out of bounds or misaligned, racecheck hazards in shared memory, synccheck
wrong uses of barriers and of lane masks, initcheck reads of global memory nobody wrote. Each tool
runs `tests.gpu.variants` and gets one line; all of them take minutes, `--small` is one small
variant of each kernel, about a minute a tool. Exit codes: 0; 1 where a tool found something, or
could not tell; 4 where a GPU, the kernels or compute-sanitizer are absent.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu import ROOT
from reap_kernels import cuda

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
RED, ABSENT = 1, 4
_PROGRAM = "compute-sanitizer"
# Each tool ends with one: `ERROR SUMMARY: 0 errors`, or racecheck's
# `RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)`.
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", re.MULTILINE)
_KEPT = 20  # lines of output shown where a tool found something


def no_kernels() -> str | None:
    """Why there are no CUDA kernels to run on a GPU, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; run this on a GPU"
    reason = cuda.refusal(torch.device("cuda"))
    return reason and f"there are no CUDA kernels to check: {reason}"


def absent() -> str | None:
    """What is missing and how to get it, or None."""
    reason = no_kernels()
    if reason is None and program() is None:
        return (
            f"{_PROGRAM} is neither on PATH nor in CUDA_HOME/bin; it is part of the CUDA toolkit, "
            "or `pip install nvidia-cuda-sanitizer-api` brings it"
        )
    return reason


def program() -> str | None:
    """Path of compute-sanitizer: on PATH, of CUDA_HOME, or as PyPI's package installs it."""
    folders = [Path(home, "bin") for home in (os.environ.get("CUDA_HOME"),) if home]
    for place in map(Path, sys.path):
        folders += sorted(place.glob("nvidia/*/bin"))
    return shutil.which(_PROGRAM) or shutil.which(_PROGRAM, path=os.pathsep.join(map(str, folders)))


def verdict(output: str, code: int) -> tuple[bool, str]:
    """Whether a tool's run was clean, and what to say of it."""
    found = _SUMMARY.findall(output)
    if not found:
        return False, f"ended with code {code} and no summary"
    number = sum(map(int, found))
    if number:
        return False, f"{number} found"
    if code:
        return False, f"nothing found, but the kernels' results are wrong or it failed: code {code}"
    return True, "nothing found"


def checked(tool: str, small: bool = False, seconds: float | None = None) -> tuple[bool, str, str]:
    """Runs one tool: whether it was clean, what to say, and what it printed.

    Args:
        tool: one of TOOLS.
        small: one small variant of each kernel instead of all.
        seconds: after which it and the program under it are killed; None for no limit.
    """
    # Importing torch under a tool may take longer than the tool waits for CUDA's first call.
    own = [str(program()), "--tool", tool, "--launch-timeout", "0"]
    # Our launches are checked by their status; torch asks the driver things that may fail.
    own += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [*own, sys.executable, "-m", "tests.gpu.variants", "cuda", *["small"] * small]
    # Without torch's cache every tensor is an allocation of its own, with bounds of its own.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            output = "".join(running.communicate(timeout=seconds))
        except BaseException as error:
            # The program under the tool would go on, on the device that others are timed on.
            os.killpg(running.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return False, f"did not end within {seconds:.0f} s", ""
            raise
    return *verdict(output, running.returncode), output


def check(tool: str, small: bool = False) -> bool:
    """Runs one tool and prints its line."""
    clean, text, output = checked(tool, small)
    print(f"{tool:10} {text}", flush=True)
    if not clean:
        print("\n".join(output.splitlines()[:_KEPT]), flush=True)
    return clean


def main(arguments: Sequence[str]) -> int:
    """Runs the tools asked for; 0, RED or ABSENT."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__)
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS, help="default: all")
    parser.add_argument("--small", action="store_true", help="one small variant of each kernel")
    options = parser.parse_args(arguments)
    reason = absent()
    if reason is not None:
        print(f"python -m tests.gpu.sanitize cannot run: {reason}", file=sys.stderr)
        return ABSENT
    clean = [check(tool, options.small) for tool in options.tools]
    return 0 if all(clean) else RED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
