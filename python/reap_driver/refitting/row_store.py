"""Stores the rows of a layer that is re-fitted, where the states of batches are stored."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reap_driver.compensation.rows import ExpertRows
from reap_driver.memory.decision import Offload
from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.state_store import StateStore


class RowStore:
    """The batches of one layer: what its experts were given, and what their output lacks.

    A batch is on the device only while it is worked on. What its experts were given is stored once;
    what is missing, and the product of a step, are replaced many times.

    Args:
        place: where batches are stored.
        device: the device that the model runs on.
        folder: for files, which it must not have yet; deleted by `close`.
        held_out: whether each batch is held out.
    """

    def __init__(
        self, place: Offload, device: torch.device, folder: Path | None, held_out: Sequence[bool]
    ) -> None:
        self._held_out, self._folder = tuple(held_out), folder
        self._given, self._left, self._behind = self._stores = [
            StateStore(place, device, None if folder is None else folder / name)
            for name in ("given", "left", "behind")
        ]
        for store in self._stores:
            store.begin(0)

    def add(self, number: int, rows: ExpertRows, cut: BatchState, full: Tensor) -> None:
        """Stores a batch, and what its new state is made from when the layer is solved.

        Args:
            number: place of the batch among those of this process.
            rows: of its experts.
            cut: the state of the pruned model after the layer as it is.
            full: hidden states of the original after the layer.
        """
        given = [rows.hidden, rows.ids, rows.weights, rows.mask]
        self._given.put(number, BatchState.of(0, given, {}))
        self._behind.put(number, BatchState.of(cut.layer, [full, cut.output()], cut.changes()))
        self[number] = rows

    def complete(self) -> None:
        """Called when all batches were added, before any is read."""
        for store in self._stores:
            store.turn()
        self._left.rewrite()

    def states(self, number: int) -> tuple[BatchState, Tensor]:
        """The `cut` and `full` of a batch that was added."""
        state = _state(self._behind, number)
        full, output = state.output()
        return BatchState.of(state.layer, output, state.changes()), full

    def __len__(self) -> int:
        return len(self._held_out)

    def __getitem__(self, number: int) -> ExpertRows:
        hidden, ids, weights, mask = _state(self._given, number).output()
        missing, product = _state(self._left, number).output()
        held_out = self._held_out[number]
        return ExpertRows(hidden, ids, weights, missing, mask, held_out, product)

    def __setitem__(self, number: int, rows: ExpertRows) -> None:
        self._left.put(number, BatchState.of(0, [rows.missing, rows.product], {}))

    def close(self) -> None:
        """Ends the background threads and deletes the files."""
        for store in self._stores:
            store.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _state(store: StateStore, number: int) -> Any:
    """The state of a batch, which was put."""
    state = store.get(number, None)
    assert state is not None
    return state
