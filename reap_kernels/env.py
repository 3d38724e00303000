"""Every environment variable reap-kernels reads, in one place.

`REAP_BACKEND`: backend of every op (`reference`, `cpu`, ...), or of some (`sort=cuda`, with commas
between). An explicit request: where it cannot serve, the call fails with the reason. Default:
automatic choice.

`REAP_CPU_DTYPE`: arithmetic of the CPU backend on bf16 and fp16 input: `native` (the input's
dtype), `float32`, or `auto` (native where the CPU has instructions for it). Default: `auto`.

`REAP_TUNING`: a launch table that comes before the shipped ones; `reap-kernels tune` writes it.

`REAP_SCRATCH_BYTES`: scratch a GPU backend may hold in one layer, in bytes; a call that needs more
is computed in parts. Default: a quarter of free device memory.

`REAP_CACHE_DIR`: where verdicts of the kernels' self-checks and tokenized data are kept. Default:
`$XDG_CACHE_HOME/reap-kernels`, or `~/.cache/reap-kernels`.

`REAP_CUDA_HOST`: path of the kernels of `csrc/` compiled for the CPU (`make host`), which makes the
`cuda` backend serve the CPU, for tests.

`REAP_BUILD_CUDA`: read by setup.py alone: `1` insists on building `reap_kernels._C`, `0` leaves it
out, `auto` builds it on Linux where nvcc is. Default: `auto`.

Triton's own `TRITON_INTERPRET=1` makes the `triton` backend serve the CPU, for tests.
"""

import os
from pathlib import Path

from reap_kernels.errors import BackendUnavailable
from reap_kernels.files import is_file

OPS = (
    "sort",
    "dequant",
    "experts",
    "saliency",
    "gram",
    "layer",
    "cross",
    "compare",
    "norm",
    "rotary",
)
CPU_DTYPES = ("auto", "native", "float32")


def backend(op: str) -> str | None:
    """The backend `REAP_BACKEND` asks for where `op` is concerned, or None for automatic choice.

    Raises:
        BackendUnavailable: the value is neither a name nor a list of `op=name`.
    """
    value = os.environ.get("REAP_BACKEND")
    if not value or "=" not in value:
        return value or None
    pairs = [part.split("=") for part in value.split(",")]
    wrong = [pair for pair in pairs if len(pair) != 2 or pair[0] not in OPS or not pair[1]]
    if wrong:
        raise BackendUnavailable(
            f"REAP_BACKEND={value!r} has {'='.join(wrong[0])!r}; give one backend for all, or "
            f"op=backend pairs with commas between, of the ops {', '.join(OPS)}"
        )
    return dict(pairs).get(op)


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


def tuning() -> Path | None:
    """The launch table `REAP_TUNING` names, or None."""
    value = os.environ.get("REAP_TUNING")
    return Path(value) if value else None


def conditions() -> tuple[str | int | None, ...]:
    """What choices of backends, kernels and tiles depend on, beside `REAP_BACKEND`: equal where
    they are the same, so that a choice can be kept with it.
    """
    table = os.environ.get("REAP_TUNING")
    # A table may be written again under its name.
    written = os.stat(table).st_mtime_ns if table and is_file(table) else 0
    get = os.environ.get
    return get("REAP_CUDA_HOST"), get("TRITON_INTERPRET"), table, written


def scratch_bytes() -> int | None:
    """The value of `REAP_SCRATCH_BYTES`, or None for the default.

    Raises:
        BackendUnavailable: the value is not a whole number above 0.
    """
    value = os.environ.get("REAP_SCRATCH_BYTES")
    if not value:
        return None
    if not value.isdecimal() or int(value) == 0:
        raise BackendUnavailable(
            f"REAP_SCRATCH_BYTES={value!r} is not a number of bytes; set it to one, such as "
            "4000000000, or unset it"
        )
    return int(value)


def cache_dir() -> Path:
    """Where verdicts of self-checks and tokenized data are kept."""
    own = os.environ.get("REAP_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "reap-kernels"


def cuda_host() -> Path | None:
    """The module `REAP_CUDA_HOST` names, or None."""
    value = os.environ.get("REAP_CUDA_HOST")
    return Path(value) if value else None
