"""Finds and describes the MoE layers of a model, and refuses those that cannot be observed
exactly.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.model_config import digest_of, identifying_fields
from reap_driver.compat.mtp_layer import mtp_layers
from reap_driver.model.adapters import ADAPTERS, Adapter
from reap_driver.model.adapters.expert_parallel import ExpertSlice
from reap_driver.model.unwrap import unwrap_model
from reap_kernels.errors import UnsupportedModel

# Models that have experts which must not be ranked or removed, and why.
_REFUSED = {
    "jetmoe": "its attention is a mixture of experts that shares the feed-forward layers' count",
    "switch_transformers": "it is an encoder-decoder with expert capacity",
    "nllb-moe": "it is an encoder-decoder with expert capacity",
    "doge": "its experts are retrieved by product keys, not routed to",
    "vitpose": "it has one expert per data set, which is not routed to",
    "vitpose_backbone": "it has one expert per data set, which is not routed to",
}
_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)
_GROUP_NAMES = ("num_group", "n_group", "num_expert_group")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model, as `find_moe_layers` describes it.

    Attributes:
        name: qualified name of the experts module.
        module: the experts module.
        num_experts: number E of routed experts; identity experts, which have no weights, are not
            counted.
        top_k: number of experts that a token is routed to.
        n_group: number of groups that the router chooses among; 1 without group-limited routing.
        topk_group: number of groups that are chosen for a token.
        hidden_size: width H of the experts' inputs and outputs.
        intermediate_size: width I between the products of an expert.
        adapter: name of the adapter that observes the layer.
        scale: constant by which the block multiplies the sum of the experts' outputs; it matters
            only for comparing layers.
        norm_space: "output", or "latent" if the experts' width is not the model's hidden size.
        local: the experts in this process, if they are spread over ranks; None for all.
        mtp: whether it is a multi-token-prediction layer, which the model does not compute itself.

    Example:
        >>> layer = rd.find_moe_layers(model)[0]
        >>> layer.num_experts, layer.top_k
        (32, 4)
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    hidden_size: int
    intermediate_size: int
    adapter: str
    scale: float = 1.0
    norm_space: str = "output"
    local: ExpertSlice | None = None
    mtp: bool = False

    @property
    def local_experts(self) -> int:
        """Number of experts in this process, which accumulates their statistics."""
        return self.num_experts if self.local is None else self.local.count

    def provenance(self) -> dict[str, Any]:
        """What a plan records of the layer, as JSON values."""
        keys = ("num_experts", "top_k", "n_group", "topk_group", "hidden_size", "intermediate_size")
        facts: dict[str, Any] = {key: getattr(self, key) for key in keys}
        # A tensor that is sharded over ranks counts whole.
        held = sum(parameter.numel() for parameter in self.module.parameters())
        facts["expert_parameters"] = held // self.num_experts
        facts |= {"scale": self.scale, "norm_space": self.norm_space}
        return facts | {"mtp": True} if self.mtp else facts


@typed
def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Find the MoE layers of a model, in the model's order.

    Args:
        model: a loaded model, or one on the meta device, since no weights are read; or a wrapper of
            it by torch.compile, DataParallel or DistributedDataParallel.

    Raises:
        UnsupportedModel: the model has no MoE layer or must not be pruned; its experts' weights are
            quantized or sharded; or no adapter can observe its experts.

    Example:
        >>> len(rd.find_moe_layers(model))
        4
    """
    model = unwrap_model(model)
    config = model.config
    reason = _REFUSED.get(_model_type(config))
    if reason is None and getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    if reason is not None:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be pruned by expert: {reason}; choose a decoder-only "
            "mixture-of-experts model"
        )
    layers = [_describe(model, *found) for found in _found(model)]
    _refuse_leftovers(model, [layer.name for layer in layers])
    if not layers:
        raise UnsupportedModel(
            f"{type(model).__name__} has no mixture-of-experts layer; only models with routed "
            "experts can be observed and pruned"
        )
    return layers


@typed
def record_of(
    model: PreTrainedModel, layers: Sequence[MoELayer] | None = None, name: str | None = None
) -> dict[str, Any]:
    """Describe a model for the provenance of statistics and plans, as JSON values.

    Args:
        model: a loaded model, or one on the meta device.
        layers: which layers of `find_moe_layers` to describe; all by default.
        name: path or hub id of the model; by default the one in its configuration.

    Returns:
        `{"model": {...}, "layers": {name: {...}}}`: id, architecture, digest and identifying fields
        of the configuration, parameters, dtype; for each layer its sizes.
        `reap_kernels.model_match.differences` compares two such records.

    Raises:
        UnsupportedModel: see `find_moe_layers`.

    Example:
        >>> rd.record_of(model)["model"]["model_type"]
        'qwen3_moe'
    """
    model = unwrap_model(model)
    config = model.config
    identity = identifying_fields(config)
    layers = find_moe_layers(model) if layers is None else layers
    return {
        "model": {
            "id": str(getattr(config, "_name_or_path", "") or "") if name is None else name,
            "config_digest": digest_of(identity),
            "model_type": type(config).model_type,
            "architecture": type(model).__name__,
            "config": _as_json(identity),
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "layers": {layer.name: layer.provenance() for layer in layers},
    }


def _as_json(value: Any) -> Any:
    """A value of a configuration as a JSON value; what JSON cannot express becomes text."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    known = value is None or isinstance(value, str | int)
    if known or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def adapter_of(layer: MoELayer) -> Adapter:
    """The adapter that observes a layer."""
    return next(adapter for adapter in ADAPTERS if adapter.name == layer.adapter)


def block_of(model: nn.Module, layer: MoELayer) -> nn.Module:
    """The module that holds a layer's experts, and usually their router."""
    return model.get_submodule(layer.name.rpartition(".")[0])


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module, Adapter]]:
    """(name, experts module, block, adapter) of every module that an adapter serves."""
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        listed = isinstance(module, nn.ModuleList)
        if not name or (listed and ("expert" not in leaf or "shared" in leaf)):
            continue
        block = model.get_submodule(parent)
        for adapter in ADAPTERS:
            if adapter.serves(module, block):
                yield name, module, block, adapter
                break


def _describe(
    model: PreTrainedModel, name: str, module: nn.Module, block: nn.Module, adapter: Adapter
) -> MoELayer:
    adapter.check(name, module)
    sizes = adapter.sizes(module)
    config = model.config.get_text_config()
    sources = [block, *(child for child in block.children() if child is not module), config]
    top_k = _first_int(sources, _TOP_K_NAMES)
    if top_k is None:
        raise UnsupportedModel(
            f"{name}: neither {type(block).__name__} nor the config says how many experts a token "
            f"is routed to (looked for {', '.join(_TOP_K_NAMES)})"
        )
    width = getattr(config, "hidden_size", sizes.hidden_size)
    layer = MoELayer(
        name=name,
        module=module,
        num_experts=sizes.num_experts,
        top_k=top_k,
        n_group=_first_int(sources, _GROUP_NAMES) or 1,
        topk_group=_first_int(sources, ("topk_group",)) or 1,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        adapter=adapter.name,
        scale=_post_scale(block),
        norm_space="output" if sizes.hidden_size == width else "latent",
        local=adapter.local(module),
        mtp=any(name.startswith(f"{layer}.") for layer in mtp_layers(model)),
    )
    # The router also chooses among experts without weights (LongCat's identity experts).
    _check_routing(layer, layer.num_experts + (_first_int([config], ("zero_expert_num",)) or 0))
    return layer


def _check_routing(layer: MoELayer, choices: int) -> None:
    """Raises UnsupportedModel for experts of width 0 and for impossible routing.

    Args:
        layer: the layer.
        choices: number of experts that the router chooses among.
    """
    groups = layer.n_group
    reason = None
    if not 1 <= layer.top_k <= choices:
        reason = f"a token is routed to {layer.top_k} of {choices} experts"
    elif min(layer.hidden_size, layer.intermediate_size) < 1:
        reason = f"experts have the sizes {layer.hidden_size} and {layer.intermediate_size}"
    elif groups < 1 or choices % groups:
        reason = f"{choices} experts are divided into {groups} groups"
    elif not 1 <= layer.topk_group <= groups:
        reason = f"{layer.topk_group} of {groups} groups are chosen"
    if reason is not None:
        raise UnsupportedModel(
            f"{layer.name}: by the configuration {reason}; restore config.json from where the "
            "checkpoint was published"
        )


def _first_int(sources: list[Any], names: tuple[str, ...]) -> int | None:
    """The first attribute among `names` that is an integer, source by source; None if there
    is none.
    """
    for source in sources:
        for name in names:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def _post_scale(block: Any) -> float:
    """The constant by which a block multiplies the sum of its experts' outputs.

    Taken from the blocks' forwards: laguna, minimax_m3_vl and step3p7 scale in the block what other
    models scale in the router; cohere2_moe averages with the shared expert; openai_privacy_filter
    reverses a division by top-k.
    """
    kind = type(block).__name__
    if kind == "OpenAIPrivacyFilterMLP":
        return float(block.num_experts)
    if getattr(block, "shared_expert_combination_strategy", None) == "average":
        return 0.5 if getattr(block, "num_shared_experts", 0) else 1.0
    factor = vars(block).get("routed_scaling_factor", 1.0)
    return float(factor) if isinstance(factor, int | float) else 1.0


def _refuse_leftovers(model: nn.Module, observed: list[str]) -> None:
    """Raises UnsupportedModel for a module outside all layers whose name says that it holds
    experts.
    """
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        named = leaf == "experts" or type(module).__name__.endswith("Experts")
        if not named or "shared" in name.lower() or "Shared" in type(module).__name__:
            continue
        near = any(
            name == o or name.startswith(o + ".") or o.startswith(name + ".") for o in observed
        )
        if not near and any(True for _ in module.parameters()):
            raise UnsupportedModel(
                f"{name} ({type(module).__name__}) looks like routed experts, and no adapter "
                "observes it; load quantized experts dequantized, without hub kernels, and with a "
                "transformers version whose class for this model uses its experts interface"
            )


def _model_type(config: PretrainedConfig) -> str:
    return str(getattr(config.get_text_config(), "model_type", config.model_type))
