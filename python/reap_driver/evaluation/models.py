"""Runs two models on the same batches and compares their predictions; no logits are kept.

Models in memory, or one and a plan that masks its routers, run on a batch one after the other.
Streamed models run one after the other on all batches, layer by layer, and what waits of either is
what its last decoder layer returned: as wide as the model, not as its vocabulary. Their heads then
run on a batch one after the other.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.base.interrupts import Stop
from reap_driver.data.prefetch import prefetched, ready_for
from reap_driver.evaluation.figures import DRAWS
from reap_driver.evaluation.predictions import Predictions, predict
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.evaluation.sequences import Comparison, Sums
from reap_driver.load.checkpoint import StreamedModel
from reap_driver.model.plain_model import plain_model
from reap_driver.observation.layer_runner import LayerRunner
from reap_driver.observation.observer import Observer
from reap_driver.observation.run import Batches, Given, Run, observe_streamed
from reap_driver.observation.state_store import StateStore
from reap_driver.plan.plan import Plan

Done = Callable[[float], Any]


@typed
def compare(
    original: PreTrainedModel,
    pruned: PreTrainedModel | Plan,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    groups: Sequence[str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    backend: str | None = None,
) -> Comparison:
    """Compares a pruned model's next-token predictions with the original's, on the same text.

    Args:
        original: in memory, in eval mode.
        pruned: likewise, of the same vocabulary; or a plan, which is applied to the original by
            masking its routers.
        batches: what `observe` takes: `input_ids` [batch, seq] int64 and what goes with them; see
            `reap_driver.evaluation.predictions.counted_targets` for what counts.
        groups: calibration group of each batch; default one for all.
        draws: of the bootstrap that intervals come from.
        seed: of the bootstrap.
        backend: of `compare_logits`, never falling back.

    Raises:
        DataError: nothing counts, logits are not finite, or not one group for each batch.
        ShapeError: the models' vocabularies differ.
        PlanError, UnsupportedModel: see `masked_experts` and `predict`.
    """
    original = plain_model(original)
    pruned = pruned if isinstance(pruned, Plan) else plain_model(pruned)
    given = Given.checked(batches, groups)
    sums = compare_resident(original, pruned, given, range(len(batches)), backend=backend)
    return sums.comparison(draws, seed)


def compare_resident(
    original: PreTrainedModel,
    pruned: PreTrainedModel | Plan,
    batches: Batches,
    numbers: Sequence[int],
    *,
    backend: str | None = None,
    done: Done = lambda _: None,
) -> Sums:
    """See `compare`; `done` is called with the share of the work that was just done."""
    sums = Sums(backend)
    masks = RouterMasks(original) if isinstance(pruned, Plan) else None
    inputs = prefetched(map(batches.inputs, numbers), original.device)
    with contextlib.closing(inputs):
        for number, batch in zip(numbers, inputs, strict=True):
            full = predict(original, batch)
            if isinstance(pruned, Plan):
                assert masks is not None
                with masks.keeping(pruned.kept):
                    found = predict(original, batch)
            else:
                found = predict(pruned, batch)
            sums.add(batches.group(number), batch, full, found)
            done(1 / len(numbers))
    return sums


def compare_streamed(
    models: Sequence[StreamedModel],
    stores: Sequence[StateStore],
    batches: Batches,
    numbers: Sequence[int],
    *,
    backend: str | None = None,
    done: Done = lambda _: None,
) -> Sums:
    """The same with the original and the pruned model streamed, one after the other.

    Args:
        models: original and pruned, as `open_streamed` has them.
        stores: where the states of each wait.
        batches: as for `compare`.
        numbers: of the batches.
        backend: of `compare_logits`.
        done: called with the share of the work that was just done.

    Raises:
        As `compare`; and as `reap_driver.observation.streamed.observe_streamed`.
    """
    for streamed, store in zip(models, stores, strict=True):
        # The run asks of its observer to be entered and called, no more.
        observer = cast(Observer, _Predictor(streamed.model))
        run = Run(observer, batches, numbers, Stop(), done=lambda share: done(share / 2))
        observe_streamed(run, streamed, store)
    sums = Sums(backend)
    with contextlib.ExitStack() as stack:
        runners = [LayerRunner(streamed.text_layers) for streamed in models]
        for runner in runners:
            stack.enter_context(runner.bound())
        for number in numbers:
            inputs = ready_for(batches.inputs(number), stores[0].device)
            found = [
                _behind_layers(runner, streamed, store, number, inputs)
                for runner, streamed, store in zip(runners, models, stores, strict=True)
            ]
            sums.add(batches.group(number), inputs, *found)
    return sums


def _behind_layers(
    runner: LayerRunner,
    streamed: StreamedModel,
    store: StateStore,
    number: int,
    inputs: Mapping[str, Tensor],
) -> Predictions:
    """What a model predicts once its layers have run."""
    found: list[Predictions] = []
    state = store.get(number, None)
    runner.run(
        len(streamed.text_layers), lambda: found.append(predict(streamed.model, inputs)), state
    )
    return found[0]


class _Predictor:
    """A model as a run of layers drives it: predictions in place of observation."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> "_Predictor":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    @contextlib.contextmanager
    def group(self, _: str) -> Iterator[None]:
        """Nothing depends on it."""
        yield

    def __call__(self, **inputs: Tensor) -> Predictions:
        """Runs the model on a batch."""
        return predict(self.model, inputs)
