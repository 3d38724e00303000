"""Sums over the predictions of two models, sequence by sequence, and the comparison they give."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reap_driver.evaluation.figures import DRAWS, Difference, Figures, difference, figures
from reap_driver.evaluation.predictions import Predictions
from reap_kernels import compare_logits
from reap_kernels.errors import DataError, ShapeError


@dataclass(frozen=True)
class Comparison:
    """How closely a pruned model follows its original, kept as sums over each of S sequences.

    Attributes:
        sums: float64 [S, 5], sums over each sequence's predictions: negative log-likelihood by the
            original and by the pruned model (nats), KL divergence (nats), expected acceptance,
            number of equal most likely tokens.
        counts: int64 [S], predictions that count in each sequence, above 0.
        groups: names of the calibration groups.
        group: int64 [S], index of each sequence's group.
        draws: samples of the bootstrap that gives the 95 % intervals.
        seed: seed of the bootstrap.

    Example:
        >>> found = rd.compare_models(model, plan, batches, groups=["code", "code", "text", "text"])
        >>> sorted(found.by_group)
        ['code', 'text']
    """

    sums: Tensor = field(repr=False)
    counts: Tensor = field(repr=False)
    groups: list[str]
    group: Tensor = field(repr=False)
    draws: int = DRAWS
    seed: int = 0

    @property
    def overall(self) -> Figures:
        """Figures of all sequences."""
        return figures(self.sums, self.counts, self.group, self.draws, self.seed)

    def less(self, other: "Comparison") -> Difference:
        """How this pruned model compares with another one, of the same original on the same text.

        Raises:
            DataError: the two are of other sequences.

        Example:
            >>> half = rd.make_plan(scores, ratio=0.5)
            >>> one, two = (rd.compare_models(model, p, batches) for p in (plan, half))
            >>> two.less(one).kl.value > 0
            True
        """
        if not torch.equal(self.counts, other.counts) or not torch.equal(self.group, other.group):
            raise DataError(
                f"comparisons of {len(self.counts)} and {len(other.counts)} sequences, which are "
                "not the same; compare both models on the same batches"
            )
        rows = (self.sums, other.sums, self.counts, self.group)
        return difference(*rows, self.draws, self.seed)

    @property
    def by_group(self) -> dict[str, Figures]:
        """Group -> figures of its sequences, for the groups that have any."""
        found = {}
        for index, name in enumerate(self.groups):
            own = self.group == index
            if own.any():
                rows = (self.sums[own], self.counts[own], self.group[own])
                found[name] = figures(*rows, self.draws, self.seed)
        return found


@dataclass
class Sums:
    """Collects the sums of a comparison, batch by batch.

    Attributes:
        backend: backend of `reap_kernels.compare_logits`; None chooses one.
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
            ShapeError: the models' vocabularies differ in size.
            DataError: logits are not finite.
        """
        index = self._groups.setdefault(group, len(self._groups))
        if not len(original.labels):
            return
        if original.logits.shape != pruned.logits.shape:
            raise ShapeError(
                f"the original gives {original.logits.shape[1]} logits per token, the pruned model "
                f"{pruned.logits.shape[1]}; compare models with the same vocabulary"
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
        """The comparison of all batches added.

        Raises:
            DataError: no prediction counts.
        """
        if not self._counts:
            raise DataError(
                "no prediction counts in the text given; give sequences of at least two tokens"
            )
        joined = (torch.cat(parts) for parts in (self._sums, self._counts, self._group))
        sums, counts, group = joined
        return Comparison(sums, counts, list(self._groups), group, draws, seed)


def _check_finite(group: str, *lse: Tensor) -> None:
    """Raises DataError if a log-sum-exp of logits is not finite."""
    for name, values in zip(("original", "pruned"), lse, strict=True):
        bad = int(values.isfinite().logical_not().sum())
        if bad:
            raise DataError(
                f"the logits of the {name} model are not finite in {bad} of {len(values)} "
                f"predictions of group {group!r}; check the checkpoint's weights, or load it in a "
                "wider dtype"
            )
