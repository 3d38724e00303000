"""MoE layers by the fields of the configuration that count their experts: each such set is a stack.

Most models have one stack. Models that are made of several (the thinker and the talker of
Qwen3-Omni) count the experts of each in a field of its own, so that one can be pruned and the
others left whole. Which layers a field counts is found by building the model, without weights, with
another number there; no architecture is named here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap_driver.compat.config_edit import Site, count_sites, with_count
from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.model.expert_layout import Shape, followers, shared_parts

Shapes = Callable[[Mapping[str, Any]], Mapping[str, Shape]]


@dataclass(frozen=True)
class Stack:
    """MoE layers whose experts the same fields count.

    Attributes:
        layers: their names.
        sites: paths of the fields; none where no field is known to count these layers.
    """

    layers: tuple[str, ...]
    sites: tuple[Site, ...]

    @property
    def field(self) -> str:
        """The fields as a message shows them."""
        return " and ".join(".".join(site) for site in self.sites) or "no field that is known"


def find_stacks(
    config: Mapping[str, Any],
    complete: Mapping[str, Any],
    experts: Mapping[str, int],
    shapes: Mapping[str, Shape],
    shapes_of: Shapes,
) -> list[Stack]:
    """The stacks of a model, in the order of its layers. Builds nothing where only one is possible.

    Args:
        config: the configuration that is to be edited, as it is written.
        complete: the same with every default filled in, by the names the class of the
            configuration uses.
        experts: name of every MoE layer -> its number of experts.
        shapes: of the model.
        shapes_of: shapes of the model that an edited `config` makes, without weights.
    """
    written, defaults = _groups(config, experts), _groups(complete, experts)
    if len(written) <= 1 and len(defaults) <= 1:
        return [Stack(tuple(experts), next(iter(written or defaults), ()))]
    plain = {name: value for name, value in config.items() if name != SETTINGS}
    base = shapes if len(plain) == len(config) else shapes_of(plain)
    found: dict[tuple[Site, ...], set[str]] = {}
    parents = {group[0][:-1] for group in written}
    unwritten = {group: n for group, n in defaults.items() if group[0][:-1] not in parents}
    for groups in (written, unwritten):
        if set().union(*found.values()) >= experts.keys():
            break
        for group, number in groups.items():
            doubled = shapes_of(with_count(plain, list(group), 2 * number))
            layers = followers(base, doubled, experts)
            if layers or doubled == base:  # what else it may count is no layer that is pruned
                found[group] = layers
    return _joined(found, experts)


def stack_near(name: str, stacks: Sequence[Stack]) -> Stack:
    """The stack with the layer whose name begins with most parts of `name`."""

    def common(stack: Stack) -> int:
        return max(shared_parts(name, layer) for layer in stack.layers)

    return max(stacks, key=common)


def with_counts(
    config: Mapping[str, Any],
    complete: Mapping[str, Any],
    stacks: Iterable[Stack],
    before: Mapping[str, int],
    after: Mapping[str, int],
) -> dict[str, Any]:
    """A copy of a configuration that gives layers other numbers of experts.

    Where the layers of a stack have equal numbers, its fields say that alone. Otherwise they say
    the largest, and the settings that `load_pruned` reads say all.

    Args:
        config: as written.
        complete: the same with every default filled in, by the names its class uses.
        stacks: of all layers.
        before: number of experts of every layer, as `config` has it.
        after: the same for the copy.
    """
    edited = {name: value for name, value in config.items() if name != SETTINGS}
    fields: list[str] = []
    counts: dict[str, int] = {}
    for stack in stacks:
        numbers = {name: after[name] for name in stack.layers}
        largest = max(before[name] for name in stack.layers)
        edited = with_count(edited, list(stack.sites), max(numbers.values()))
        if len(set(numbers.values())) > 1:
            parents = {site[:-1] for site in stack.sites}
            same = [site for site in count_sites(complete, largest) if site[:-1] in parents]
            fields += [".".join(site) for site in same]
            counts |= numbers
    if counts:
        edited[SETTINGS] = {"count_fields": fields, "counts": counts}
    return edited


def _groups(config: Mapping[str, Any], experts: Mapping[str, int]) -> dict[tuple[Site, ...], int]:
    """Fields that say a layer's number of experts -> that number; those that one part of the
    configuration gives the same number are one field under several names.
    """
    groups: dict[tuple[Site, ...], int] = {}
    for number in sorted(set(experts.values())):
        by_parent: dict[Site, list[Site]] = {}
        for site in count_sites(config, number):
            by_parent.setdefault(site[:-1], []).append(site)
        groups |= {tuple(sites): number for sites in by_parent.values()}
    return groups


def _joined(found: Mapping[tuple[Site, ...], set[str]], experts: Mapping[str, int]) -> list[Stack]:
    """Stacks of fields and the layers that follow each; fields with a layer in common are one."""
    parts: list[tuple[set[str], list[Site]]] = []
    for sites, layers in found.items():
        if not layers:
            continue
        joined, own = set(layers), list(sites)
        for part in [part for part in parts if part[0] & layers]:
            parts.remove(part)
            joined, own = joined | part[0], [*part[1], *own]
        parts.append((joined, own))
    rest = set(experts).difference(*(layers for layers, _ in parts))
    if len(parts) == 1 and not rest:  # fields that count nothing say the number once more
        parts[0][1].extend(site for sites, layers in found.items() if not layers for site in sites)
    if rest:
        parts.append((rest, []))
    stacks = [Stack(tuple(n for n in experts if n in part), tuple(own)) for part, own in parts]
    order = list(experts)
    return sorted(stacks, key=lambda stack: order.index(stack.layers[0]))
