"""Runs one decoder layer of both models on all batches, and collects what its re-fit needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reap_driver.compensation.pilot import RefitSums
from reap_driver.model.discover import MoELayer
from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.data_parallel import Ranks
from reap_driver.refitting.capture import CapturingObserver, no_sums, rows_of
from reap_driver.refitting.row_store import RowStore
from reap_driver.refitting.scale import factor_of, perturbation, response
from reap_driver.refitting.streams import Stream, hidden_of, with_hidden
from reap_kernels import LayerGram
from reap_kernels.errors import UnsupportedModel


@dataclass
class LayerPass:
    """One decoder layer of the original (`full`) and of the pruned model (`cut`), on all batches.

    Attributes:
        layer, name: index and name of the decoder layer.
        full, cut: the models.
        experts: the MoE layers in it.
        held_out: of each batch of this process.
        rows: what the experts were given, of all batches.
        reached: name of the MoE layer that this process's batches reached; None before one did.
    """

    layer: int
    name: str
    full: Stream
    cut: Stream
    experts: Sequence[MoELayer]
    held_out: Sequence[bool]
    rows: RowStore
    reached: str | None = None
    _sums: dict[str, RefitSums] = field(default_factory=dict)
    _tokens: list[int] = field(default_factory=lambda: [0, 0])
    _response: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    _dtype: torch.dtype = torch.float32

    @property
    def observer(self) -> CapturingObserver:
        """That of the pruned model."""
        assert isinstance(self.cut.observer, CapturingObserver)
        return self.cut.observer

    def run(
        self, place: int, inputs: Mapping[str, Tensor], number: int, following: int | None
    ) -> None:
        """Runs the layer of both models on a batch.

        Args:
            place: of the batch among those of this process.
            inputs: the batch.
            number: its number.
            following: that of the next batch.

        Raises:
            UnsupportedModel: its experts cannot be re-fitted.
        """
        states = [stream.store.get(number, following) for stream in (self.full, self.cut)]
        first = place == 0 and bool(self.experts)
        before = states[1].moved(torch.clone) if first and states[1] is not None else states[1]
        self.observer.sums = lambda name, device: self._gram(name, device, place)
        full, cut = (
            stream.run(self.layer, inputs, state)
            for stream, state in zip((self.full, self.cut), states, strict=True)
        )
        calls = self.observer.take()
        self.full.store.put(number, states[0] if full is None else full)
        if not calls:
            self._reach(None, place)
            self.cut.store.put(number, states[1] if cut is None else cut)
            return
        if full is None or cut is None or len(calls) > 1:
            raise self._refusal("some batches reach several of its experts modules, or one model")
        [(name, call)] = calls.items()
        self._reach(name, place)
        hidden, target = hidden_of(cut, self.name), hidden_of(full, self.name)
        self._dtype = hidden.dtype
        missing = (target.float() - hidden.float()).flatten(0, 1)
        rows = rows_of(name, call, missing, held_out=self.held_out[place])
        self.rows.add(place, rows, cut, target)
        self._tokens[rows.held_out] += rows.tokens
        if first:
            self._probe(inputs, before, hidden.flatten(0, 1))

    def agreed(self, world: Ranks) -> tuple[str | None, Tensor, tuple[int, int]]:
        """What all ranks have found. A collective operation.

        Returns:
            The MoE layer that batches reached, None if none did; sums of the response to a
            perturbation, see `response`; and tokens that are fitted, and held out.

        Raises:
            UnsupportedModel: batches reached several.
        """
        names = [moe.name for moe in self.experts]
        found = [float(name == self.reached) for name in names]
        counts = torch.tensor([*found, *self._tokens], dtype=torch.float64)
        world.total([counts, self._response])
        reached = [name for name, count in zip(names, counts.tolist(), strict=False) if count]
        if len(reached) > 1:
            raise self._refusal("ranks reach several of its experts modules")
        fitted, held_out = (int(count) for count in counts[len(names) :])
        return (reached[0] if reached else None), self._response, (fitted, held_out)

    def factor(self, response: Tensor) -> float:
        """By which the layer multiplies the output of its experts; see `factor_of`."""
        return factor_of(self.name, response, self._dtype)

    def sums(self, name: str, device: torch.device) -> RefitSums:
        """The Gram matrices of an MoE layer."""
        if name not in self._sums:
            moe = next(moe for moe in self.experts if moe.name == name)
            sizes = moe.num_experts, moe.intermediate_size
            self._sums[name] = RefitSums(*sizes, self.held_out, device)
        return self._sums[name]

    def advance(self, numbers: Sequence[int], *, kept: bool) -> None:
        """Puts the states of the pruned model after the layer, with its re-fit where it is kept.

        They are those of the solution before it is rounded to the weights' dtype, as no further
        pass is needed for these; in bfloat16 the errors of the rounded one differ by 0.2 %.
        """
        for place, number in enumerate(numbers):
            state, target = self.rows.states(place)
            if kept:
                left = self.rows[place].missing.view(target.shape)
                state = with_hidden(state, (target.float() - left).to(target.dtype), self.name)
            self.cut.store.put(number, state)

    def _gram(self, name: str, device: torch.device, place: int) -> LayerGram | None:
        return self.sums(name, device).of(place)

    def _reach(self, name: str | None, place: int) -> None:
        """Notes which experts a batch reached."""
        if place and name != self.reached:
            raise self._refusal("some batches reach its experts, and some do not")
        self.reached = name

    def _probe(
        self, inputs: Mapping[str, Tensor], before: BatchState | None, hidden: Tensor
    ) -> None:
        """Runs the pruned layer again on a batch, with something added to its experts' output."""
        observer = self.observer
        added = perturbation(hidden)
        observer.sums, observer.added = no_sums, added
        try:
            after = self.cut.run(self.layer, inputs, before)
        finally:
            observer.added = None
            observer.take()
        assert after is not None  # as it ran before
        changed = hidden_of(after, self.name).flatten(0, 1)
        self._response = response(added, hidden, changed)

    def _refusal(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.name}: {why}, so what its experts lack is not known; use the model as it was "
            "pruned"
        )
