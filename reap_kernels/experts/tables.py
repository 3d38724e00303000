"""What kernels read of weights that are separate tensors: tables on the device that say where."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from reap_kernels.errors import BackendUnavailable


class Tables:
    """Tables on devices, kept by value, so that a model uploads each only once.

    Values are the key: a table can never be stale. Bounded, since offloading moves weights about.
    """

    _LIMIT = 4096

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def on_device(self, key: Hashable, where: torch.device, make: Callable[[], Tensor]) -> Tensor:
        """The table of `key` on `where`; `make` makes it in host memory.

        Raises:
            BackendUnavailable: a CUDA graph is being captured, whose replays alone would upload it.
        """
        if (where, key) not in self._kept:
            table = make()
            if where.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    raise BackendUnavailable(
                        f"the addresses of this layer's experts are not on {where} yet, and a CUDA "
                        "graph is being captured; call the layer once before"
                    )
                # Pinned: from pageable memory the copy would wait.
                table = table.pin_memory().to(where, non_blocking=True)
            self._kept[where, key] = table
            if len(self._kept) > self._LIMIT:
                self._kept.popitem(last=False)
        self._kept.move_to_end((where, key))
        return self._kept[where, key]
