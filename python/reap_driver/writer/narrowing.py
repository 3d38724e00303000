"""What changes in a pruned checkpoint beside the numbers of experts: their width, and their values.

A plan with neurons gives experts another width, set by a field of config.json; a plan with matrices
gives them new down projections. Both are computed tensors, which take the place of copied ones.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.compat.config_edit import with_values
from reap_driver.compat.conversion import KeyMap
from reap_driver.files.checkpoint import Checkpoint
from reap_driver.files.quantization import Quantization, method_of, settings_in
from reap_driver.model.discover import MoELayer, find_moe_layers
from reap_driver.model.expert_layout import Shape
from reap_driver.model.expert_parts import NewExperts
from reap_driver.model.stacks import Stack
from reap_driver.model.width_fields import find_width_edit
from reap_driver.planning.plan import Plan, named_layers
from reap_driver.writer.actions import Action, Compute, Drop
from reap_driver.writer.keys import KeyActions
from reap_driver.writer.new_experts import ExpertValues, Side, read_values, refuse_quantized
from reap_driver.writer.pruned_model import PrunedModel, built, edited_config, shapes_for
from reap_kernels.errors import PlanError, UnsupportedModel


@dataclass(frozen=True)
class Narrowed:
    """The pruned model with experts of another width, on meta.

    Attributes:
        model: the pruned model; `new` and `raw_config` have the new width.
        layers: its MoE layers.
        widths: layer whose experts lose neurons -> their number before and after.
        widened: tensors of shared experts that become wider -> shape before; see `width_fields`.
    """

    model: PrunedModel
    layers: Mapping[str, MoELayer]
    widths: Mapping[str, tuple[int, int]]
    widened: Mapping[str, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Computed:
    """The tensors that are computed, and the action of every other.

    Attributes:
        actions: of every key of the source.
        values: key in the output -> values, for some tensors at a time.
        layers: names of those whose experts change.
    """

    actions: Mapping[str, Action]
    values: "Sequence[ExpertValues | WidenedValues]" = ()
    layers: Sequence[str] = ()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return itertools.chain.from_iterable(self.values)


def unchanged(model: PrunedModel, keys: KeyActions) -> tuple[Narrowed, Computed]:
    """What a plan of whole experts leaves: the same width, and no new values."""
    return Narrowed(model, {}, {}), Computed(keys.actions)


def narrow(
    folder: Path,
    full: PreTrainedModel,
    model: PrunedModel,
    plan: Plan,
    stacks: Sequence[Stack],
    layers: Sequence[MoELayer],
    *,
    trust: bool,
) -> Narrowed:
    """Gives the pruned model the width that the plan leaves, and the field that says so.

    Args:
        folder: the source.
        full: its model, on meta.
        model: pruned, its experts as wide as before.
        plan: covers all layers of the model.
        stacks, layers: of the full model.
        trust: run model code that comes with the checkpoint.

    Raises:
        PlanError: the plan is of another width than the model, or leaves different ones in layers
            that one field describes.
        UnsupportedModel: see `find_width_edit`.
    """
    widths = _widths(plan, stacks, layers)
    start = model.raw_config, model.new.shapes
    config, widened = _with_widths(folder, full, *start, stacks, widths, trust=trust)
    made = built(folder, config, trust_remote_code=trust)
    narrowed = replace(model, new=KeyMap(made), raw_config=config)
    return Narrowed(narrowed, {la.name: la for la in find_moe_layers(made)}, widths, widened)


def smaller_model(
    folder: Path,
    full: PreTrainedModel,
    raw: Mapping[str, Any],
    plan: Plan,
    stacks: Sequence[Stack],
    *,
    trust: bool,
) -> PreTrainedModel:
    """The pruned model on meta, by its configuration alone.

    Args:
        folder: need not hold weights.
        full: its model, on meta.
        raw: its config.json as written.
        plan: covers all layers of the model.
        stacks: of the full model.
        trust: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: config.json lacks the number of experts of a layer that loses some.
        PlanError, UnsupportedModel: see `narrow`; or the model is quantized, and experts get other
            values.
    """
    layers = find_moe_layers(full)
    counts = {la.name: (la.num_experts, len(plan.layers[la.name].kept)) for la in layers}
    config = edited_config(folder, full, raw, stacks, counts)
    made = built(folder, config, trust_remote_code=trust)
    widths = _widths(plan, stacks, layers)
    if not widths:
        return made
    for _, settings in settings_in(raw):
        refuse_quantized(folder, Quantization(method_of(settings, None), settings))
    config, _ = _with_widths(folder, full, config, KeyMap(made).shapes, stacks, widths, trust=trust)
    return built(folder, config, trust_remote_code=trust)


def _with_widths(
    folder: Path,
    full: PreTrainedModel,
    config: dict[str, Any],
    shapes: Mapping[str, Shape],
    stacks: Sequence[Stack],
    widths: Mapping[str, tuple[int, int]],
    *,
    trust: bool,
) -> tuple[dict[str, Any], dict[str, Shape]]:
    """A configuration with other widths, and the shared experts that become wider by it.

    Args:
        folder, full, stacks, trust: see `narrow`.
        config: with the numbers of experts that the plan leaves.
        shapes: tensors of its model -> shape.
        widths: layer that loses neurons -> neurons of its experts before and after.
    """
    widened: dict[str, Shape] = {}
    for stack in stacks:
        for pair in dict.fromkeys(widths[name] for name in stack.layers if name in widths):
            edit = find_width_edit(
                config,
                full.config.to_dict(),
                [name for name in stack.layers if widths.get(name) == pair],
                pair,
                shapes,
                shapes_for(folder, trust_remote_code=trust),
            )
            config, shapes = with_values(config, edit.values), edit.shapes
            widened |= edit.widened
    return config, widened


def _widths(
    plan: Plan, stacks: Sequence[Stack], layers: Sequence[MoELayer]
) -> dict[str, tuple[int, int]]:
    """Layer that loses neurons -> neurons of its experts before and after."""
    before = {layer.name: layer.intermediate_size for layer in layers}
    found: dict[str, tuple[int, int]] = {}
    for name, width in before.items():
        entry = plan.layers[name]
        if entry.width not in (None, width):
            raise PlanError(
                f"plan: counts {entry.width} neurons in the experts of {name!r}, the model has "
                f"{width}; make the plan from this model."
            )
        if entry.narrow_width not in (None, width):
            found[name] = (width, int(entry.narrow_width or width))
    for stack in stacks:
        alike = itertools.groupby(sorted(stack.layers, key=before.__getitem__), before.__getitem__)
        for width, names in alike:
            _check_one_width({name: found.get(name, (0, width))[1] for name in names})
    return found


def _check_one_width(after: Mapping[str, int]) -> None:
    """Raises PlanError unless layers whose width one field says keep equally many neurons."""
    parts = {width: [n for n in after if after[n] == width] for width in after.values()}
    if len(parts) > 1:
        left = ", and ".join(
            f"{width} neurons in the experts of {named_layers(names)}"
            for width, names in sorted(parts.items())
        )
        raise PlanError(
            f"plan: leaves {left}, but one field of config.json says the width of all of them; "
            "make a plan that leaves the same number in every layer."
        )


def compute(
    source: Checkpoint,
    layers: Sequence[MoELayer],
    narrowed: Narrowed,
    plan: Plan,
    keys: KeyActions,
    matrices: Mapping[str, Tensor],
    quantization: Quantization,
) -> Computed:
    """Replaces the actions of tensors whose values change.

    Args:
        source: the checkpoint.
        layers: its MoE layers.
        narrowed: the pruned model.
        plan: what it was made by; covers all layers.
        keys: what happens to every key if no values change.
        matrices: layer -> new down projections [E', H, I'].
        quantization: of the source.

    Raises:
        PlanError: the plan cuts multi-token-prediction layers, of which it says no neurons.
        UnsupportedModel: the source is quantized, or new values cannot be written in its layout.
    """
    refuse_quantized(source.folder, quantization)
    old = {layer.name: layer for layer in layers}
    extra = [name for name in plan.layers if name not in old]
    extra += [name for name in keys.mtp if plan.narrows and name not in extra]
    if extra:
        raise PlanError(
            "plan: changes the experts of the other layers, and nothing was observed of the "
            f"neurons of {extra[0]!r}, a multi-token-prediction layer; leave it out by "
            "`mtp='drop'` and a plan without it."
        )
    kept = {a.name: k for k, a in keys.actions.items() if not isinstance(a, Drop)}
    entries = {name: source.tensors[key] for name, key in kept.items()}
    changes = {
        name: NewExperts(plan.layers[name].kept, plan.layers[name].neurons) for name in matrices
    }
    sides = (
        Side(narrowed.model.old, old, source.tensors),
        Side(narrowed.model.new, narrowed.layers, entries),
    )
    experts = ExpertValues(*sides, changes, matrices)
    widened = WidenedValues(sides[1], narrowed.widened)
    shapes = {**experts.shapes, **widened.shapes}
    new = {kept[name]: Compute(name, shape) for name, shape in shapes.items()}
    return Computed({**keys.actions, **new}, (experts, widened), tuple(changes))


class WidenedValues:
    """Tensors of shared experts that become wider, with zeros for the neurons that are added: their
    gate and up rows and their down columns, so that they add nothing to any output.

    Args:
        side: the pruned model.
        widened: tensor of the model -> shape in the source.

    Raises:
        UnsupportedModel: a tensor is stored in another layout than the model's.
    """

    def __init__(self, side: Side, widened: Mapping[str, Shape]) -> None:
        self._side = side
        self._keys: dict[str, str] = {}
        modules = dict.fromkeys(name.removesuffix(".weight").rpartition(".")[0] for name in widened)
        for group in side.keys.groups(side.tensors, modules) if widened else ():
            [(key, pattern), *_] = group.keys.items()
            if group.names[0] in widened and pattern is None:
                self._keys[key] = group.names[0]
        for name, shape in widened.items():
            found = [key for key, made in self._keys.items() if made == name]
            if not found or side.tensors[found[0]].shape != shape:
                raise UnsupportedModel(
                    f"{name}: belongs to a shared expert that becomes wider with the routed "
                    f"experts, and no tensor on disk is known to hold it as {list(shape)}; use a "
                    "plan without `shape`."
                )

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key in the output -> shape."""
        shapes = self._side.keys.shapes
        return {key: shapes[name] for key, name in self._keys.items()}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Key in the output -> values, tensor by tensor."""
        for key, shape in self.shapes.items():
            value = read_values({key: self._side.tensors[key]})[key]
            wide = torch.zeros(shape, dtype=value.dtype)
            wide[tuple(map(slice, value.shape))] = value
            yield {key: wide}


def notes_on(narrowed: Narrowed) -> list[str]:
    """Sentences on what else the new width changed."""
    if not narrowed.widened:
        return []
    name, before = next(iter(narrowed.widened.items()))
    after = narrowed.model.new.shapes[name]
    width = next((a, b) for a, b in zip(before, after, strict=True) if a != b)
    return [
        f"shared experts are {width[1]} neurons wide in place of {width[0]}, a multiple of the "
        "routed experts' width as config.json must say it; the neurons that were added are zero "
        "and change no output."
    ]
