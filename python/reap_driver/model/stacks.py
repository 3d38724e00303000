"""Groups MoE layers into stacks: layers whose number of experts is set by the same fields.

Most models have one stack. Models with several parts (the thinker and the talker of Qwen3-Omni) set
the number of experts of each part in a field of its own, so that one part can be pruned and the
others kept. Which layers a field applies to is found by building the model, without weights, with
another number in that field. The code depends on no architecture.
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
    """MoE layers whose number of experts is set by the same fields.

    Attributes:
        layers: names of the layers.
        sites: paths of the fields; empty if no field is known to set their number.
    """

    layers: tuple[str, ...]
    sites: tuple[Site, ...]

    @property
    def field(self) -> str:
        """The fields, for messages."""
        return " and ".join(".".join(site) for site in self.sites) or "no field that is known"


def find_stacks(
    config: Mapping[str, Any],
    complete: Mapping[str, Any],
    experts: Mapping[str, int],
    shapes: Mapping[str, Shape],
    shapes_of: Shapes,
) -> list[Stack]:
    """The stacks of a model, in the order of its layers. Builds no model if only one is possible.

    Args:
        config: the configuration as written, which is to be edited.
        complete: the same configuration with every default, by the field names of its class.
        experts: name of every MoE layer -> its number of experts.
        shapes: name -> shape of the model's tensors.
        shapes_of: builds the model of an edited `config` without weights; returns its shapes.
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
            if layers or doubled == base:  # otherwise it counts something else than MoE layers
                found[group] = layers
    return _joined(found, experts)


def stack_near(name: str, stacks: Sequence[Stack]) -> Stack:
    """The stack of the layer whose name shares most parts with `name` at the beginning."""

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
    """A copy of a configuration with other numbers of experts.

    If all layers of a stack have the same number, it is set in the fields of the stack. Otherwise
    they are set to the largest, and `experts_per_layer`, which `load_pruned` reads, has the number
    of each layer.

    Args:
        config: the configuration as written.
        complete: the same configuration with every default, by the field names of its class.
        stacks: the stacks of all layers.
        before: layer -> its number of experts in `config`.
        after: layer -> its number of experts in the copy.
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
    """Fields with the number of experts of a layer -> that number. Fields of one object with the
    same number are in one group: they are several names of one setting.
    """
    groups: dict[tuple[Site, ...], int] = {}
    for number in sorted(set(experts.values())):
        by_parent: dict[Site, list[Site]] = {}
        for site in count_sites(config, number):
            by_parent.setdefault(site[:-1], []).append(site)
        groups |= {tuple(sites): number for sites in by_parent.values()}
    return groups


def _joined(found: Mapping[tuple[Site, ...], set[str]], experts: Mapping[str, int]) -> list[Stack]:
    """Stacks from fields and the layers that each of them changes; fields that change a
    common layer are joined.
    """
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
    if len(parts) == 1 and not rest:  # the fields that change nothing repeat the number
        parts[0][1].extend(site for sites, layers in found.items() if not layers for site in sites)
    if rest:
        parts.append((rest, []))
    stacks = [Stack(tuple(n for n in experts if n in part), tuple(own)) for part, own in parts]
    order = list(experts)
    return sorted(stacks, key=lambda stack: order.index(stack.layers[0]))
