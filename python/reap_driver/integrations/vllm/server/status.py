"""What the workers say of their observation and their masks, as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import reap_kernels
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_driver.integrations.vllm.server.served_model import ServedModel


@dataclass(frozen=True)
class Vllm:
    """The vLLM of this server.

    Attributes:
        version: of it.
        note: what to know of this version, or None.
    """

    version: str
    note: str | None = None


def merged_status(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The status of all ranks; each masks the layers that it holds. `error` says why an observation
    has ended itself, on the first rank where it has.

    Raises:
        Refused: 503; ranks do not do the same.
    """
    first, error = ranks[0], None
    for number, rank in enumerate(ranks):
        if rank.get("error") and error is None:
            where = f"rank {number}: " if len(ranks) > 1 else ""
            error = f"{where}{rank['error']}"
        for what in ("mode", "every"):
            if rank[what] != first[what]:
                raise Refused(
                    503,
                    f"{what} is {rank[what]!r} on rank {number} and {first[what]!r} on rank 0; "
                    "stop and start again (POST /reap/stop, POST /reap/start)",
                )
    masked: dict[str, list[int]] = {}
    for rank in ranks:
        masked |= {name: list(ids) for name, ids in rank["masked"].items() if ids}
    return {**first, "masked": masked, "error": error}


def shown_status(status: Mapping[str, Any], model: ServedModel, vllm: Vllm) -> dict[str, Any]:
    """A status as `GET /reap/status` answers it.

    Args:
        status: see `merged_status`.
        model: that is served.
        vllm: that of this server.
    """
    tokens = {group: int(number) for group, number in status["tokens"].items()}
    removed = masked_of(status, model)
    layers = {}
    for layer in model.layers:
        said = model.facts[layer.name]
        reasons = {key: str(said[key]) for key in ("refusal", "mask_refusal") if said.get(key)}
        gone = len(removed.get(layer.name, ()))
        facts = {"num_experts": layer.num_experts, "top_k": layer.top_k, "masked": gone}
        layers[layer.name] = {**facts, **reasons}
    return {
        "model": model.name,
        "version": reap_kernels.__version__,
        "vllm": vllm.version,
        "note": vllm.note,
        "mode": status["mode"],
        "every": status["every"],
        "groups": tokens,
        "tokens": sum(tokens.values()),
        "not_counted": dict(status.get("not_counted", {})),
        "steps": status["steps"],
        "observed_steps": status["observed_steps"],
        "error": status["error"],
        "mask": _mask(removed, status, model),
        "layers": layers,
    }


def masked_of(status: Mapping[str, Any], model: ServedModel) -> dict[str, list[int]]:
    """{layer: ids of masked experts}, by the driver's names, in the model's order."""
    masked = status["masked"]
    pairs = ((ours, masked.get(theirs)) for ours, theirs in model.theirs.items())
    return {ours: sorted(ids) for ours, ids in pairs if ids}


def _mask(
    removed: Mapping[str, Sequence[int]], status: Mapping[str, Any], model: ServedModel
) -> dict[str, Any] | None:
    """The mask in force, in numbers; None without one."""
    if not removed:
        return None
    return {
        "experts": sum(map(len, removed.values())),
        "layers": len(removed),
        "of": sum(layer.num_experts for layer in model.layers),
        "source": status.get("source") or "",
    }
