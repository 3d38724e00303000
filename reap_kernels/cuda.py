"""The compiled kernels: is `reap_kernels._C` there, which devices it serves, and calls of it.

The module knows no tensors: it takes addresses, sizes and a stream, and answers with a CUDA status.
Here tensors become addresses, after a check of each, and a status other than success an error.
"""

import functools
import hashlib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from reap_kernels import device, env
from reap_kernels.errors import BackendUnavailable, DtypeError, KernelError, ShapeError

INTEGERS = (torch.int32, torch.int64)
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# As the module names dtypes.
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*INTEGERS, *FLOATS)}


@functools.cache
def module() -> ModuleType | str:
    """`reap_kernels._C`, or why there is none."""
    try:
        return importlib.import_module("reap_kernels._C")
    except ModuleNotFoundError:
        return "reap_kernels._C was not built (install where nvcc is; REAP_BUILD_CUDA=1 insists)"
    except ImportError as error:
        return f"reap_kernels._C cannot be loaded: {error}"


@functools.cache
def host_module(path: Path) -> ModuleType:
    """The same kernels compiled for the CPU (`make host`), which tests run.

    Raises:
        BackendUnavailable: `path` is not that module.
    """
    spec = importlib.util.spec_from_file_location("_host", path)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("it is no Python module")
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    except ImportError as error:
        raise BackendUnavailable(
            f"REAP_CUDA_HOST={path} cannot be loaded: {error}; build it with `make host`, or unset "
            "the variable"
        ) from error
    return found


def serving(where: torch.device) -> ModuleType | str:
    """The module that serves a device, or why none does."""
    if where.type == "cpu":
        path = env.cuda_host()
        if path is not None:
            return host_module(path)
        return "inputs are on the CPU, where CUDA kernels run only for tests (REAP_CUDA_HOST)"
    if where.type != "cuda" or torch.version.hip is not None:
        return f"inputs are on {where}; CUDA kernels serve NVIDIA devices"
    return device.too_old(where) or module()


def refusal(where: torch.device) -> str | None:
    """Why compiled kernels cannot run on a device, or None."""
    found = serving(where)
    return found if isinstance(found, str) else None


@functools.cache
def digest(where: torch.device) -> str:
    """Changes whenever the module that serves a device does: verdicts hold for one build."""
    return hashlib.sha256(Path(str(required(where).__file__)).read_bytes()).hexdigest()[:12]


def constant(where: torch.device, name: str) -> int:
    """A limit or size the module states, such as `SORT_CHUNK`."""
    return int(getattr(required(where), name))


def required(where: torch.device) -> ModuleType:
    """The module that serves a device.

    Raises:
        BackendUnavailable: none does.
    """
    found = serving(where)
    if isinstance(found, str):
        raise BackendUnavailable(f"CUDA kernels cannot run on {where}: {found}")
    return found


def number(where: torch.device) -> int:
    """The number the module knows a device by; 0 on the CPU."""
    if where.type != "cuda":
        return 0
    return torch.cuda.current_device() if where.index is None else where.index


class Kernel:
    """One launcher of the module, and the dtypes of its tensors.

    Args:
        name: of the launcher.
        dtypes: of each tensor argument; where several are allowed, the launcher also takes
            `<argument>_dtype`, which is filled in.
    """

    def __init__(self, name: str, **dtypes: torch.dtype | tuple[torch.dtype, ...]) -> None:
        self.name = name
        self._dtypes = dtypes

    def __call__(self, where: torch.device, shape: str, **arguments: Tensor | float | None) -> None:
        """Launches on `where`'s current stream; waits for nothing.

        Args:
            where: the device all tensors are on.
            shape: sizes of the call, for messages.
            arguments: tensors, which stay alive until the launch is queued (torch's allocator
                orders later uses of their memory after it), None for absent ones, and numbers.

        Raises:
            ShapeError, DtypeError: a tensor is elsewhere, not contiguous, or of another dtype.
            KernelError: CUDA refused the launch.
        """
        found = required(where)
        values: dict[str, float] = {}
        for name, value in arguments.items():
            allowed = self._dtypes.get(name)
            if allowed is None:
                assert isinstance(value, int | float), f"{self.name} states no dtype for {name}"
                values[name] = value
                continue
            assert not isinstance(value, int | float)
            values[name] = 0 if value is None else self._address(name, value, where)
            if isinstance(allowed, tuple):
                dtype = allowed[0] if value is None else value.dtype
                values[f"{name}_dtype"] = found.DTYPES[_NAMES[dtype]]
        stream, index = 0, number(where)
        if where.type == "cuda":
            # As Triton's launcher does: making a Stream object takes as long as a launch.
            stream = torch._C._cuda_getCurrentRawStream(index)
        with device.on(where):
            status = getattr(found, self.name)(**values, device=index, stream=stream)
        if status:
            raise KernelError(
                f"CUDA kernel {self.name} could not be launched for {shape} on {where}: "
                f"{found.error(status)}; `reap-kernels doctor` shows versions, and "
                "REAP_BACKEND=triton runs without it"
            )

    def _address(self, name: str, tensor: Tensor, where: torch.device) -> int:
        """Address of a tensor's first element, once the tensor has passed every check."""
        allowed = self._dtypes[name]
        dtypes = allowed if isinstance(allowed, tuple) else (allowed,)
        if tensor.dtype not in dtypes:
            wanted = ", ".join(map(str, dtypes))
            raise DtypeError(f"{self.name}: {name} is {tensor.dtype}; it takes {wanted}")
        if tensor.device != where and (tensor.device.type != where.type or where.index is not None):
            raise ShapeError(f"{self.name}: {name} is on {tensor.device}, the call on {where}")
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{self.name}: {name} has strides {tensor.stride()} for shape "
                f"{tuple(tensor.shape)}; pass a contiguous tensor"
            )
        return tensor.data_ptr()
