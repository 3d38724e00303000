"""The model that a server runs: how vLLM's MoE layers and those of the driver are the same."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.model.discover import MoELayer
from reap_driver.planning.selection import layer_number
from reap_driver.workflow.inspection import inspect_model
from reap_kernels.errors import CheckpointError, UnsupportedModel

# Facts that both sides state, and that must agree; kernels may pad the width of experts, so that is
# not compared.
_AGREE = ("num_experts", "top_k", "n_group", "topk_group", "hidden_size")


@dataclass(frozen=True)
class ServedModel:
    """A model, as the driver and as vLLM know it.

    Attributes:
        name: path or hub id.
        layers: MoE layers, by the driver's names, in the model's order.
        record: `model` and `layers`, as the provenance of statistics has them.
        theirs: the driver's name of a layer -> vLLM's.
        facts: the driver's name of a layer -> what vLLM's workers say of it.
    """

    name: str
    layers: Sequence[MoELayer]
    record: Mapping[str, Any]
    theirs: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]

    @property
    def ours(self) -> dict[str, str]:
        """vLLM's name of a layer -> the driver's."""
        return {theirs: ours for ours, theirs in self.theirs.items()}

    def router_weight_scale(self, layer: MoELayer) -> float:
        """What vLLM's workers multiply router weights of a layer by, that transformers does not.

        Both scale the sum of a layer's experts, transformers either in its router or, where
        `MoELayer.scale` is not 1, after them; vLLM's workers count router weights with it.

        Raises:
            UnsupportedModel: the two do not scale by the same factor.
        """
        here, there = layer.scale, float(self.facts[layer.name].get("scale", 1.0))
        if here == 1.0 or there == 1.0:
            return 1.0
        if not math.isclose(here, there, rel_tol=1e-6):
            raise UnsupportedModel(
                f"layer {layer.name}: vLLM multiplies its experts' sum by {there:g}, transformers "
                f"by {here:g}, so statistics of the two would not be alike; use `reap-kernels "
                "observe` for this model"
            )
        return here

    def refusals(self, fact: str) -> dict[str, str]:
        """{layer: why} of the layers that cannot be observed (`refusal`) or masked
        (`mask_refusal`).
        """
        return {name: str(said[fact]) for name, said in self.facts.items() if said.get(fact)}


def served_model(
    name: str,
    revision: str | None,
    ranks: Sequence[Mapping[str, Any]],
    *,
    trust_remote_code: bool = False,
) -> ServedModel:
    """Reads a model's configuration, and finds its layers among those of vLLM's workers.

    Args:
        name: path or hub id of the model.
        revision: of a hub id; None for its newest.
        ranks: what `reap_facts` of each worker says.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError, UnsupportedModel: there is no such model, the driver does not know it, or
            vLLM's layers are not the driver's.
    """
    place = name if revision is None or Path(name).exists() else _snapshot(name, revision)
    model = inspect_model(place, trust_remote_code=trust_remote_code)
    facts: dict[str, Mapping[str, Any]] = {}
    for rank in ranks:
        facts.update(rank["layers"])
    theirs = paired([layer.name for layer in model.layers], list(facts))
    record = {**model.provenance, "model": {**model.provenance["model"], "id": name}}
    known = {ours: facts[name] for ours, name in theirs.items()}
    for layer in model.layers:
        _check_facts(layer, known[layer.name])
    return ServedModel(name, model.layers, record, theirs, known)


def paired(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """The driver's name of each layer -> vLLM's: the same, or that with the same number.

    Raises:
        UnsupportedModel: a layer of one side has none, or several, on the other.

    Example:
        >>> paired(["model.layers.3.mlp.experts"], ["language_model.model.layers.3.mlp.experts"])
        {'model.layers.3.mlp.experts': 'language_model.model.layers.3.mlp.experts'}
    """
    found: dict[str, str] = {name: name for name in ours if name in theirs}
    left = [name for name in theirs if name not in found]
    for name in ours:
        if name in found:
            continue
        number = layer_number(name)
        same = [other for other in left if number is not None and layer_number(other) == number]
        twins = [other for other in ours if layer_number(other) == number]
        if len(same) != 1 or len(twins) != 1:
            what = "none" if not same else f"{', '.join(same)}"
            raise UnsupportedModel(
                f"layer {name}: which of vLLM's MoE layers it is cannot be told by its number "
                f"({what} may be); statistics and masks of this model need another way to it, such "
                "as `reap-kernels observe`"
            )
        found[name] = same[0]
        left.remove(same[0])
    if left:
        raise UnsupportedModel(
            f"layer {left[0]}: vLLM runs it as a MoE layer, but the model that transformers builds "
            f"from the configuration has no such layer (it has {len(ours)}, the first {ours[0]}); "
            "use `reap-kernels observe` for this model"
        )
    return {name: found[name] for name in ours}


def _check_facts(layer: MoELayer, facts: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel where vLLM routes otherwise than the configuration says."""
    for fact in _AGREE:
        here = getattr(layer, fact)
        there = facts.get(fact)
        if there is None or (fact in ("n_group", "topk_group") and layer.n_group <= 1 >= there):
            continue
        if there != here:
            raise UnsupportedModel(
                f"layer {layer.name}: {fact} is {there} in vLLM and {here} by the checkpoint's "
                "configuration; start the server without options that change the model "
                "(--hf-overrides), and without shared experts among the routed ones"
            )


def _snapshot(name: str, revision: str) -> str:
    """The folder of a revision in the hub's cache, which vLLM has filled."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:  # base classes of the hub's errors
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name} at {revision}: is not in the hub's cache ({reason}); download it there, or "
            "serve a folder"
        ) from error
    return str(found)
