"""From what ranks have counted to statistics as an offline observation leaves them."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import reap_kernels
from reap_driver.integrations.vllm.ranks import merged
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.served_model import ServedModel
from reap_kernels import LayerStats, SaliencyStats

_NOT_CACHED = (
    "counted from live traffic of vLLM: tokens of prompts whose keys and values were in its prefix "
    "cache are not computed again, so they are not counted"
)


def live_statistics(
    ranks: Sequence[Mapping[str, Any]], status: Mapping[str, Any], model: ServedModel, vllm: str
) -> SaliencyStats:
    """The statistics of all ranks, by the driver's names and with their provenance.

    Args:
        ranks: what `reap_statistics` of each worker answers.
        status: of the observation, see `status.merged_status`.
        model: that is served.
        vllm: the version of vLLM.

    Returns:
        Statistics that `plan`, `report`, `apply` and `merge` take. Groups without a token are left
        out.

    Raises:
        Refused: 409; no token was counted yet.
        DataError: ranks do not fit together, or an expert's output was NaN or Inf.
    """
    whole = merged(ranks)
    groups, layers = whole.groups, whole.layers
    seen = [layer.tokens.tolist() for layer in layers.values()]
    counted = [max(numbers) for numbers in zip(*seen, strict=True)]
    if not any(counted):
        raise Refused(
            409,
            "no token was counted yet; start (POST /reap/start), and send requests whose prompts "
            "are not cached",
        )
    used = [number for number, tokens in enumerate(counted) if tokens]
    targets = [used.index(n) if n in used else None for n in range(len(groups))]
    kept = {}
    for layer in model.layers:
        found = layers.get(model.theirs[layer.name])
        if found is not None and int(found.tokens.sum()):
            kept[layer.name] = found.regrouped(targets, len(used))
            _unscale(kept[layer.name], model.router_weight_scale(layer))
    names = [groups[number] for number in used]
    tokens = next(iter(kept.values())).tokens.tolist()
    stats = SaliencyStats(kept, names, _provenance(kept, names, tokens, status, model, vllm))
    stats.check_finite()
    return stats


def _unscale(layer: LayerStats, scale: float) -> None:
    """Divides the router weights that were summed by a factor that all of them have."""
    if scale != 1.0:
        layer.router_weight_sum.div_(scale)
        layer.weighted_norm_sum.div_(scale)
        layer.weighted_norm_sq_sum.div_(scale * scale)


def _provenance(
    kept: Mapping[str, LayerStats],
    groups: Sequence[str],
    tokens: Sequence[int],
    status: Mapping[str, Any],
    model: ServedModel,
    vllm: str,
) -> dict[str, Any]:
    """What `Observer` records of an offline observation, and what is particular to this one."""
    source = f"vLLM {vllm} live traffic"
    # Not the mode of now, which is `off` once the observation was stopped.
    how = {"mode": " and ".join(status["counted_in"]), "every": status["every"]}
    found: dict[str, Any] = {
        "model": dict(model.record["model"]),
        "layers": {name: model.record["layers"][name] for name in kept},
        "data": [
            {"group": group, "source": source, "tokens": number, "counted_tokens": number, **how}
            for group, number in zip(groups, tokens, strict=True)
        ],
        "gate": "model",
        "software": {
            "reap_kernels": reap_kernels.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "vllm": vllm,
        },
        "backend": "vllm",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "notes": _notes(status),
    }
    unobserved = [name for name in model.theirs if name not in kept]
    return {**found, "unobserved": unobserved} if unobserved else found


def _notes(status: Mapping[str, Any]) -> list[str]:
    notes = [_NOT_CACHED]
    left = {what: n for what, n in status.get("not_counted", {}).items() if n}
    if left:
        each = ", ".join(f"{number} {what}" for what, number in left.items())
        notes.append(f"tokens that vLLM computed and that are not counted: {each}")
    if status.get("every", 1) > 1:
        notes.append(
            f"one step in {status['every']} was observed: {status['observed_steps']} of "
            f"{status['steps']}"
        )
    if any(status.get("masked", {}).values()):
        notes.append(f"experts are masked: {status.get('source') or 'by a mask'}")
    return notes
