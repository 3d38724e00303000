"""Compares the experts of a layer whose down projections were solved again with the original's.

Gate and up projections must be the original's, of the neurons that the plan keeps. Down projections
are other numbers on purpose, so only their shape, dtype and that they are finite is checked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reap_driver.model.discover import MoELayer
from reap_driver.model.expert_parts import holders, matrices_in
from reap_driver.planning.plan import LayerPlan
from reap_kernels import ExpertWeights


@dataclass(frozen=True)
class SolvedExperts:
    """A layer's experts in both models, both of them loaded.

    Attributes:
        old, new: the layer of the original and of the pruned model.
        plan: of the layer.
    """

    old: MoELayer
    new: MoELayer
    plan: LayerPlan

    @property
    def tensors(self) -> set[str]:
        """The tensors of both models that hold the experts' matrices, and their gates' biases."""
        return {*holders(self.old), *holders(self.new)}

    @property
    def solved(self) -> bool:
        """Whether some down projection is another than the original's on purpose."""
        if self.plan.neurons is not None or self._other_shape():
            return self.plan.neurons is not None
        olds, news = (_parts(matrices_in(layer))["down"] for layer in (self.old, self.new))
        pairs = zip(self.plan.kept, news, strict=True)
        return not all(torch.equal(olds[expert], down) for expert, down in pairs)

    def problems(self) -> Iterator[str]:
        """Differences that the plan does not account for."""
        shape = self._other_shape()
        if shape:
            yield shape
            return
        old, new = matrices_in(self.old), matrices_in(self.new)
        olds, news = _parts(old), _parts(new)
        for rank, expert in enumerate(self.plan.kept):
            rows = torch.arange(old.intermediate_size)
            if self.plan.neurons is not None:
                rows = torch.tensor(self.plan.neurons[rank])
            for part, values in olds.items():
                one, other = values[expert], news[part][rank]
                found = _down(one, other) if part == "down" else _rows(one[rows], other)
                if found:
                    yield (
                        f"{self.new.name}: {part} of expert {expert} {found} expert {rank} of the "
                        "pruned model"
                    )

    def _other_shape(self) -> str:
        """How many experts and neurons there are instead of the plan's; empty if it is those."""
        experts, width = len(self.plan.kept), self.plan.narrow_width or self.old.intermediate_size
        there = self.new.num_experts, self.new.intermediate_size
        if there == (experts, width) and self.new.hidden_size == self.old.hidden_size:
            return ""
        return (
            f"{self.new.name}: has {there[0]} experts of {there[1]} neurons, but by the plan "
            f"{experts} of {width}"
        )


def _rows(old: Tensor, new: Tensor) -> str:
    """What differs between the rows, one per neuron, that a plan keeps and those that are there."""
    if old.dtype != new.dtype:
        return f"is {old.dtype}, and {new.dtype} in"
    one, other = (side.reshape(len(old), -1).contiguous().view(torch.uint8) for side in (old, new))
    count = int((one != other).any(dim=1).sum())
    return f"differs in {count} of {len(old)} neurons from" if count else ""


def _down(old: Tensor, new: Tensor) -> str:
    """What cannot be a down projection that was solved again, rounded once to the old dtype."""
    if old.dtype != new.dtype:
        return f"is {old.dtype}, and {new.dtype} in"
    return "" if bool(new.isfinite().all()) else "was solved again, and is not finite in"


def _parts(weights: ExpertWeights) -> dict[str, list[Tensor]]:
    """Part -> of every expert, a row per neuron; but down projections as they are, [H, I]."""
    found = {"down": list(weights.down)}
    for leaf, up, gate in (
        ("", weights.up, weights.gate),
        (" bias", weights.up_bias, weights.gate_bias),
    ):
        if up is None:
            continue
        ups, gates = list(up), [] if gate is None else list(gate)
        if not gates and len(ups[0]) == 2 * weights.intermediate_size:
            gates, ups = _halves(ups, weights.intermediate_size, interleaved=weights.interleaved)
        found |= {f"up{leaf}": ups} | ({f"gate{leaf}": gates} if gates else {})
    return found


def _halves(
    fused: Sequence[Tensor], width: int, *, interleaved: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Gates and ups of matrices that hold both."""
    if interleaved:
        return [rows[0::2] for rows in fused], [rows[1::2] for rows in fused]
    return [rows[:width] for rows in fused], [rows[width:] for rows in fused]
