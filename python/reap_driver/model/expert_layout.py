"""Which tensors of a model depend on the number of experts, found by building it twice on the meta
device.

The same configuration with E and with E' experts: a tensor whose length along one dimension differs
holds experts there, `length = E * block + tail`. `block` is the rows one expert takes, `tail` rows
that belong to no routed expert (identity experts, shared rows of a router, a skip class). No
architecture is named here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from reap_kernels.errors import PlanError, UnsupportedModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ExpertDim:
    """Where a tensor holds a layer's experts: `block` rows each along `dim`, then `tail` rows that
    stay.
    """

    layer: str
    dim: int
    block: int
    tail: int
    experts: int

    def length(self, experts: int) -> int:
        """Length of the dimension with that many experts."""
        return experts * self.block + self.tail

    def rows(self, kept: Iterable[int], block: int | None = None) -> tuple[int, ...]:
        """Positions to keep along `dim`, the tail included. `block` differs for scales of blocks of
        rows.
        """
        size = self.block if block is None else block
        end = self.experts * size
        experts = (old * size + i for old in kept for i in range(size))
        return (*experts, *range(end, end + self.tail))


@dataclass(frozen=True)
class ExpertLayout:
    """Every tensor (and every per-expert module list) that depends on the number of experts."""

    counts: Mapping[str, int]  # experts of each layer
    tensors: Mapping[str, ExpertDim]  # name in the model's state dict
    lists: Mapping[str, str]  # prefix "...experts." of modules kept in a ModuleList -> layer

    def block_layer(self, name: str) -> str | None:
        """The layer whose MoE block (`...mlp.` of `...mlp.experts`) a tensor or module is in."""
        for layer in self.layers:
            if name.startswith(_block_of(layer)):
                return layer
        return None

    @cached_property
    def layers(self) -> set[str]:
        """Layers found."""
        return {dim.layer for dim in self.tensors.values()} | set(self.lists.values())


def derive_layout(
    old: Mapping[str, Shape], new: Mapping[str, Shape], counts: Mapping[str, tuple[int, int]]
) -> ExpertLayout:
    """Compare tensor shapes of a model and of the same model with other numbers of experts.

    Args:
        old: shapes of the model.
        new: shapes of the other one.
        counts: layer -> its number of experts in the first and in the second; they differ.

    Raises:
        PlanError: a layer of the plan holds no experts, or a MoE layer of the model is not in the
            plan.
        UnsupportedModel: a shape depends on the count in a way that is not rows per expert.
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
            "model; "
            "make the plan from statistics of this very model."
        )
    return layout


def followers(
    old: Mapping[str, Shape], new: Mapping[str, Shape], layers: Iterable[str]
) -> set[str]:
    """The layers in which two models of other numbers of experts differ: in a tensor, or in the
    length of a list of experts.
    """
    names = sorted(layers)
    both = old.keys() & new.keys()
    found = (n if n in both else _element(n)[0] for n in _different(old, new))
    owners = {_find_owner(name, names) for name in dict.fromkeys(found)}
    return {owner for owner in owners if owner is not None}


def _different(old: Mapping[str, Shape], new: Mapping[str, Shape]) -> Iterator[str]:
    """Names of tensors that differ in shape, or that only one of two models has."""
    yield from (name for name, shape in old.items() if new.get(name) != shape)
    yield from (name for name in new if name not in old)


def _split(name: str, old: Shape, new: Shape, before: int, after: int) -> tuple[int, int, int]:
    """(dim, block, tail) of one tensor."""
    differing = [d for d in range(len(old)) if len(old) == len(new) and old[d] != new[d]]
    if len(differing) == 1:
        dim = differing[0]
        block, rest = divmod(old[dim] - new[dim], before - after)
        tail = old[dim] - before * block
        if rest == 0 and block > 0 and tail >= 0:
            return dim, block, tail
    raise UnsupportedModel(
        f"{name}: shape {list(old)} with {before} experts and {list(new)} with {after} is not a "
        "number of rows "
        "per expert; this architecture cannot be pruned by files."
    )


def _owner(name: str, layers: list[str]) -> str:
    """The layer a tensor belongs to."""
    owner = _find_owner(name, layers)
    if owner is None:
        raise UnsupportedModel(
            f"{name}: depends on the number of experts but belongs to none of its "
            f"{len(layers)} MoE layers (first {layers[0] if layers else 'none'}), so it cannot be "
            "pruned with them; write masks instead (--as-masks)."
        )
    return owner


def _find_owner(name: str, layers: list[str]) -> str | None:
    """The layer with the longest common path, if the tensor is inside that layer's block."""
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
    """How many parts, between dots, two names begin with alike."""
    one, other = left.split("."), right.split(".")
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _element(name: str) -> tuple[str, int]:
    """(`...experts.`, i) for a tensor of element i of a list."""
    path = name.split(".")
    for position in range(len(path) - 1, 0, -1):
        if path[position].isdigit():
            return ".".join(path[:position]) + ".", int(path[position])
    raise _no_element(name)


def _no_element(name: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{name}: exists only with the larger number of experts, but is no element of a list of "
        "experts; "
        "this architecture cannot be pruned by files."
    )
