"""Sums over tokens that tell which experts of a layer are alike: of outputs, and of router logits.

Both are bounded: E * H and E * E numbers of a layer of E experts and hidden size H, whatever the
text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_kernels import ExpertWeights, expert_outputs, sort_by_expert

_CHUNK_ELEMENTS = 1 << 26  # of the outputs that are computed at once


@dataclass(frozen=True)
class LayerVectors:
    """What the tokens that count have left in one layer. With f_j the output of expert j before the
    router weight, and l_j the logit that the router gives it:

    Attributes:
        tokens: number of tokens.
        count: int64 [E], tokens that were routed to each expert.
        output_sum: float64 [E, H], sum of f_j over all tokens, those routed to other experts too;
            None where it was not asked for.
        logit_products: float64 [E, E], sums of l_i l_j over all tokens; None likewise.

    Example:
        >>> counts = torch.tensor([3, 1])
        >>> sums = torch.ones(2, 8, dtype=torch.float64)
        >>> rd.LayerVectors(tokens=4, count=counts, output_sum=sums).mean_outputs[0, 0]
        tensor(0.2500, dtype=torch.float64)
    """

    tokens: int
    count: Tensor
    output_sum: Tensor | None = None
    logit_products: Tensor | None = None

    @property
    def mean_outputs(self) -> Tensor | None:
        """Mean output of each expert, float64 [E, H]; None where it was not asked for."""
        return None if self.output_sum is None else self.output_sum / max(self.tokens, 1)

    @property
    def logit_similarity(self) -> Tensor | None:
        """Cosines of the experts' router logits, seen as vectors with an entry per token: float64
        [E, E], 0 for an expert whose logits are 0; None where they were not asked for.
        """
        if self.logit_products is None:
            return None
        norms = self.logit_products.diagonal().sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0)
        return self.logit_products * scale[:, None] * scale


def output_sums(hidden: Tensor, experts: ExpertWeights, backend: str | None) -> Tensor:
    """Sums of the outputs of all experts over all tokens: float64 [E, H] of hidden states [T, H].

    Computes every expert for every token, E / k times the work of the layer.
    """
    count = experts.num_experts
    total = hidden.new_zeros(count, experts.hidden_size, dtype=torch.float64)
    for part in _parts(hidden, _CHUNK_ELEMENTS // experts.hidden_size):
        # Some experts for all tokens: each expert's weights are read once.
        some = max(_CHUNK_ELEMENTS // part.numel(), 1)
        for own in torch.arange(count, device=hidden.device).split(some):
            routing = sort_by_expert(own.expand(len(part), -1), count, backend=backend)
            rows = expert_outputs(part, routing, experts, backend=backend)
            # Each of these experts has a row of every token, one expert after the other.
            total[own] += rows.view(len(own), len(part), -1).sum(dim=1, dtype=torch.float64)
    return total


def logit_products(logits: Tensor) -> Tensor:
    """Sums of l_i l_j over tokens: float64 [E, E] of logits [T, E]."""
    total = logits.new_zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    for part in _parts(logits, _CHUNK_ELEMENTS // logits.shape[1]):
        own = part.double()
        total += own.mT @ own
    return total


def _parts(rows: Tensor, size: int) -> Iterator[Tensor]:
    """The rows in parts of a size; none where there are no rows."""
    return iter(rows.split(max(size, 1)) if len(rows) else ())
