"""The decoder layers of a model: the units that are streamed, found by where its experts are."""

from collections.abc import Container, Iterable

from torch import nn

from reap_kernels.errors import UnsupportedModel


def decoder_layers(model: nn.Module, moe_layer_names: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Every item of the outermost `nn.ModuleList` around each MoE layer, dense ones included.

    Outermost, because experts may themselves be items of a list. A model with several towers that
    have experts (a thinker and a talker) has several such lists; towers without experts are none.

    Args:
        model: the model, on whatever device; the meta device will do.
        moe_layer_names: qualified names of modules inside decoder layers, such as
            `MoELayer.name`; their order does not matter.

    Returns:
        Qualified names and modules, in the model's own order.

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
    """The decoder layer a tensor or module is in, by its qualified name; None for none."""
    parts = name.split(".")
    prefixes = (".".join(parts[:depth]) for depth in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in layers), None)
