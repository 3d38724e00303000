"""Criteria of the user's own: functions of statistics, and plain scores; both are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from reap_driver.planning.criteria import Scores, is_reserved
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import PlanError
from reap_kernels.schema import short

_LONGEST = 100  # characters of a name


def scored_by(
    stats: SaliencyStats,
    criterion: Callable[[LayerStats], Tensor | Sequence[float]],
    name: str | None = None,
) -> Scores:
    """Scores by a function of one layer's statistics; see `reap_driver.score`."""
    if name is None:
        name = str(getattr(criterion, "__name__", type(criterion).__name__)).strip("<>")
    checked_name(name)
    values = {layer: criterion(known.to("cpu")) for layer, known in stats.layers.items()}
    return plain_scores(values, name, stats.provenance, sizes=_sizes(stats))


def plain_scores(
    values: Mapping[str, Tensor | Sequence[float]],
    criterion: str,
    record: Mapping[str, Any],
    *,
    sizes: Mapping[str, int] | None = None,
) -> Scores:
    """Checks scores from elsewhere against the layers of a model.

    Args:
        values: {layer: E finite numbers}, for all layers of the record.
        criterion: name of the criterion in plans, cards and reports.
        record: `model` and `layers`, as the provenance of statistics has them.
        sizes: {layer: E}; by default what the record says.

    Returns:
        {layer: float64 [E]} on the CPU, in the record's order.

    Raises:
        PlanError: they do not fit; the message names criterion, layer and value.
    """
    checked_name(criterion)
    if sizes is None:
        sizes = {name: facts["num_experts"] for name, facts in record["layers"].items()}
    unknown = next((name for name in values if name not in sizes), None)
    missing = next((name for name in sizes if name not in values), None)
    if unknown is not None or missing is not None:
        what = f"scores no layer {missing!r}" if unknown is None else f"names the layer {unknown!r}"
        raise PlanError(
            f"criterion {criterion!r} {what}, but the model's {len(sizes)} MoE layers are "
            f"{short(list(sizes))}; give each of them scores, and no other"
        )
    found = {name: _layer_scores(values[name], name, criterion) for name in sizes}
    check_scores(found, criterion, sizes)
    return Scores(found, criterion=criterion, provenance=record)


def check_scores(scores: Mapping[str, Tensor], criterion: str, sizes: Mapping[str, int]) -> None:
    """Checks that every expert has one finite score.

    Raises:
        PlanError: naming criterion and layer.
    """
    for name, experts in sizes.items():
        values = scores[name]
        if tuple(values.shape) != (experts,):
            raise PlanError(
                f"criterion {criterion!r} gives layer {name} scores of shape "
                f"{list(values.shape)}; expected [{experts}], one for each expert"
            )
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise PlanError(
                f"criterion {criterion!r} gives expert {bad[0]} of layer {name} the score "
                f"{float(values[bad[0]])}; scores must be finite numbers"
            )


def check_decides(scores: Mapping[str, Tensor], criterion: str, names: Sequence[str]) -> None:
    """Checks that the scores, not the ids of experts, decide which are removed.

    Args:
        scores: {layer: [E]}.
        criterion: for the message.
        names: layers that lose experts.

    Raises:
        PlanError: all experts of a layer have the same score.
    """
    for name in names:
        values = scores[name]
        if len(values) > 1 and bool((values == values[0]).all()):
            raise PlanError(
                f"criterion {criterion!r} gives all {len(values)} experts of layer {name} the "
                f"score {float(values[0]):g}, so nothing but their ids would decide which go; use "
                "another criterion, or more data"
            )


def checked_name(name: str) -> None:
    """Checks a name that a user gives a criterion.

    Raises:
        PlanError: it is not a short text of one line, or it is the name of a criterion here.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _LONGEST:
        raise PlanError(
            f"criterion {short(name)} is no name; give a text in one line of at most {_LONGEST} "
            "characters"
        )
    if is_reserved(name):
        raise PlanError(
            f"criterion {name!r} is the name of one of this package; call your own another"
        )


def _sizes(stats: SaliencyStats) -> dict[str, int]:
    return {name: layer.num_experts for name, layer in stats.layers.items()}


def _layer_scores(values: Any, name: str, criterion: str) -> Tensor:
    """Scores of one layer as float64, of whatever shape."""
    import torch

    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise PlanError(
            f"criterion {criterion!r} gives layer {name} {short(values)}, which are no numbers; "
            "give a tensor [E] or a list"
        ) from error
