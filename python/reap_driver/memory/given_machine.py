"""A machine that is described in a text, to plan for one that is not there.

What the text leaves out is unknown: no size and no rate is looked up or guessed. Nothing here
imports torch, so that options can be checked before it is.
"""

import difflib
import re
from dataclasses import dataclass

from reap_driver.base.quantities import number

AS_GIVEN = "as `machine` says"
FORM = "[Nx]NAME-SIZE or cpu, then key=value, such as 1xH200-141GB,ram=128GB,disk=2GB/s"
# Key -> (unit of its value, an example).
_SIZE, _RATE = ("B", "a size such as 128GB"), ("B/s", "a rate such as 2GB/s")
_KEYS = {
    "ram": _SIZE,
    "disk": _RATE,
    "free": _SIZE,
    "flops": ("FLOP/?s", "operations per second such as 400T"),
    "copy": _RATE,
}
_OF_GPUS = ("copy",)


@dataclass(frozen=True)
class GivenMachine:
    """A machine as described; None where the description says nothing.

    Attributes:
        gpus: number of GPUs; 0 for a machine that computes on its CPU.
        name: name of a GPU, or "cpu".
        memory: free bytes of one GPU.
        ram: free bytes of host memory.
        disk: bytes read from the disk per second.
        free: free bytes on the disk.
        flops: operations per second of one GPU (or of the CPU) in large matrix products.
        copy: bytes copied per second from host memory to one GPU.
    """

    gpus: int
    name: str
    memory: int | None = None
    ram: int | None = None
    disk: float | None = None
    free: int | None = None
    flops: float | None = None
    copy: float | None = None

    @property
    def kind(self) -> str:
        """The type of device: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"


def parse_machine(text: str) -> GivenMachine:
    """The machine that a text describes.

    Args:
        text: `[Nx]NAME-SIZE` (N GPUs with SIZE of memory each) or `cpu`, then, separated by commas,
            `ram=SIZE`, `disk=RATE`, `free=SIZE`, `flops=RATE` and `copy=RATE` in any order.

    Raises:
        ValueError: a part is none of these; names the part and what is possible.

    Example:
        >>> parse_machine("2xH200-141GB,ram=1TB,disk=2GB/s").ram
        1000000000000
    """
    first, *rest = (part.strip() for part in text.split(","))
    gpus, name, memory = _device(first)
    found: dict[str, float] = {}
    for part in rest:
        key, value = _pair(part)
        if key in found:
            raise ValueError(f"{key} is given twice; give it once")
        if key in _OF_GPUS and not gpus:
            raise ValueError(f"{part!r}: a machine without a GPU copies to none; leave it out")
        found[key] = value
    ram, free = (None if key not in found else int(found.pop(key)) for key in ("ram", "free"))
    return GivenMachine(gpus, name, memory, ram=ram, free=free, **found)


def _device(text: str) -> tuple[int, str, int | None]:
    """Number of GPUs, their name and the memory of each."""
    if text == "cpu":
        return 0, text, None
    match = re.fullmatch(r"(?:(\d+)x)?(.*\S)-([^-]+)", text)
    memory = number(match[3], "B") if match else None
    if match is None or memory is None or memory < 1 or match[2] == "cpu":
        raise ValueError(f"{text!r} is no device; give {FORM}")
    gpus = int(match[1] or 1)
    if gpus < 1:
        raise ValueError(f"{text!r} has no GPU; give at least 1, or cpu")
    return gpus, match[2], int(memory)


def _pair(text: str) -> tuple[str, float]:
    """A key and its value."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if key not in _KEYS or not equals:
        close = difflib.get_close_matches(key, _KEYS, 1)
        hint = f"did you mean {close[0]}=?" if close else f"there are {', '.join(_KEYS)}"
        raise ValueError(f"{text!r} is not key=value with a key that is known; {hint}")
    unit, example = _KEYS[key]
    amount = number(value, unit)
    if amount is None or amount < 1:
        raise ValueError(f"{key}={value}: {value!r} is not {example}")
    return key, amount
