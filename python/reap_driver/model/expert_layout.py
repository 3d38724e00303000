"""Finds which tensors of a model hold experts, from its shapes with two numbers of experts.

The model is built twice on the meta device, with E and with E' experts. A tensor whose length along
one dimension differs holds experts there: `length = E * block + tail`. `block` is the number of
rows per expert; `tail` the number of rows that belong to no routed expert (identity experts, shared
rows of a router, a skip class). The code depends on no architecture.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from reap_kernels.errors import PlanError, UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertDim:
    """Where a tensor holds the experts of a layer.

    Attributes:
        layer: name of the MoE layer.
        dim: the dimension along which the experts lie.
        block: rows per expert.
        tail: rows after those of the experts, which belong to none of them.
        experts: number of experts of the layer.
    """

    layer: str
    dim: int
    block: int
    tail: int
    experts: int

    def length(self, experts: int) -> int:
        """The length of the dimension with this many experts."""
        return experts * self.block + self.tail

    def rows(self, kept: Iterable[int], block: int | None = None) -> tuple[int, ...]:
        """Positions along `dim` to keep: those of the kept experts, and the tail.

        Args:
            kept: ids of the experts to keep.
            block: rows per expert, if not `self.block`: a tensor of scales has fewer.
        """
        size = self.block if block is None else block
        end = self.experts * size
        experts = (old * size + i for old in kept for i in range(size))
        return (*experts, *range(end, end + self.tail))


@dataclass(frozen=True)
class ExpertLayout:
    """Every tensor, and every `nn.ModuleList` of experts, that depends on the number of experts.

    Attributes:
        counts: layer -> its number of experts.
        tensors: name in the model's state dict -> where it holds experts.
        lists: prefix `...experts.` of the modules of a ModuleList -> layer.
    """

    counts: Mapping[str, int]
    tensors: Mapping[str, ExpertDim]
    lists: Mapping[str, str]

    def block_layer(self, name: str) -> str | None:
        """The layer whose MoE block (`...mlp.` of `...mlp.experts`) contains a tensor or
        module; None if there is none.
        """
        for layer in self.layers:
            if name.startswith(_block_of(layer)):
                return layer
        return None

    @cached_property
    def layers(self) -> set[str]:
        """Layers with tensors or lists that depend on the number of experts."""
        return {dim.layer for dim in self.tensors.values()} | set(self.lists.values())


def derive_layout(
    old: Mapping[str, Shape], new: Mapping[str, Shape], counts: Mapping[str, tuple[int, int]]
) -> ExpertLayout:
    """Compares the tensor shapes of a model with those of the same model with other expert counts.

    Args:
        old: name -> shape, of the model.
        new: name -> shape, with the other numbers of experts.
        counts: layer -> its number of experts in `old` and in `new`, which differ.

    Raises:
        PlanError: no tensor of a layer depends on its number of experts.
        UnsupportedModel: a shape depends on the number of experts in another way than a number of
            rows per expert, or belongs to none of the layers.
    """
    names = sorted(counts)
    tensors: dict[str, ExpertDim] = {}
    lists: dict[str, str] = {}
    for name in _different(old, new):
        if name in old and name in new:
            layer = _owner(name, names)
            dim, block, tail = _split(name, old[name], new[name], *counts[layer])
            tensors[name] = ExpertDim(layer, dim, block, tail, counts[layer][0])
            continue
        prefix, index = _element(name)
        if prefix not in lists:
            lists[prefix] = _owner(prefix, names)
        if index < min(counts[lists[prefix]]):
            raise _no_element(name)
    layout = ExpertLayout({name: counts[name][0] for name in names}, tensors, lists)
    idle = [name for name in names if name not in layout.layers]
    if idle:
        raise PlanError(
            f"plan: layer {idle[0]!r} holds nothing that depends on the number of experts in this "
            "model; make the plan from statistics of this very model."
        )
    return layout


def followers(
    old: Mapping[str, Shape], new: Mapping[str, Shape], layers: Iterable[str]
) -> set[str]:
    """The layers in which two models differ, by the shape of a tensor or the length of a list of
    experts.
    """
    names = sorted(layers)
    both = old.keys() & new.keys()
    found = (n if n in both else _element(n)[0] for n in _different(old, new))
    owners = {_find_owner(name, names) for name in dict.fromkeys(found)}
    return {owner for owner in owners if owner is not None}


def _different(old: Mapping[str, Shape], new: Mapping[str, Shape]) -> Iterator[str]:
    """Names of tensors that differ in shape or exist in only one of the models."""
    yield from (name for name, shape in old.items() if new.get(name) != shape)
    yield from (name for name in new if name not in old)


def _split(name: str, old: Shape, new: Shape, before: int, after: int) -> tuple[int, int, int]:
    """(dim, block, tail) of one tensor, whose layer has `before` and `after` experts."""
    differing = [d for d in range(len(old)) if len(old) == len(new) and old[d] != new[d]]
    if len(differing) == 1:
        dim = differing[0]
        block, rest = divmod(old[dim] - new[dim], before - after)
        tail = old[dim] - before * block
        if rest == 0 and block > 0 and tail >= 0:
            return dim, block, tail
    raise UnsupportedModel(
        f"{name}: shape {list(old)} with {before} experts and {list(new)} with {after} is not a "
        "number of rows per expert; this architecture cannot be pruned by files."
    )


def _owner(name: str, layers: list[str]) -> str:
    """The layer that a tensor belongs to."""
    owner = _find_owner(name, layers)
    if owner is None:
        raise UnsupportedModel(
            f"{name}: depends on the number of experts but belongs to none of its "
            f"{len(layers)} MoE layers (first {layers[0] if layers else 'none'}), so it cannot be "
            "pruned with them; write masks instead (`as_masks`)."
        )
    return owner


def _find_owner(name: str, layers: list[str]) -> str | None:
    """The layer whose name shares most parts with the tensor's, if the tensor is in its block."""
    shared = {layer: shared_parts(name, layer) for layer in layers}
    best = max(shared.values(), default=0)
    owners = [layer for layer, length in shared.items() if length == best]
    if len(owners) == 1 and name.startswith(_block_of(owners[0])):
        return owners[0]
    return None


def _block_of(layer: str) -> str:
    """`model.layers.3.mlp.` for the experts module `model.layers.3.mlp.experts`."""
    return layer.rpartition(".")[0] + "."


def shared_parts(left: str, right: str) -> int:
    """How many dot-separated parts two names have in common at the beginning."""
    one, other = left.split("."), right.split(".")
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _element(name: str) -> tuple[str, int]:
    """(`...experts.`, i) for the name of a tensor of element i of a list."""
    path = name.split(".")
    for position in range(len(path) - 1, 0, -1):
        if path[position].isdigit():
            return ".".join(path[:position]) + ".", int(path[position])
    raise _no_element(name)


def _no_element(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: exists only with the larger number of experts, but is no element of a list of "
        "experts; this architecture cannot be pruned by files."
    )
