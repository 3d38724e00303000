"""What compensation takes of a layer: its down projections and Grams, checked and read in parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels import LayerGram
from reap_kernels.errors import DataError, DtypeError, ShapeError, UsageError
from reap_kernels.schema import short


@dataclass(frozen=True)
class Layer:
    """Down projections and Grams of some experts of one layer.

    Attributes:
        ids: of these experts.
        hidden, width: H and I.
        dtype: of the down projections.
        device: of the Grams, where all results are.
    """

    matrices: Tensor | Sequence[Tensor]
    sums: LayerGram | Tensor
    ids: list[int]
    hidden: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        down: Tensor | Sequence[Tensor],
        gram: LayerGram | Tensor,
        experts: Sequence[int] | None,
    ) -> "Layer":
        """Checks that the tensors fit each other.

        Raises:
            ShapeError, DtypeError, UsageError: they do not; or there is no such expert.
        """
        shapes = {tuple(matrix.shape) for matrix in down}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ShapeError(
                f"down has matrices of shape {short(sorted(shapes))}; give [E, H, I], or one "
                "[H, I] per expert"
            )
        [(hidden, width)] = shapes
        square = gram if isinstance(gram, Tensor) else gram.gram
        if tuple(square.shape) != (len(down), width, width):
            raise ShapeError(
                f"gram has shape {tuple(square.shape)}; {len(down)} experts of {width} neurons "
                f"need {(len(down), width, width)}: give the Gram of this layer"
            )
        for name, tensor in (("down", down[0]), ("gram", square)):
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise DtypeError(
                    f"{name} is {tensor.dtype}; give bf16, fp16, fp32 or fp64 (dequantize weights "
                    "first)"
                )
        ids = list(range(len(down))) if experts is None else [int(e) for e in experts]
        wrong = [e for e in ids if not 0 <= e < len(down)]
        if wrong or not ids:
            raise UsageError(
                f"experts {short(wrong or ids)}: the layer has the ids 0..{len(down) - 1}; give "
                "some of them"
            )
        return cls(down, gram, ids, hidden, width, down[0].dtype, square.device)

    def check_keep(self, keep: int) -> None:
        """Raises ShapeError unless 1 <= keep <= I."""
        if not 1 <= keep <= self.width:
            raise ShapeError(
                f"experts of {self.width} neurons cannot keep {keep}; keep from 1 to {self.width}"
            )

    def down(self, part: slice) -> Tensor:
        """Down projections of a part of the experts: float64 [b, H, I] on the Gram's device.

        Raises:
            DataError: one is not finite.
        """
        found = [self.matrices[e].detach().to(self.device, torch.float64) for e in self.ids[part]]
        return self._finite("down projection", torch.stack(found), part)

    def gram(self, part: slice) -> Tensor:
        """Grams of a part of the experts: float64 [b, I, I], symmetric.

        Raises:
            DataError: one is not finite.
        """
        if isinstance(self.sums, Tensor):
            lower = self.sums[self.ids[part]].double().tril()
            found = lower + lower.tril(-1).mT
        else:
            found = torch.stack([self.sums.second(e) for e in self.ids[part]])
        return self._finite("Gram", found, part)

    def shifts(self, ridge: float) -> Tensor:
        """What is added to the diagonal of each Gram: float64 [len(ids)].

        The ridge times the mean of the diagonal, and at least (I / rows)^2 times it; 1 for a Gram
        that is 0.

        Raises:
            UsageError: the ridge is negative or not finite.
        """
        if not (math.isfinite(ridge) and ridge >= 0):
            raise UsageError(f"ridge is {ridge:g}; give a number of at least 0, such as 0.001")
        square = self.sums if isinstance(self.sums, Tensor) else self.sums.gram
        mean = square.diagonal(dim1=1, dim2=2)[self.ids].double().mean(1)
        share, counts = torch.full_like(mean, ridge), self.counts()
        if counts is not None:
            share.clamp_(min=(self.width / counts.clamp(min=1)) ** 2)
        return torch.where(mean == 0, torch.ones_like(mean), mean * share)

    def counts(self) -> Tensor | None:
        """Rows of each expert, int64 [len(ids)]; None if they are not known."""
        return None if isinstance(self.sums, Tensor) else self.sums.count[self.ids]

    def notes(self) -> tuple[str, ...]:
        """Sentences on experts with fewer than 2 I rows, and on those with none."""
        rows = 2 * self.width
        counts = self.counts()
        if counts is None:
            return ()
        known = dict(zip(self.ids, counts.tolist(), strict=True))
        few = {e: n for e, n in known.items() if 0 < n < rows}
        none = [e for e, n in known.items() if n == 0]
        notes = []
        if few:
            notes.append(
                f"{len(few)} of {len(known)} experts have fewer than {rows} rows, twice their "
                "width, so their down projections are corrected little; calibrate on more text "
                f"(expert: rows): {short(few)}"
            )
        if none:
            notes.append(
                f"{len(none)} of {len(known)} experts have no rows, so they keep their largest "
                f"neurons uncorrected: {short(none)}"
            )
        return tuple(notes)

    def _finite(self, what: str, values: Tensor, part: slice) -> Tensor:
        bad = ~values.isfinite().all(-1).all(-1)
        if bool(bad.any()):
            expert = self.ids[part][int(bad.nonzero()[0])]
            raise DataError(
                f"the {what} of expert {expert} has NaN or Inf; look for them in the checkpoint "
                "and in the data, and observe again"
            )
        return values
