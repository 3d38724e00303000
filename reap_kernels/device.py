"""What GPU backends must know of a machine: is Triton there, which architecture, which device.

Imports no Triton, so that asking costs nothing where it is absent.
"""

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata

import torch

OLDEST_TRITON = (3, 6)  # the floor of pyproject.toml
# Below sm_80 there is no bf16 and no cp.async, which every kernel here is written for.
OLDEST_NVIDIA = (8, 0)
# Compiler options of every launch. Fusion is stated because its default changes between Triton
# versions, and with it bits.
OPTIONS = {"enable_fp_fusion": True}


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, or None; ROCm and XPU builds carry other names."""
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def _unusable(version: str | None) -> str | None:
    """Why this version of Triton will not do, or None."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if version is None:
        return f"Triton is not installed (pip install 'triton>={oldest}')"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {oldest}; upgrade it"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> str:
    """`sm90` on NVIDIA, `gfx942` on AMD, `interpreter` on the CPU: a key of launch tables."""
    if device.type == "cpu":
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm{properties.major}{properties.minor}"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may use on `device`."""
    if device.type == "cpu":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    # ROCm builds of torch do not state it; 64 KiB is what every CDNA and RDNA part has.
    return int(getattr(properties, "shared_memory_per_block_optin", 1 << 16))


def tma(device: torch.device) -> bool:
    """Whether `device` copies boxes of tensors by itself, as GPUs do from sm_90 on."""
    arch = architecture(device)
    return arch == "interpreter" or (arch.startswith("sm") and int(arch[2:]) >= 90)


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once on `device`, one on each."""
    if device.type == "cpu":
        return 3  # an interpreter runs one after the other, each with several tiles
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def too_old(device: torch.device) -> str | None:
    """Why no GPU kernel of ours runs on a CUDA or ROCm device, or None; asks its driver once."""
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return _too_old(index)


@functools.cache
def _too_old(index: int) -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no such device"
    if torch.version.hip is None:
        found = torch.cuda.get_device_capability(index)
        if found < OLDEST_NVIDIA:
            return f"compute capability {found[0]}.{found[1]} is below 8.0"
    return None


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`, or None."""
    reason = _unusable(triton_version())
    if reason is not None:
        return reason
    if device.type == "cpu":
        if interpreted():
            return None
        return "inputs are on the CPU, where Triton runs only interpreted (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"inputs are on {device}; Triton serves CUDA and ROCm devices"
    if interpreted():
        return "TRITON_INTERPRET=1 is set, which is for the CPU; unset it"
    return too_old(device)


def written_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels write results of `dtype` in: the same, but for bf16 under the interpreter,
    which truncates to bf16 instead of rounding; there torch rounds, after the kernel.
    """
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` run in TF32, as the user may ask torch for."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def on(device: torch.device) -> AbstractContextManager[None]:
    """Makes `device` current, for free where it is: kernels launch on the current device's current
    stream.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which what is summed in float64 or float32 stays so under the host's autocast.

    Args:
        device: of the tensors. Where autocast is off there, nothing is entered: that takes as long
            as a small kernel.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
