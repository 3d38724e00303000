"""What kernels read of weights that are separate tensors: tables on the device that say where."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels.errors import BackendUnavailable


@dataclass(slots=True)
class _Table:
    """A table on a device.

    Attributes:
        table: the bytes.
        copied: when they have come, as far as nobody has seen that yet.
    """

    table: Tensor
    copied: torch.cuda.Event | None = None

    def await_copy(self, where: torch.device) -> None:
        """Lets the current stream wait for the copy, which another stream may have been given.

        A stream that is captured must not: what captures it has waited for the device before, as
        `torch.cuda.graph` does.
        """
        if self.copied is None or torch.cuda.is_current_stream_capturing():
            return
        if self.copied.query():
            self.copied = None
        else:
            torch.cuda.current_stream(where).wait_event(self.copied)


class Tables:
    """Tables on devices, kept by value, so that a model uploads each only once.

    Values are the key: a table can never be stale. Bounded, since offloading moves weights about.
    """

    _LIMIT = 4096

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Table] = OrderedDict()

    def on_device(self, key: Hashable, where: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The table of `key` on `where`; `make` makes it in host memory, torch's default device
        being the CPU then.

        Raises:
            BackendUnavailable: a CUDA graph is being captured, whose replays alone would upload it.
        """
        found = self._kept.get((where, key))
        if found is None:
            found = self._kept[where, key] = _made(where, make)
            if len(self._kept) > self._LIMIT:
                self._kept.popitem(last=False)
        else:
            found.await_copy(where)
        self._kept.move_to_end((where, key))
        return found.table


def _made(where: torch.device, make: Callable[[], Tensor]) -> _Table:
    """A new table, on its way to `where`."""
    with torch.device("cpu"):
        table = make()
    if where.type != "cuda":
        return _Table(table)
    if torch.cuda.is_current_stream_capturing():
        raise BackendUnavailable(
            f"the addresses of this layer's experts are not on {where} yet, and a CUDA graph is "
            "being captured; call the layer once before"
        )
    # Pinned: from pageable memory the copy would wait.
    there = table.pin_memory().to(where, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(where))
    return _Table(there, copied)
