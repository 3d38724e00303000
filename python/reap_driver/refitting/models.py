"""Re-fits a pruned model in memory to its original in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compensation.refit import STEPS, check_numbers
from reap_driver.model.discover import find_moe_layers
from reap_driver.model.expert_parts import down_views
from reap_driver.model.unwrap import unwrap_model
from reap_driver.observation.run import BatchList
from reap_driver.refitting.engine import LayerFacts, Refit, refit_layers
from reap_driver.refitting.streams import ResidentModel
from reap_kernels.errors import DataError, PlanError, UsageError

_EVERY = 8  # of the batches, the last of this many is held out


@dataclass(frozen=True)
class RefitModels:
    """The re-fit of a pruned model.

    Attributes:
        layers: {experts module: how its re-fit went}, of all layers that tokens reached.
        matrices: {experts module: new down projections [E, H, I]}, on the pruned model's device, of
            the layers whose re-fit is kept, because it is better on held-out batches.

    Example:
        >>> rd.RefitModels({}, {}).layers
        {}
    """

    layers: dict[str, LayerFacts]
    matrices: dict[str, Tensor]

    @torch.no_grad()
    def install(self, pruned: PreTrainedModel) -> None:
        """Overwrites the down projections of the pruned model in memory.

        Raises:
            PlanError: a layer is not there, or of another shape; nothing is changed then.
            UnsupportedModel: its down projections are computed from other tensors.
        """
        layers = {layer.name: layer for layer in find_moe_layers(unwrap_model(pruned))}
        views = {}
        for name, down in self.matrices.items():
            views[name] = down_views(layers[name]) if name in layers else []
            found = [len(views[name]), *(views[name][0].shape if views[name] else ())]
            if found != list(down.shape):
                raise PlanError(
                    f"{name}: new down projections are {list(down.shape)}, this model has {found} "
                    "there (experts, hidden size, neurons); install them in the pruned model that "
                    "they were made for"
                )
        for name, down in self.matrices.items():
            for view, new in zip(views[name], down, strict=True):
                view.copy_(new)


@typed
def refit_models(
    original: PreTrainedModel,
    pruned: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    held_out: Sequence[bool] | None = None,
    ridge: float | None = None,
    steps: int = STEPS,
    backend: str | None = None,
) -> RefitModels:
    """Solves a pruned model's down projections again, so that it computes more of what its original
    computes.

    Layer by layer, both models run on all batches, the pruned one with the layers before re-fitted.
    With r_t and s_t the residual streams of the original and the pruned model after the layer, and
    g_tj, h_tj the pruned model's router weight and inner activation of token t at expert j, the
    changes D of the layer's down projections minimize

        sum over fitted tokens of ||r_t - s_t - c sum_j D_j g_tj h_tj||^2 + lambda ||c D||^2

    with c the factor by which the layer multiplies the sum of its experts' outputs, mostly 1; see
    `refit_layer` for lambda and how it is solved. A layer whose error on held-out batches would not
    become smaller stays as it is. Neither model changes; `RefitModels.install` puts the result into
    the pruned one.

    Costs about five passes of the batches through the experts of the pruned model, and one through
    the original. Memory: for T tokens of width H, of both models 2 T H numbers in their dtype and,
    while a layer is solved, 4 T H more and T H in float32; and see `refit_layer`.

    Args:
        original, pruned: models in memory, in eval mode; the pruned one lacks experts of the
            original, or neurons of experts, and has the routers of the experts it kept.
        batches: the models' arguments for each batch: `input_ids` [batch, seq] int64, and
            optionally `attention_mask`, `position_ids` and `token_mask` (bool), each [batch, seq].
        held_out: of each batch, whether it is not fitted but chooses the ridge and judges; these
            batches must be like the others, from all domains, or the ridge suits only some. None
            holds out the last of every eight, and of fewer the last: mix domains in batches, or
            shuffle these, before.
        ridge: of all layers, above 0; None chooses one for each layer.
        steps: of conjugate gradients.
        backend: of the products, without fallback; None for the best one.

    Raises:
        CheckpointError: the pruned model is no cut of the original.
        UnsupportedModel: a layer does more with its experts' output than to add a multiple of it to
            the residual stream; or see `observe`.
        DataError: there is no batch, none to fit or none to choose the ridge by; `held_out` has not
            one value per batch; or values are not finite.
        UsageError: the ridge or the number of steps is not possible; or both models are one.

    Example:
        >>> report = rd.apply_plan("MODEL", plan, "unfitted")
        >>> pruned = rd.load_model("unfitted")
        >>> found = rd.refit_models(model, pruned, batches)
        >>> found.install(pruned)
        >>> {name: layer.experts for name, layer in found.layers.items()} == plan.kept
        True
    """
    check_numbers(ridge, steps)
    if unwrap_model(original) is unwrap_model(pruned):
        raise UsageError("original and pruned are one model; give the pruned one as another")
    given = BatchList.checked(batches, None)
    if held_out is None:
        held_out = [number % _EVERY == _EVERY - 1 for number in range(len(batches))]
        held_out[-1] |= not any(held_out)
    if len(held_out) != len(batches):
        raise DataError(
            f"held_out has {len(held_out)} values for {len(batches)} batches; give one for each"
        )
    matrices: dict[str, Tensor] = {}
    refit = Refit(given, range(len(batches)), held_out, matrices.__setitem__, ridge, steps, backend)
    layers = refit_layers(refit, ResidentModel(original), ResidentModel(pruned))
    return RefitModels(layers, matrices)
