"""What two models' predictions of a text come to, sequence by sequence."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reap_driver.evaluation.figures import DRAWS, Figures, figures
from reap_driver.evaluation.predictions import Predictions
from reap_kernels import compare_logits
from reap_kernels.errors import DataError, ShapeError


@dataclass(frozen=True)
class Comparison:
    """Sums over the predictions of each of S sequences that has any.

    Attributes:
        sums: [S, 5] float64, columns as `figures.COLUMNS`.
        counts: [S] int64, predictions.
        groups: names of the calibration groups.
        group: [S] int64, index of each sequence's group.
        draws: of the bootstrap that intervals come from.
        seed: of the bootstrap.
    """

    sums: Tensor
    counts: Tensor
    groups: list[str]
    group: Tensor
    draws: int = DRAWS
    seed: int = 0

    @property
    def overall(self) -> Figures:
        """Of all sequences."""
        return figures(self.sums, self.counts, self.group, self.draws, self.seed)

    @property
    def by_group(self) -> dict[str, Figures]:
        """Of the sequences of each group that has any."""
        found = {}
        for index, name in enumerate(self.groups):
            own = self.group == index
            if own.any():
                rows = (self.sums[own], self.counts[own], self.group[own])
                found[name] = figures(*rows, self.draws, self.seed)
        return found


@dataclass
class Sums:
    """Collects what a comparison is made of, batch by batch.

    Attributes:
        backend: of `compare_logits`.
    """

    backend: str | None = None
    _groups: dict[str, int] = field(default_factory=dict)
    _sums: list[Tensor] = field(default_factory=list)
    _counts: list[Tensor] = field(default_factory=list)
    _group: list[Tensor] = field(default_factory=list)

    def add(
        self, group: str, inputs: Mapping[str, Tensor], original: Predictions, pruned: Predictions
    ) -> None:
        """Adds the predictions of one batch.

        Raises:
            ShapeError: the models' vocabularies differ.
            DataError: logits that are not finite.
        """
        index = self._groups.setdefault(group, len(self._groups))
        if not len(original.labels):
            return
        if original.logits.shape != pruned.logits.shape:
            raise ShapeError(
                f"the original gives {original.logits.shape[1]} logits, the pruned model "
                f"{pruned.logits.shape[1]}; compare models of one vocabulary"
            )
        other = pruned.logits.to(original.logits.device)
        found = compare_logits(original.logits, other, backend=self.backend)
        losses = [
            lse - logits.gather(1, original.labels[:, None])[:, 0].float()
            for lse, logits in ((found.full_lse, original.logits), (found.candidate_lse, other))
        ]
        columns = [*losses, found.kl, found.acceptance, found.same_top]
        values = torch.stack([column.float() for column in columns]).cpu().double()
        _check_finite(group, found.full_lse, found.candidate_lse)
        rows, sequences = len(inputs["input_ids"]), original.sequences.cpu()
        counts = torch.bincount(sequences, minlength=rows)
        sums = torch.stack([torch.bincount(sequences, v, minlength=rows) for v in values], dim=1)
        used = counts > 0
        self._sums.append(sums[used])
        self._counts.append(counts[used])
        self._group.append(torch.full((int(used.sum()),), index))

    def comparison(self, draws: int, seed: int) -> Comparison:
        """What was collected.

        Raises:
            DataError: nothing was.
        """
        if not self._counts:
            raise DataError(
                "none of the tokens is a prediction that counts; give text of two tokens or more"
            )
        joined = (torch.cat(parts) for parts in (self._sums, self._counts, self._group))
        sums, counts, group = joined
        return Comparison(sums, counts, list(self._groups), group, draws, seed)


def _check_finite(group: str, *lse: Tensor) -> None:
    """Raises DataError where a row of logits has no softmax."""
    for name, values in zip(("original", "pruned"), lse, strict=True):
        bad = int(values.isfinite().logical_not().sum())
        if bad:
            raise DataError(
                f"the logits of the {name} model are not finite in {bad} of {len(values)} "
                f"predictions of group {group!r}; check the checkpoint's weights, or load it in a "
                "wider dtype"
            )
