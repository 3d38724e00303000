"""The fitness of a candidate: its expected acceptance by the full model, on given text.

Expected acceptance is the mean, over the counted next-token predictions, of sum over v of
min(p_v, q_v), where p is the full model's distribution and q the candidate's, with teacher forcing:
the share of the candidate's tokens that speculative sampling with the full model as the target
would accept (ESAP, arXiv 2603.06003). No checkpoint is written: a candidate is a context in which
the full model in memory computes what the pruned one would (`RouterMasks.keeping` for budgets,
`PlannedModel.active` for plans that remove neurons).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.units import in_bytes, short
from reap_driver.data.prefetch import ready_for
from reap_driver.evaluation.predictions import Predictions, counted_targets, predict
from reap_driver.memory.host_memory import free_host_memory
from reap_driver.memory.machine import free_device_memory
from reap_kernels import compare_logits
from reap_kernels.errors import DataError, ResourceError

# Largest share of the free memory that the cached logits may use.
_SHARE = 0.5

# Opens the context in which the model computes what a candidate computes.
Candidate = Callable[[], AbstractContextManager[Any]]
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Known:
    """A batch with the full model's logits [n, V] and their log-sum-exp [n] float32."""

    inputs: dict[str, Tensor]
    logits: Tensor
    lse: Tensor


class Fitness:
    """Expected acceptance of candidates on fixed batches; the full model runs on each batch once.

    The full model's logits of the counted predictions are cached in the model's dtype, with their
    log-sum-exp: on the device if they take at most half of its free memory, else in main memory.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward, as `evaluation.predictions.predict` takes them.
        backend: backend of `compare_logits`, without fallback; None for the best one.

    Attributes:
        predictions: number of counted predictions.
        nbytes: bytes of the cached logits.

    Raises:
        DataError: no prediction is counted, or the full model's logits are not finite.
        ResourceError: the logits would take more than half of the free memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Inputs],
        *,
        backend: str | None = None,
    ) -> None:
        self._model, self._backend = model, backend
        self.predictions = sum(int(counted_targets(inputs).sum()) for inputs in batches)
        if not self.predictions:
            raise DataError(
                f"the {len(batches)} batches contain no prediction that counts; give text of at "
                "least two tokens"
            )
        self._known: list[_Known] = []
        self.nbytes = 0
        place: torch.device | None = None
        for inputs in batches:
            ready = ready_for(dict(inputs), model.device)
            logits = predict(model, ready).logits
            if place is None:
                size = logits.shape[1] * logits.element_size() + 4
                place = _place(self.predictions * size, logits)
            self._known.append(_known(ready, logits, place, backend))
            self.nbytes += sum(t.nbytes for t in (self._known[-1].logits, self._known[-1].lse))

    def __call__(self, candidate: Candidate) -> float:
        """The fitness of a candidate, in [0, 1]; 1 if it computes what the full model does.

        Synchronizes with the device once, at the end.

        Raises:
            DataError: the candidate's logits are not finite.
            PlanError, UnsupportedModel: see `reap_driver.masked_experts`.
        """
        with candidate():
            sums = [self._accepted(known) for known in self._known]
        value = float(torch.stack(sums).sum()) / self.predictions
        if value != value:
            raise DataError(
                "the logits of a candidate are not finite; check the checkpoint's weights, or load "
                "the model in a wider dtype"
            )
        return value

    def _accepted(self, known: _Known) -> Tensor:
        """Sum of the acceptance over a batch, float64 []."""
        found = predict(self._model, known.inputs).logits
        full = known.logits.to(found.device, non_blocking=True)
        lse = known.lse.to(found.device, non_blocking=True)
        compared = compare_logits(full, found, full_lse=lse, backend=self._backend)
        return compared.acceptance.double().sum()


def acceptance_by_sequence(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    candidates: Sequence[Candidate],
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Acceptance of candidates per sequence. Caches nothing: the full model runs on every batch.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward.
        candidates: opened for every batch.
        backend: backend of `compare_logits`, without fallback; None for the best one.

    Returns:
        The summed acceptance, float64 [candidates, sequences], and the number of counted
        predictions, int64 [sequences]; sequences without any are left out.
    """
    sums, counts = [], []
    for inputs in batches:
        full = predict(model, inputs)
        each = [_sums(model, inputs, full, candidate, backend) for candidate in candidates]
        rows = len(inputs["input_ids"])
        number = torch.bincount(full.sequences.cpu(), minlength=rows)
        sums.append(torch.stack(each)[:, number > 0])
        counts.append(number[number > 0])
    return torch.cat(sums, dim=1), torch.cat(counts)


def _sums(
    model: PreTrainedModel,
    inputs: Inputs,
    full: Predictions,
    candidate: Candidate,
    backend: str | None,
) -> Tensor:
    """A candidate's summed acceptance per sequence of a batch, float64 [sequences], on the CPU."""
    with candidate():
        found = predict(model, inputs).logits
    compared = compare_logits(full.logits, found, backend=backend)
    accepted = compared.acceptance.double().cpu()
    return torch.bincount(
        full.sequences.cpu(), weights=accepted, minlength=len(inputs["input_ids"])
    )


def _place(nbytes: int, logits: Tensor) -> torch.device:
    """The device that caches the full model's logits.

    Raises:
        ResourceError: neither the model's device nor main memory has enough free memory.
    """
    for device in dict.fromkeys([logits.device, torch.device("cpu")]):
        free = free_device_memory(device)
        if free is None or nbytes <= _SHARE * free.nbytes:
            return device
    host = free_host_memory()
    raise ResourceError(
        f"the full model's logits take {in_bytes(nbytes)} ({short(nbytes // _row(logits))} "
        f"predictions, {in_bytes(_row(logits))} each), more than half of the "
        f"{in_bytes(host.nbytes)} that are free ({host.bound}); use less data, `data` SOURCE:N"
    )


def _row(logits: Tensor) -> int:
    """Bytes per prediction in the cache."""
    return logits.shape[1] * logits.element_size() + 4


def _known(
    inputs: dict[str, Tensor], logits: Tensor, place: torch.device, backend: str | None
) -> _Known:
    """A batch with the full model's logits, on the device `place`."""
    lse = compare_logits(logits, logits, backend=backend).full_lse
    if not bool(lse.isfinite().all()):
        raise DataError(
            "the logits of the full model are not finite; check the checkpoint's weights, or load "
            "the model in a wider dtype"
        )
    if place == logits.device:
        return _Known(inputs, logits.contiguous(), lse)
    kept = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (logits, lse)]
    return _Known(inputs, kept[0].copy_(logits), kept[1].copy_(lse))
