"""What this machine offers: versions, CPU features, GPUs, which backend serves and why, which
launch tables hold, and what the kernels' self-checks found.
"""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from reap_kernels import cuda, device, selfcheck, tuning
from reap_kernels.dispatch import explain
from reap_kernels.experts.cpu import compute_dtype

PACKAGES = ("torch", "triton", "transformers", "safetensors", "accelerate", "tokenizers")


def _versions() -> dict[str, str | None]:
    """Installed version of each package, None where it is absent."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # which names the build, as in 2.10.0+cu128
    return found


def _nvcc() -> str | None:
    """Release line of nvcc, or None where it is not on the PATH."""
    path = shutil.which("nvcc")
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "release" in line]
    return lines[0].strip() if lines else f"{path} did not state a release"


def _cuda_kernels() -> dict[str, str | None]:
    """The CUDA version `reap_kernels._C` was built with, or None and why it is absent."""
    found = cuda.module()
    if isinstance(found, str):
        return {"cuda": None, "reason": found}
    return {"cuda": str(found.CUDA_VERSION), "reason": None}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": (found := torch.cuda.get_device_properties(index)).name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
        }
        for index in range(torch.cuda.device_count())
    ]


def _launch_tables() -> dict[str, list[str]]:
    """Architecture of each GPU -> origin of each of its tables."""
    found = {
        device.architecture(torch.device("cuda", index))
        for index in range(torch.cuda.device_count())
    }
    return {arch: [table.origin for table in tuning.tables(arch)] for arch in sorted(found)}


def _launches_off() -> dict[str, dict[str, str]]:
    """Architecture of each GPU -> line of its tables that is off -> the reason."""
    return {
        arch: {str(entry): str(entry.off) for entry in tuning.off_entries(arch)}
        for arch in _launch_tables()
    }


def report() -> dict[str, Any]:
    """Everything a bug report needs, as a JSON-serializable dictionary.

    Returns:
        `python`, `platform`, `packages` (version or None), `nvcc`, `cuda_kernels` (the CUDA version
        they were built with, or None and the reason), `cpu` (capability, threads, the
        dtype half precision is computed in), `gpus`; `backends`: for each device kind, dtype, op
        and backend the reason it is not chosen (None: it is); `launch_tables`: for each GPU the
        origins of its tables, first choice first; `launches_off`: for each GPU the lines of its
        tables that are never chosen, and why; `selfcheck`: the file of verdicts and, by what
        was checked, the reason a kernel is refused (None: it passed).

    Raises:
        DataError: `REAP_TUNING` names a file that cannot be used.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    backends = [
        {
            "device": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "op": verdict.op,
            "backend": verdict.backend,
            "reason": verdict.reason,
        }
        for kind in devices
        for dtype in dtypes
        for verdict in explain(kind, dtype)
    ]
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": _versions(),
        "nvcc": _nvcc(),
        "cuda_kernels": _cuda_kernels(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "computes": {str(d).removeprefix("torch."): str(compute_dtype(d)) for d in dtypes},
        },
        "gpus": _gpus(),
        "backends": backends,
        "launch_tables": _launch_tables(),
        "launches_off": _launches_off(),
        # After `backends`: asking which backend serves runs the self-checks that are due.
        "selfcheck": {"file": str(selfcheck.path()), "verdicts": selfcheck.current()},
    }
