"""Compares the predictions of pruned models and their original on the same batches, without
keeping their logits.

Models in memory, and plans that are put into the original, run one after the other on each
batch; the original runs once, however many pruned models there are. Streamed models run one after
the other on all batches, layer by layer; of each, the hidden states behind its last decoder layer
are kept ([batch, seq, hidden], much smaller than the logits). Then all models' heads run on one
batch at a time.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.base.interrupts import Stop
from reap_driver.data.prefetch import prefetched, ready_for
from reap_driver.evaluation.compensation import PlannedModel
from reap_driver.evaluation.figures import DRAWS
from reap_driver.evaluation.predictions import Predictions, predict
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.evaluation.sequences import Comparison, Sums
from reap_driver.load.streamed_model import StreamedModel
from reap_driver.model.unwrap import unwrap_model
from reap_driver.observation.layer_runner import LayerRunner
from reap_driver.observation.run import Batches, BatchList, Run, run_streamed
from reap_driver.observation.state_store import StateStore
from reap_driver.planning.plan import Plan
from reap_kernels.errors import UsageError

Done = Callable[[float], Any]


class InMemory(Protocol):
    """A pruned model that another model in memory becomes for a while."""

    @property
    def model(self) -> PreTrainedModel:
        """The model that is run."""
        ...

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which that model is the pruned one."""
        ...


@typed
def compare_models(
    original: PreTrainedModel,
    pruned: PreTrainedModel | Plan,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    groups: Sequence[str] | None = None,
    matrices: Mapping[str, Tensor] | str | Path | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    backend: str | None = None,
) -> Comparison:
    """Compares a pruned model's next-token predictions with those of its original.

    Both models run on each batch, one after the other; memory holds the logits of one batch.

    Args:
        original: a model in memory, in eval mode.
        pruned: a model in memory with the same vocabulary, in eval mode; or a plan, which is
            put into `original` in memory.
        batches: the models' arguments for each batch: `input_ids` [batch, seq] int64, and
            optionally `attention_mask`, `position_ids` and `token_mask` (bool), each [batch, seq];
            `reap_driver.evaluation.predictions.counted_targets` says which predictions count.
        groups: the calibration group of each batch; None puts all batches in one group.
        matrices: of a plan that changes experts it keeps: {layer: [E', H, I']} or their folder; see
            `compensated`.
        draws: samples of the bootstrap that gives the 95 % intervals.
        seed: seed of the bootstrap.
        backend: backend of `reap_kernels.compare_logits`; None chooses one, and a backend that is
            named is never replaced by another.

    Returns:
        The comparison: perplexity of both models, KL divergence in nats, expected acceptance and
        the share of equal most likely tokens, overall and per group.

    Raises:
        DataError: no prediction counts, logits are not finite, or the number of groups is not the
            number of batches.
        ShapeError: the models' vocabularies differ in size.
        PlanError: the plan or its matrices do not fit the model; see `compensated`.
        UsageError: matrices are given without a plan.
        UnsupportedModel: a model without a language model head, or whose routers cannot be masked.

    Example:
        >>> found = rd.compare_models(model, plan, batches)
        >>> found.overall.predictions, found.overall.kl.value > 0
        (252, True)
    """
    original = unwrap_model(original)
    given = BatchList.checked(batches, groups)
    if not isinstance(pruned, Plan):
        if matrices is not None:
            raise UsageError("compare_models: matrices go with a plan; a model has its own weights")
        other: PreTrainedModel | InMemory = unwrap_model(pruned)
    else:
        other = PlannedModel(RouterMasks(original), pruned, matrices)
    [sums] = compare_resident(original, [other], given, range(len(batches)), backend=backend)
    return sums.comparison(draws, seed)


def compare_resident(
    original: PreTrainedModel,
    pruned: Sequence[PreTrainedModel | InMemory],
    batches: Batches,
    numbers: Sequence[int],
    *,
    backend: str | None = None,
    done: Done = lambda _: None,
) -> list[Sums]:
    """Like `compare_models`, for several pruned models; calls `done` with each completed share of
    the work.
    """
    sums = [Sums(backend) for _ in pruned]
    inputs = prefetched(map(batches.inputs, numbers), original.device)
    share = 1 / (len(numbers) * len(pruned))
    with contextlib.closing(inputs):
        for number, batch in zip(numbers, inputs, strict=True):
            full = predict(original, batch)
            for one, own in zip(pruned, sums, strict=True):
                if isinstance(one, PreTrainedModel):
                    found = predict(one, batch)
                else:
                    with one.active():
                        found = predict(one.model, batch)
                own.add(batches.group(number), batch, full, found)
                done(share)
    return sums


def compare_streamed(
    models: Sequence[StreamedModel],
    stores: Sequence[StateStore],
    batches: Batches,
    numbers: Sequence[int],
    *,
    backend: str | None = None,
    done: Done = lambda _: None,
) -> list[Sums]:
    """Like `compare_resident`, with all models streamed from disk, one after the other.

    Args:
        models: the original and the pruned models, from `open_streamed`.
        stores: where each model's hidden states are kept between two layers.
        batches: what the models run on.
        numbers: which of the batches.
        backend: backend of `reap_kernels.compare_logits`.
        done: called with each completed share of the work.

    Raises:
        DataError, ShapeError, UnsupportedModel: see `compare_models`.
        CheckpointError: a checkpoint cannot be read.
    """
    for streamed, store in zip(models, stores, strict=True):
        run = Run(
            _Predictor(streamed.model),
            batches,
            numbers,
            Stop(),
            done=lambda share: done(share / len(models)),
        )
        run_streamed(run, streamed, store)
    sums = [Sums(backend) for _ in models[1:]]
    with contextlib.ExitStack() as stack:
        runners = [LayerRunner(streamed.text_layers) for streamed in models]
        for runner in runners:
            stack.enter_context(runner.bound())
        for number in numbers:
            inputs = ready_for(batches.inputs(number), stores[0].device)
            each = zip(runners, models, stores, strict=True)
            full = _head_predictions(*next(each), number, inputs)
            for own, which in zip(sums, each, strict=True):
                found = _head_predictions(*which, number, inputs)
                own.add(batches.group(number), inputs, full, found)
    return sums


def _head_predictions(
    runner: LayerRunner,
    streamed: StreamedModel,
    store: StateStore,
    number: int,
    inputs: Mapping[str, Tensor],
) -> Predictions:
    """Predictions of a model for a batch whose hidden states behind the last layer are stored."""
    found: list[Predictions] = []
    state = store.get(number, None)
    runner.run(
        len(streamed.text_layers), lambda: found.append(predict(streamed.model, inputs)), state
    )
    return found[0]


class _Predictor:
    """What `run_streamed` calls in place of an observer: it predicts and counts nothing."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> "_Predictor":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @contextlib.contextmanager
    def group(self, name: str) -> Iterator[None]:
        """Does nothing: predictions do not depend on the group."""
        yield

    def __call__(self, **inputs: Tensor) -> Predictions:
        """Runs the model on a batch."""
        return predict(self.model, inputs)
