"""How closely candidates follow the full model: expected acceptance, on given text.

The fitness of a candidate is the mean over counted next-token predictions of sum over v of
min(p_v, q_v), with p the full model's distribution and q the candidate's, both having read the text
itself: the share of the candidate's tokens that speculative sampling by the full model would
accept (ESAP, arXiv 2603.06003). No checkpoint is written: removed experts are masked in the
routers of the one model in memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.units import in_bytes, short
from reap_driver.data.prefetch import ready_for
from reap_driver.evaluation.predictions import Predictions, counted_targets, predict
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.memory.host import free_host_memory
from reap_driver.memory.machine import free_device_memory
from reap_kernels import compare_logits
from reap_kernels.errors import DataError, ResourceError

# What a cache of logits may take of the memory that is free.
_SHARE = 0.5

Kept = Mapping[str, Sequence[int]]
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Known:
    """One batch and what the full model predicts for it: logits [n, V], log-sum-exp [n] float32."""

    inputs: dict[str, Tensor]
    logits: Tensor
    lse: Tensor


class Fitness:
    """Expected acceptance of candidates on the same batches; the full model runs on them once.

    Its logits are kept as the model gives them, for counted predictions only, with their
    log-sum-exp: on the device where they take at most half of its free memory, else in main memory.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward, as `evaluation.predictions.predict` takes them.
        masks: of this model, where there are any already.
        backend: of `compare_logits`, never falling back.

    Attributes:
        predictions: how many are counted.
        nbytes: what the cache takes.

    Raises:
        DataError: nothing is counted; or the model's own logits are not finite.
        ResourceError: the cache would take more than half of the memory that is free.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Inputs],
        masks: RouterMasks | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        self._model, self._backend = model, backend
        self._masks = RouterMasks(model) if masks is None else masks
        self.predictions = sum(int(counted_targets(inputs).sum()) for inputs in batches)
        if not self.predictions:
            raise DataError(
                f"none of the tokens in {len(batches)} batches is a prediction that counts; give "
                "text of two tokens or more"
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

    def __call__(self, kept: Kept) -> float:
        """The fitness of a candidate, in [0, 1]; 1 where it keeps every expert.

        The device is read once, at the end.

        Args:
            kept: layer -> ids that stay.

        Raises:
            DataError: the candidate's logits are not finite.
            PlanError, UnsupportedModel: see `reap_driver.masked_experts`.
        """
        with self._masks.keeping(kept):
            sums = [self._accepted(known) for known in self._known]
        value = float(torch.stack(sums).sum()) / self.predictions
        if value != value:
            raise DataError(
                "the logits of a candidate are not finite; check the checkpoint's weights, or load "
                "the model in a wider dtype"
            )
        return value

    def _accepted(self, known: _Known) -> Tensor:
        """Sum of the acceptance in a batch, float64 []."""
        found = predict(self._model, known.inputs).logits
        full = known.logits.to(found.device, non_blocking=True)
        lse = known.lse.to(found.device, non_blocking=True)
        compared = compare_logits(full, found, full_lse=lse, backend=self._backend)
        return compared.acceptance.double().sum()


def acceptance_by_sequence(
    model: PreTrainedModel,
    batches: Sequence[Inputs],
    candidates: Sequence[Kept],
    masks: RouterMasks | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Acceptance of candidates, sequence by sequence, without a cache: the full model runs too.

    Args:
        model: the full model, in memory.
        batches: arguments of its forward.
        candidates: layer -> ids that stay, of each.
        masks: of this model, where there are any already.
        backend: of `compare_logits`, never falling back.

    Returns:
        Sums of the acceptance, float64 [candidates, sequences], and how many predictions each sums
        up, int64 [sequences]; sequences of which no prediction counts are left out.
    """
    masks = RouterMasks(model) if masks is None else masks
    sums, counts = [], []
    for inputs in batches:
        full = predict(model, inputs)
        each = [_sums(model, inputs, full, masks, kept, backend) for kept in candidates]
        rows = len(inputs["input_ids"])
        number = torch.bincount(full.sequences.cpu(), minlength=rows)
        sums.append(torch.stack(each)[:, number > 0])
        counts.append(number[number > 0])
    return torch.cat(sums, dim=1), torch.cat(counts)


def _sums(
    model: PreTrainedModel,
    inputs: Inputs,
    full: Predictions,
    masks: RouterMasks,
    kept: Kept,
    backend: str | None,
) -> Tensor:
    """Sums of a candidate's acceptance in each row of a batch, float64 [rows] on the CPU."""
    with masks.keeping(kept):
        found = predict(model, inputs).logits
    compared = compare_logits(full.logits, found, backend=backend)
    accepted = compared.acceptance.double().cpu()
    return torch.bincount(
        full.sequences.cpu(), weights=accepted, minlength=len(inputs["input_ids"])
    )


def _place(nbytes: int, logits: Tensor) -> torch.device:
    """Where the full model's logits are kept.

    Raises:
        ResourceError: they fit nowhere.
    """
    for device in dict.fromkeys([logits.device, torch.device("cpu")]):
        free = free_device_memory(device)
        if free is None or nbytes <= _SHARE * free.nbytes:
            return device
    host = free_host_memory()
    assert host is not None  # or it would have been the place
    raise ResourceError(
        f"the full model's logits take {in_bytes(nbytes)} ({short(nbytes // _row(logits))} "
        f"predictions, {in_bytes(_row(logits))} each), more than half of the "
        f"{in_bytes(host.nbytes)} that are free ({host.bound}); give less data, as SOURCE:N"
    )


def _row(logits: Tensor) -> int:
    """Bytes of a prediction in the cache."""
    return logits.shape[1] * logits.element_size() + 4


def _known(
    inputs: dict[str, Tensor], logits: Tensor, place: torch.device, backend: str | None
) -> _Known:
    """What is kept of a batch."""
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
