"""Finds the decoder layers of a model, which are the units of streaming, from its MoE layers."""

from collections.abc import Container, Iterable

from torch import nn

from reap_kernels.errors import UnsupportedModel


def decoder_layers(model: nn.Module, moe_layer_names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Every item of the outermost `nn.ModuleList` around each MoE layer, dense layers included.

    The outermost list, because experts may be items of a list themselves. A model with several
    parts that have experts (a thinker and a talker) has several such lists. Parts without experts
    are not included.

    Args:
        model: the model, on any device, the meta device included.
        moe_layer_names: qualified names of modules inside decoder layers, such as
            `MoELayer.name`, in any order.

    Returns:
        Qualified names and modules, in the model's order.

    Raises:
        UnsupportedModel: a named module is in no `nn.ModuleList`.
    """
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost: set[str] = set()
    for name in moe_layer_names:
        parts = name.split(".")
        parents = (".".join(parts[:depth]) for depth in range(1, len(parts)))
        found = next((parent for parent in parents if parent in lists), None)
        if found is None:
            raise UnsupportedModel(
                f"{type(model).__name__}: {name} is in no nn.ModuleList, so which decoder layer it "
                "belongs to is unknown; only models that list their layers can be sized and "
                "streamed"
            )
        outermost.add(found)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.rpartition(".")[0] in outermost
    ]


def owner_of(name: str, layers: Container[str]) -> str | None:
    """Name of the decoder layer that a tensor or module is in; None if it is in none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)
