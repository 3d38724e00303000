"""Self-checks of compiled kernels: does this compiler, on this device, give the right numbers?

Some Triton versions miscompile some tiles on some architectures. So before a GPU backend first
serves a kind of call, it computes a small one and is compared with the float64 reference. The
verdict is kept on disk, by op, device, versions, launch and the kernels' own source; a failed check
refuses the backend and says why.
"""

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reap_kernels import device, dispatch, env
from reap_kernels.dispatch import Passing
from reap_kernels.documents import Format, to_json
from reap_kernels.errors import DataError, KernelError, ReapError
from reap_kernels.files import replaced
from reap_kernels.schema import MapOf, OrNull, Text

FORMAT = Format(
    "reap-selfcheck",
    1,
    "file of self-checks",
    {"verdicts": MapOf(OrNull(Text()), longest=100_000)},
    DataError,
    "delete it",
    sealed=True,
)

# None: the check passed. Filled from disk at first use.
_VERDICTS: dict[str, str | None] = {}
# The same by value, for calls of a layer: writing out a key takes longer than launching a kernel.
_KNOWN: dict[tuple[Any, ...], str | None] = {}


def path() -> Path:
    """The file of verdicts."""
    return env.cache_dir() / "selfcheck.json"


def verdict(
    op: str, where: torch.device, facts: dict[str, Any], check: Callable[[], str | None]
) -> str | None:
    """Reason for refusing a kernel, or None; runs `check` only where no verdict is known.

    Args:
        op: the op.
        where: the device it would run on.
        facts: what else the compiled kernels depend on: dtype, launch, activation, layout.
        check: computes and compares; returns what is wrong, or None.
    """
    values = (op, where, *facts.values())
    if values not in _KNOWN:
        reason = _verdict(_key(op, where, facts), where, check)
        if isinstance(reason, Passing):
            return reason
        _KNOWN[values] = reason
    return _KNOWN[values]


def _verdict(key: str, where: torch.device, check: Callable[[], str | None]) -> str | None:
    """The reason, which holds for as long as the process lives unless it is `Passing`."""
    if not _VERDICTS:
        _VERDICTS.update(saved())
    if key in _VERDICTS:
        return _VERDICTS[key]
    if where.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return Passing(
            "it has not been checked on this device yet; call it once before capturing a graph"
        )
    try:
        with torch.device("cpu"):  # checks make their inputs there
            reason = check()
    except KernelError as error:
        return f"its self-check could not be launched: {error}"
    except ReapError:  # a wrong setting says nothing about the kernel: its own error is raised
        raise
    except torch.OutOfMemoryError as error:
        return Passing(f"its self-check ran out of memory: {error}")
    except Exception as error:  # noqa: BLE001  a compiler may fail in any way: all of them refuse
        text = " ".join(str(error).split())[:500]
        return f"its self-check failed: {type(error).__name__}: {text}"
    _VERDICTS[key] = None if reason is None else f"its self-check gave wrong numbers: {reason}"
    _save(key, _VERDICTS[key])
    return _VERDICTS[key]


def saved() -> dict[str, str | None]:
    """Every verdict on disk; none where the file is absent or damaged."""
    try:
        found: dict[str, str | None] = FORMAT.read(path())["verdicts"]
    except DataError:  # then every check runs again, and the file is replaced
        return {}
    return found


def current() -> dict[str, str | None]:
    """Verdicts on disk of the kernels and the versions that are installed now."""
    ours = _software().items()
    return {
        key: reason
        for key, reason in saved().items()
        if all(f"{name}={value}" in key.split(" ") for name, value in ours)
    }


def forget() -> None:
    """Drops the verdicts in memory, so that the next call reads them from disk again, and the
    choices of backends that were made by them.
    """
    dispatch.forget()
    _VERDICTS.clear()
    _KNOWN.clear()


def _save(key: str, reason: str | None) -> None:
    """Adds one verdict to the file; of two processes at once one may have to check again."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with replaced(path()) as temporary:
            content = FORMAT.complete({"verdicts": {**saved(), key: reason}})
            temporary.write_text(to_json(content, indent=1), "utf-8")
    except OSError as error:
        warnings.warn(
            f"the self-check's verdict cannot be kept in {path()}: {error}; it will run again in "
            "every process: set REAP_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )


def _key(op: str, where: torch.device, facts: dict[str, Any]) -> str:
    name = "cpu" if where.type == "cpu" else torch.cuda.get_device_name(where)
    known = {
        "op": op,
        "arch": device.architecture(where),
        "device": name,
        **_software(),
        **facts,
    }
    return " ".join(f"{key}={value}" for key, value in known.items())


def _software() -> dict[str, Any]:
    """What a verdict holds for, beside the device and the call."""
    return {
        "triton": device.triton_version(),
        "torch": torch.__version__,
        "kernels": _source_digest(),
    }


@functools.cache
def _source_digest() -> str:
    """Changes whenever the source of a kernel or of its launches does."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    kernels = ("kernel_triton.py", "kernel_tma.py", "kernel_fp8.py", "kernel_cuda.py")
    launching = (*kernels, "gpu.py", "operands.py", "product.py", "stage_kernels.py", "slots.py")
    for file in sorted(file for name in launching for file in here.glob(f"*/{name}")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
