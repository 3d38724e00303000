"""Folds of calibration data: statistics of each fold, beside those of all data.

The observer has groups but no folds. During a run each fold of a group is a group of its own, and
the statistics are merged afterwards. So journals, ranks, streaming and kernels need no support for
folds.
"""

from dataclasses import dataclass

from torch import Tensor

from reap_driver.data.batches import PackedBatches
from reap_kernels import SaliencyStats


@dataclass(frozen=True)
class FoldedBatches:
    """Batches whose group includes their fold."""

    batches: PackedBatches

    def group(self, number: int) -> str:
        """The group, with fold, under which a batch is counted during the run."""
        return self._name(self.batches.group(number), self.batches.fold(number))

    def inputs(self, number: int) -> dict[str, Tensor]:
        """The tensors of a batch, see `PackedBatches.inputs`."""
        return self.batches.inputs(number)

    @property
    def groups(self) -> list[str]:
        """All groups with folds, also those without a batch, in the same order on every rank."""
        folds = range(self.batches.folds)
        return [self._name(group, fold) for group in self.batches.groups for fold in folds]

    def merged(self, stats: SaliencyStats) -> SaliencyStats:
        """Statistics by group, with one part per fold, from statistics by group and fold.

        Returned unchanged if there is one fold.
        """
        names, folds = self.batches.groups, self.batches.folds
        if folds == 1:
            return stats
        of = {self._name(g, fold): (i, fold) for i, g in enumerate(names) for fold in range(folds)}
        places = [of[name] for name in stats.groups]

        def regrouped(fold: int | None) -> SaliencyStats:
            targets = [group if fold in (None, own) else None for group, own in places]
            layers = {
                name: layer.regrouped(targets, len(names)) for name, layer in stats.layers.items()
            }
            return SaliencyStats(layers, names, stats.provenance)

        whole = regrouped(None)
        whole.parts = [regrouped(fold) for fold in range(folds)]
        return whole

    def _name(self, group: str, fold: int) -> str:
        folds = self.batches.folds
        return group if folds == 1 else f"{group} (fold {fold + 1} of {folds})"
