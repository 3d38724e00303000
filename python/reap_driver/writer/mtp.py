"""Multi-token-prediction (MTP) layers: keys that transformers' main model ignores.

They are left out, pruned or kept whole. To be pruned, an MTP layer with experts needs to know which
of them stay: by an entry of the plan under its name, such as `model.layers.61.mlp.experts` (the
layer's prefix on disk, then the name that the main layers use), or else by the last of the main
layers that are called alike, whose kept ids it takes. An MTP layer without experts is copied.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from reap_driver.base.mtp import MtpChoice
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.expert_layout import ExpertDim, ExpertLayout, Shape, shared_parts
from reap_driver.planning.plan import LayerPlan
from reap_driver.writer.actions import Action, Copy, Drop, ExpertList, list_prefixes, split_layer
from reap_kernels.errors import PlanError, UnsupportedModel


@dataclass(frozen=True)
class Cut:
    """How experts are taken out of one tensor.

    Attributes:
        expert: where a layer's experts are.
        decide: (key, tensor, where its layer's experts are, kept ids) -> action.
    """

    expert: ExpertDim
    decide: Callable[[str, TensorEntry, ExpertDim, tuple[int, ...]], Action]


@dataclass(frozen=True)
class MtpLayer:
    """The experts of an MTP layer that is written.

    Attributes:
        before: their number in the source.
        kept: ids that stay, ascending.
        like: the main layer whose kept ids these are; None if the plan has an entry for the MTP
            layer, or all stay.
    """

    before: int
    kept: tuple[int, ...]
    like: str | None = None


@dataclass
class MtpActions:
    """The decision for every key of MTP layers.

    Attributes:
        actions: by key.
        lists: per-expert lists among the keys, by prefix.
        layers: MTP layers with experts that are written, by name.
    """

    actions: dict[str, Action] = field(default_factory=dict)
    lists: dict[str, ExpertList] = field(default_factory=dict)
    layers: dict[str, MtpLayer] = field(default_factory=dict)


class MtpKeys:
    """Recognizes keys of MTP layers and treats them by the rules learned from the main layers.

    Args:
        layout: the main model's.
        shapes: tensors of the main model.
        plan: {layer: its plan}, of every main layer, and of MTP layers if there are entries.
        choice: what happens to MTP layers.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        shapes: Mapping[str, Shape],
        plan: Mapping[str, "LayerPlan"],
        choice: MtpChoice,
    ) -> None:
        self._plan, self._choice = plan, choice
        self._depths = _stack_depths(layout, shapes)
        self._main = list(layout.counts)
        # "mlp.experts." on disk -> "mlp.experts" in memory. Where the main layers are stacked, MTP
        # layers may still be stored per expert, under the name in memory.
        self._lists = {_tail(layer) + ".": _tail(layer) for layer in self._main}
        self._cuts: dict[str, Cut] = {}  # "mlp.gate.weight" on disk -> how it is cut
        self._cut_in: dict[str, set[str]] = {}  # main layer -> those of these names that it has
        self._copied: set[str] = set()  # names on disk of what main layers have beside experts

    def owns(self, key: str, name: str) -> bool:
        """Whether a key that the model does not have belongs to an MTP layer.

        It does if its layer comes after the last one of a stack that has experts, or if one of its
        modules is called `mtp`.

        Args:
            key: on disk.
            name: the same, renamed as transformers would.
        """
        if any(part == "mtp" or part.startswith("mtp_") for part in key.split(".")):
            return True
        stack, _ = split_layer(name)
        depth = self._depths.get(_parent(stack))
        return depth is not None and int(stack.split(".")[-2]) >= depth

    def learn(
        self,
        cuts: Mapping[str, Cut],
        lists: Mapping[str, ExpertList],
        actions: Mapping[str, Action],
    ) -> None:
        """Takes names and layouts of experts and routers from the decisions for the main layers."""
        for prefix, experts in lists.items():
            self._lists[split_layer(prefix + "0.")[1][: -len("0.")]] = _tail(experts.layers[0])
        for key, cut in cuts.items():
            suffix = split_layer(key)[1]
            self._cuts[suffix] = cut
            self._cut_in.setdefault(cut.expert.layer, set()).add(suffix)
        self._copied |= {split_layer(key)[1] for key, a in actions.items() if isinstance(a, Copy)}

    def decide(self, keys: Iterable[str], tensors: Mapping[str, TensorEntry]) -> MtpActions:
        """Decides every key of MTP layers.

        Raises:
            CheckpointError: an expert of an MTP layer is missing.
            PlanError: the plan counts other experts than an MTP layer has.
            UnsupportedModel: an MTP layer stores its experts in another way than the main layers.
        """
        result = MtpActions()
        if self._choice == "drop":
            result.actions.update({key: Drop("mtp") for key in keys})
            return result
        found: dict[str, set[str]] = {}  # MTP layer -> names on disk of its routers
        for key in keys:
            listed = self._list_of(key)
            if listed is not None:
                prefix, layer, index = listed
                result.lists.setdefault(prefix, ExpertList((layer,))).keys[key] = index
                found.setdefault(layer, set())
            else:
                result.actions[key] = self._action(key, tensors[key], result.layers, found)
        for prefix, experts in result.lists.items():
            [layer] = experts.layers
            own = self._experts_of(layer, max(experts.keys.values()) + 1)
            result.layers[layer] = own
            where = tensors[next(iter(experts.keys))].file.parent
            result.actions.update(experts.renumber(prefix, [own.kept], [own.before], where))
        for layer, names in found.items():
            self._check_complete(layer, names)
        return result

    def _list_of(self, key: str) -> tuple[str, str, int] | None:
        """(prefix, layer name, expert) of a per-expert key."""
        for suffix, name in self._lists.items():
            root, found, rest = key.partition("." + suffix)
            index, leaf, _ = rest.partition(".")
            if found and index.isdigit() and leaf:
                return f"{root}.{suffix}", f"{root}.{name}", int(index)
        return None

    def _action(
        self,
        key: str,
        entry: TensorEntry,
        layers: dict[str, MtpLayer],
        found: dict[str, set[str]],
    ) -> Action:
        """The action for a key outside per-expert lists: stacked tensors and routers are cut as in
        the main layers, anything else is copied. Notes what is cut in `layers` and `found`.
        """
        for suffix, cut in self._cuts.items():
            if not key.endswith("." + suffix):
                continue
            layer = key[: -len(suffix)] + _tail(cut.expert.layer)
            own = self._experts_of(layer, cut.expert.experts)
            layers[layer] = own
            found.setdefault(layer, set()).add(suffix)
            place = replace(cut.expert, layer=layer, experts=own.before)
            action = cut.decide(key, entry, place, own.kept)  # also where all stay: checks shapes
            return Copy(key) if len(own.kept) == own.before else action
        self._check_copied(key, entry)
        return Copy(key)

    def _experts_of(self, layer: str, count: int) -> MtpLayer:
        """What stays of an MTP layer.

        Args:
            layer: its name.
            count: its experts; used only if all stay.
        """
        planned, like = self._plan.get(layer), None
        if self._choice == "keep":
            if planned is not None and planned.removed:
                raise PlanError(
                    f"plan: removes {len(planned.removed)} experts of {layer!r}, a "
                    "multi-token-prediction layer, which `mtp='keep'` leaves whole; give "
                    "`mtp='prune'`, or a plan without this layer."
                )
            return MtpLayer(count, tuple(range(count)))
        if planned is None:
            like = self._like(layer)
            planned = self._plan[like]
        return MtpLayer(planned.num_experts, planned.kept, like)

    def _like(self, layer: str) -> str:
        """The last main layer whose experts have the name that an MTP layer's have, in the part of
        the model that its name is nearest to.
        """
        alike = (name for name in self._main if layer.endswith("." + _tail(name)))
        return max(reversed(list(alike)), key=lambda name: shared_parts(name, layer))

    def _check_copied(self, key: str, entry: TensorEntry) -> None:
        """Refuses a tensor that seems to hold experts, or one value per expert, and is in no place
        that the main layers have.
        """
        routed = any(prefix.endswith("experts.") for prefix, _ in list_prefixes(key))
        for suffix, cut in self._cuts.items():
            block = "." + suffix.rpartition(".")[0].rpartition(".")[0] + "."
            inside = block != ".." and block in key
            alike = any(key.endswith("." + name) for name in self._copied)
            routed = routed or (inside and not alike and cut.expert.experts in entry.shape)
        if routed:
            raise UnsupportedModel(
                f"{key}: is in a multi-token-prediction layer, seems to depend on the number of "
                "experts, and has no counterpart in the other layers, so it cannot be cut; leave "
                "these layers out (`mtp='drop'`)."
            )

    def _check_complete(self, layer: str, names: set[str]) -> None:
        """Refuses an MTP layer that lacks a router that the main layers have: under another name it
        would have been copied.
        """
        like = self._like(layer)
        root = layer[: -len(_tail(like))]
        for suffix in sorted(self._cut_in.get(like, ())):
            listed = any(suffix.startswith(experts) for experts in self._lists)
            if not listed and suffix not in names:
                raise UnsupportedModel(
                    f"{layer}: is a multi-token-prediction layer without {root}{suffix}, though "
                    f"{like} has such a tensor, so its router is not known; leave these layers out "
                    "(`mtp='drop'`)."
                )


def _tail(layer: str) -> str:
    """`mlp.experts` for `model.layers.3.mlp.experts`."""
    return split_layer(layer + ".")[1].rstrip(".")


def _stack_depths(layout: ExpertLayout, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Number of layers in each stack (`model.layers.`) that has experts."""
    stacks = {_parent(split_layer(layer + ".")[0]) for layer in layout.layers} - {""}
    depths = dict.fromkeys(stacks, 0)
    for name in shapes:
        root = split_layer(name)[0]
        if _parent(root) in depths:
            depths[_parent(root)] = max(depths[_parent(root)], int(root.split(".")[-2]) + 1)
    return depths


def _parent(root: str) -> str:
    """`model.layers.` for `model.layers.3.`."""
    return root[:-1].rpartition(".")[0] + "." if root else ""
