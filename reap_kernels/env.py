"""Every environment variable reap-kernels reads, in one place.

`REAP_BACKEND`: backend of every op (`reference`, `cpu`, ...). An explicit request: where it cannot
serve, the call fails with the reason. Default: automatic choice.

`REAP_CPU_DTYPE`: arithmetic of the CPU backend on bf16 and fp16 input: `native` (the input's
dtype), `float32`, or `auto` (native where the CPU has instructions for it). Default: `auto`.
"""

import os

from reap_kernels.errors import BackendUnavailable

CPU_DTYPES = ("auto", "native", "float32")


def backend() -> str | None:
    """The backend `REAP_BACKEND` asks for, or None for automatic choice."""
    return os.environ.get("REAP_BACKEND") or None


def cpu_dtype() -> str:
    """The value of `REAP_CPU_DTYPE`, checked.

    Raises:
        BackendUnavailable: the value is not one of `CPU_DTYPES`.
    """
    value = os.environ.get("REAP_CPU_DTYPE") or "auto"
    if value not in CPU_DTYPES:
        raise BackendUnavailable(
            f"REAP_CPU_DTYPE={value!r} is not known; set it to one of {', '.join(CPU_DTYPES)}"
        )
    return value
