"""One call of the layer op, as every backend takes it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from reap_kernels.dispatch import Request
from reap_kernels.experts.request import request_of
from reap_kernels.gram.factors import row_factors
from reap_kernels.layer_gram import LayerGram
from reap_kernels.scratch import fitting
from reap_kernels.stats import LayerStats
from reap_kernels.types import ExpertWeights

# Scratch of a slot beside h and y: both indices, counts, measures, partial sums and tile lists.
SLOT_BYTES = 64


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Arguments of `observe_layer`, checked, but for the backend: that is chosen by `request`.

    Attributes:
        hidden: [T, H].
        topk_ids: [T, k] integers.
        topk_weights: [T, k] floats.
        experts: the layer's weights, of `hidden`'s dtype and device.
        stats: added to in place; None for the plain forward.
        mask: [T] bool, contiguous, tokens that count; None for all.
        group: of every token, or [T] int64, contiguous.
        chunk: tokens computed at a time by backends that hold whole expert outputs; None for as
            many as fit.
        gram: added to in place; None where only outputs and statistics are wanted.
        gram_scale: factor of every token, or [T], in `gram`.
    """

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    experts: ExpertWeights
    stats: LayerStats | None = None
    mask: Tensor | None = None
    group: int | Tensor = 0
    chunk: int | None = None
    gram: LayerGram | None = None
    gram_scale: float | Tensor = 1.0

    @property
    def request(self) -> Request:
        """What a backend is chosen by."""
        top_k, gram = self.topk_ids.shape[1], self.gram is not None
        return request_of("layer", self.hidden, top_k, self.experts, gram=gram)

    def gram_factors(self) -> Tensor:
        """[T, k]: see `row_factors`."""
        return row_factors(self.topk_weights, self.mask, self.gram_scale)

    def part(self, tokens: slice) -> "LayerCall":
        """The call of some of the tokens, as views."""
        scale = self.gram_scale
        return replace(
            self,
            hidden=self.hidden[tokens],
            topk_ids=self.topk_ids[tokens],
            topk_weights=self.topk_weights[tokens],
            mask=None if self.mask is None else self.mask[tokens],
            group=self.group[tokens] if isinstance(self.group, Tensor) else self.group,
            gram_scale=scale[tokens] if isinstance(scale, Tensor) else scale,
        )

    def parts(self, slot_bytes: int, quarters: int = 4) -> Iterator[tuple[slice, "LayerCall"]]:
        """The call in equal parts whose scratch fits the budget, with the tokens of each; itself
        where all fits.

        Args:
            slot_bytes: scratch of one slot.
            quarters: of the budget that the slots may take.
        """
        tokens, top_k = self.topk_ids.shape
        size = self.chunk or fitting(tokens, top_k * slot_bytes, self.hidden.device, quarters)
        if size >= tokens:
            yield slice(tokens), self
            return
        for start in range(0, tokens, size):
            own = slice(start, start + size)
            yield own, self.part(own)
