"""Gram sums of a run: which layers can have them, where they go, and how those of ranks add up."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reap_driver.files.exchange import partial_of
from reap_driver.files.gram_folder import GramWriter, layout, read_layer
from reap_driver.model.discover import MoELayer, adapter_of
from reap_driver.observation.data_parallel import Ranks
from reap_kernels import ExpertWeights, LayerGram, LayerStats, SaliencyStats
from reap_kernels.errors import DataError, UnsupportedModel

# Receives a layer that is complete: its name, its statistics on the CPU, its Gram sums and its
# weights, which are only valid during the call.
GramSink = Callable[[str, LayerStats, LayerGram, ExpertWeights], None]


def check_gram(layers: Sequence[MoELayer]) -> None:
    """Checks that Gram matrices can be summed of every layer.

    Raises:
        UnsupportedModel: of one they cannot; says why.
    """
    for layer in layers:
        if layer.local is not None:
            raise UnsupportedModel(
                f"{layer.name} is spread over ranks by expert, where no Gram matrices are summed; "
                "load the model without expert parallelism, or observe without them"
            )
        if not adapter_of(layer).takes_gram:
            raise UnsupportedModel(
                f"{layer.name} computes its experts inside its block, where what enters their down "
                "projections is not seen, so no Gram matrices can be summed; observe without them"
            )


def save_grams(grams: Mapping[str, LayerGram], folder: Path) -> None:
    """Writes sums so far to a folder, of a journal, for `load_grams`."""
    writer = GramWriter(folder, list(grams), part=folder)
    for name, sums in grams.items():
        writer.put(name, sums)


def load_grams(folder: Path) -> dict[str, LayerGram]:
    """Sums that `save_grams` wrote, on the CPU.

    Raises:
        DataError: they are damaged.
    """
    found = map(read_layer, sorted(folder.glob("*.safetensors")))
    return {head["layer"]: sums for head, sums in found}


class GramRun:
    """The Gram folder of one observation, whose ranks each write a folder of their own.

    Args:
        out: the folder to write.
        layers: names of the MoE layers, in the model's order.
        run: identity of the run, JSON-serializable; files of another run are not used.
        world: the ranks.
    """

    def __init__(
        self, out: Path, layers: Sequence[str], run: Mapping[str, Any], world: Ranks
    ) -> None:
        self.out = out
        of = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        self._world = world
        self._whole = self._own = GramWriter(out, layers, of=of)
        if world.size > 1:
            part = partial_of(out, f"-{world.rank}-of-{world.size}")
            self._own = GramWriter(out, layers, of=of, part=part)

    def take(self, name: str, _: LayerStats, sums: LayerGram, __: ExpertWeights) -> None:
        """Writes a layer that is complete: a `GramSink`."""
        self._own.put(name, sums)

    def put(self, grams: Mapping[str, LayerGram]) -> None:
        """Writes layers of a resident model."""
        for name, sums in grams.items():
            self._own.put(name, sums)

    def check(self, snapshot: SaliencyStats) -> None:
        """Checks that the layers of a journal, which are complete, have been written.

        Raises:
            DataError: names one that was not.
        """
        for name, stats in snapshot.layers.items():
            if int(stats.tokens.sum()) and not self._own.done(name):
                raise DataError(
                    f"{self._own.part}: lacks the Gram matrices of {name}, which the interrupted "
                    "run had written there; delete its journal and start again"
                )

    def finish(self, stats: SaliencyStats | None) -> None:
        """Completes the folder; the sums of ranks are added in their order. A collective operation.

        Args:
            stats: of all ranks, on rank 0.
        """
        world = self._world
        if world.size > 1:
            layers = json.loads(world.of_first(json.dumps([*(stats.layers if stats else ())])))
            for name in layers:
                self._add(name)
        if stats is not None:
            self._whole.finish(stats.provenance)

    def _add(self, name: str) -> None:
        """Writes the sums of a layer over all ranks, of which some may have had no batch."""
        world, own = self._world, self._own.get_packed(name)
        sizes = [] if own is None else list(own["first"].shape)
        known = layout(*next(filter(None, map(json.loads, world.texts(json.dumps(sizes))))))
        tensors = own or {
            key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in known.items()
        }
        added = {key: world.added(tensors[key]) for key in sorted(known)}
        whole = {key: tensor for key, tensor in added.items() if tensor is not None}
        if whole:
            self._whole.put_packed(name, whole)

    def remove(self) -> None:
        """Deletes what this rank wrote; the folder stays if it is complete."""
        self._own.remove()
