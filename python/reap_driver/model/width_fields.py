"""Finds the fields of a configuration that set the width of the experts, the number I of neurons
between their projections, and edits them.

Fields are found as in `stacks`: the model is built without weights with another value, and the
shapes of its tensors are compared. In some models the same field also sets the width of shared
experts, `n_shared_experts * moe_intermediate_size`; their number is then raised until they are as
wide as before, or wider. Neurons that they get in addition are zero and add nothing. The code
depends on no architecture.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reap_driver.compat.config_edit import Site, shared_count_sites, width_sites, with_values
from reap_driver.model.expert_layout import Shape
from reap_kernels.errors import ReapError, UnsupportedModel

# Tensors of a shared expert that may get neurons: (gate, up, down). Others may hold two of these in
# one tensor, where zeros at its end would not be neurons.
_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class WidthEdit:
    """How a configuration gives experts another width.

    Attributes:
        values: field -> its new value.
        shapes: tensors of the model with these values -> shape.
        widened: tensors of shared experts that become wider -> shape before.
    """

    values: Mapping[Site, Any]
    shapes: Mapping[str, Shape]
    widened: Mapping[str, Shape] = field(default_factory=dict)


def find_width_edit(
    config: Mapping[str, Any],
    complete: Mapping[str, Any],
    layers: Iterable[str],
    widths: tuple[int, int],
    shapes: Mapping[str, Shape],
    shapes_of: Callable[[Mapping[str, Any]], Mapping[str, Shape]],
) -> WidthEdit:
    """The fields that set the width of the experts of some layers, and of nothing else.

    Args:
        config: the configuration as written, with the numbers of experts that it is to have.
        complete: the same configuration with every default, by the field names of its class.
        layers: names of the experts modules; all of one stack.
        widths: neurons of each of their experts, before and after.
        shapes: tensors of the model of `config` -> shape.
        shapes_of: builds the model of an edited `config` without weights; returns its shapes.

    Raises:
        UnsupportedModel: there is no such field; names what else it would change.
    """
    before, after = widths
    inside = tuple(f"{layer}." for layer in layers)
    search = _Search(config, complete, inside, shapes, shapes_of)
    seen: list[tuple[Site, list[str]]] = []
    for site, value in _sites(config, complete, before):
        values = {site: _replaced(value, before, after)}
        made = search.built(values)
        if made is None or not search.covers(made):
            continue
        others = search.others(made)
        if others:
            edit = search.with_shared(values, before, after)
            if edit is not None:
                return edit
            seen.append((site, others))
            continue
        repeated = _repeated(config, site, before, after)
        again = search.built({**values, **repeated})
        return WidthEdit({**values, **repeated} if again == made else values, made)
    raise _no_field(next(iter(layers)), before, after, seen)


class _Search:
    """Builds the model with other values, and says what changed."""

    def __init__(
        self,
        config: Mapping[str, Any],
        complete: Mapping[str, Any],
        inside: tuple[str, ...],
        shapes: Mapping[str, Shape],
        shapes_of: Callable[[Mapping[str, Any]], Mapping[str, Shape]],
    ) -> None:
        self._config, self._complete, self._inside = config, complete, inside
        self._shapes, self._shapes_of = shapes, shapes_of

    def built(self, values: Mapping[Site, Any]) -> Mapping[str, Shape] | None:
        """Shapes with these values; None if the model cannot be built with them."""
        try:
            return self._shapes_of(with_values(self._config, values))
        except ReapError:
            return None

    def covers(self, made: Mapping[str, Shape]) -> bool:
        """Whether the model has the same tensors, and those of every layer changed."""
        if made.keys() != self._shapes.keys():
            return False
        changed = [name for name in made if made[name] != self._shapes[name]]
        return all(any(name.startswith(layer) for name in changed) for layer in self._inside)

    def others(self, made: Mapping[str, Shape]) -> list[str]:
        """Tensors outside the layers that changed."""
        return [
            name
            for name, shape in made.items()
            if shape != self._shapes.get(name) and not name.startswith(self._inside)
        ]

    def with_shared(self, values: Mapping[Site, Any], before: int, after: int) -> WidthEdit | None:
        """The edit together with another number of shared experts; None if there is none."""
        parent = next(iter(values))[:-1]
        for site, count in shared_count_sites(self._config, self._complete, parent):
            needed = -(-count * before // after)
            tried = {**values, site: needed}
            made = self.built(tried)
            if made is None or not self.covers(made):
                continue
            others = self.others(made)
            if all(self._widened(name, made) for name in others):
                return WidthEdit(tried, made, {name: self._shapes[name] for name in others})
        return None

    def _widened(self, name: str, made: Mapping[str, Shape]) -> bool:
        """Whether a tensor is a matrix of a shared expert that only became wider."""
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        suffix = ".weight" if name.endswith(".weight") else ""
        for names in _MATRICES:
            if leaf not in names or "shared" not in module:
                continue
            matrices = [f"{module}.{other}{suffix}" for other in names]
            down = matrices[-1]
            if not made.keys() >= set(matrices[1:]) or len(made[name]) != 2:
                return False  # experts without a gate have the other two
            dim = 1 if name == down else 0
            same = made[name][1 - dim] == self._shapes[name][1 - dim]
            wider = made[name][dim] > self._shapes[name][dim]
            return same and wider and f"{module}.{leaf}.bias" not in made
        return False


def _sites(
    config: Mapping[str, Any], complete: Mapping[str, Any], width: int
) -> list[tuple[Site, Any]]:
    """Fields with this width: written ones, then those that the file leaves to a default."""
    written = width_sites(config, width)
    known = {site for site, _ in written}
    return [*written, *(found for found in width_sites(complete, width) if found[0] not in known)]


def _repeated(config: Mapping[str, Any], site: Site, before: int, after: int) -> dict[Site, Any]:
    """Fields beside one that repeat the experts' width for other readers, by their names."""
    return {
        other: _replaced(value, before, after)
        for other, value in width_sites(config, before)
        if other[:-1] == site[:-1]
        and other != site
        and any(word in other[-1] for word in ("moe", "expert"))
        and "shared" not in other[-1]
    }


def _replaced(value: Any, before: int, after: int) -> Any:
    """The value of a field with another width; lists keep their length."""
    if isinstance(value, list):
        return [after if item == before else item for item in value]
    return after


def _no_field(
    layer: str, before: int, after: int, seen: list[tuple[Site, list[str]]]
) -> UnsupportedModel:
    if not seen:
        return UnsupportedModel(
            f"{layer}: no field of config.json is known to set the {before} neurons of its experts "
            "alone, so the width cannot be changed; use a plan without `shape`."
        )
    site, others = seen[0]
    return UnsupportedModel(
        f"{layer}: `{'.'.join(site)}` of config.json sets its experts' width, and that of "
        f"{others[0]} and {len(others) - 1} other tensors, which keep {before} neurons, so experts "
        f"of {after} cannot be written; use a plan without `shape`, or one that leaves "
        f"{before} neurons."
    )
