"""Folds of calibration data: counted apart while a model is observed, kept as parts of the whole.

The observer knows groups only. So while it runs every fold of a group is a group of its own, and
what it then has is put together once: journals, ranks and streamed layers need not know of folds,
and the kernels count under one group a batch as ever.
"""

from dataclasses import dataclass

from torch import Tensor

from reap_driver.data.batches import PackedBatches
from reap_kernels import SaliencyStats


@dataclass(frozen=True)
class FoldedBatches:
    """Batches whose group names their fold."""

    batches: PackedBatches

    def group(self, number: int) -> str:
        """The group a batch is counted under for now."""
        return self._name(self.batches.group(number), self.batches.fold(number))

    def inputs(self, number: int) -> dict[str, Tensor]:
        """As the batches have them."""
        return self.batches.inputs(number)

    @property
    def groups(self) -> list[str]:
        """All of these groups, whether a batch is of them or not, in one order everywhere."""
        folds = range(self.batches.folds)
        return [self._name(group, fold) for group in self.batches.groups for fold in folds]

    def merged(self, stats: SaliencyStats) -> SaliencyStats:
        """Statistics of groups, with a part for every fold, of statistics of `groups`.

        Without folds, the statistics as they are.
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
