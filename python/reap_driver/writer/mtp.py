"""Multi-token-prediction (MTP) layers: keys that transformers' main model ignores.

Engines build MTP layers from the same expert count as the main model, so they are dropped (the
default) or pruned to the same count. The importance of their experts does not follow from that of
other layers, so they are kept only if the plan has an entry for every MTP layer, named as
`model.layers.61.mlp.experts` (the layer's prefix on disk, then the name that the main layers use).
An MTP layer without experts is kept as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.model.expert_layout import ExpertDim, ExpertLayout, Shape
from reap_driver.planning.plan import LayerPlan
from reap_driver.writer.actions import Action, Copy, ExpertList, split_layer
from reap_kernels.errors import PlanError


@dataclass(frozen=True)
class Cut:
    """How experts are taken out of one tensor.

    Attributes:
        expert: where a layer's experts are.
        decide: (key, tensor, where its layer's experts are, kept ids) -> action.
    """

    expert: ExpertDim
    decide: Callable[[str, TensorEntry, ExpertDim, tuple[int, ...]], Action]


class MtpKeys:
    """Recognizes keys of MTP layers and prunes them by the rules learned from the main layers.

    Args:
        layout: the main model's.
        shapes: tensors of the main model.
        plan: {layer: its plan}, with MTP layers if there are entries for them.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        shapes: Mapping[str, Shape],
        plan: Mapping[str, "LayerPlan"],
    ) -> None:
        self._plan = plan
        self._depths = _stack_depths(layout, shapes)
        self._lists: dict[str, str] = {}  # "mlp.experts." on disk -> "mlp.experts" in memory
        self._cuts: dict[str, Cut] = {}  # "mlp.gate.weight" on disk -> how it is cut

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

    def learn(self, cuts: Mapping[str, Cut], lists: Mapping[str, ExpertList]) -> None:
        """Takes names and layouts of experts and routers from the decisions for the main layers."""
        for prefix, experts in lists.items():
            self._lists[split_layer(prefix + "0.")[1][: -len("0.")]] = split_layer(
                experts.layers[0] + "."
            )[1].rstrip(".")
        for key, cut in cuts.items():
            self._cuts[split_layer(key)[1]] = cut

    def prune(
        self, keys: Iterable[str], tensors: Mapping[str, TensorEntry]
    ) -> tuple[dict[str, Action], dict[str, ExpertList]]:
        """Actions for the keys of MTP layers that are kept, and the per-expert lists among them, by
        prefix.

        Raises:
            PlanError: an MTP layer has experts, and the plan does not say which of them to keep.
        """
        actions: dict[str, Action] = {}
        lists: dict[str, ExpertList] = {}
        for key in keys:
            found = self._list_of(key)
            if found is not None:
                prefix, layer, index = found
                lists.setdefault(prefix, ExpertList((layer,))).keys[key] = index
            else:
                actions[key] = self._action(key, tensors[key])
        for prefix, experts in lists.items():
            where = tensors[next(iter(experts.keys))].file.parent
            plan = self._plan_of(experts.layers[0])
            actions.update(experts.renumber(prefix, [plan.kept], [plan.num_experts], where))
        return actions, lists

    def _list_of(self, key: str) -> tuple[str, str, int] | None:
        """(prefix, layer name, expert) of a per-expert key."""
        for suffix, name in self._lists.items():
            root, found, rest = key.partition("." + suffix)
            index = rest.partition(".")[0]
            if found and index.isdigit():
                return f"{root}.{suffix}", f"{root}.{name}", int(index)
        return None

    def _action(self, key: str, entry: TensorEntry) -> Action:
        """The action for a key outside per-expert lists: stacked tensors and routers are cut as in
        the main layers, anything else is copied.
        """
        for suffix, cut in self._cuts.items():
            if not key.endswith("." + suffix):
                continue
            layer = key[: -len(suffix)] + split_layer(cut.expert.layer + ".")[1].rstrip(".")
            plan = self._plan_of(layer)
            own = replace(cut.expert, layer=layer, experts=plan.num_experts)
            return cut.decide(key, entry, own, plan.kept)
        return Copy(key)

    def _plan_of(self, layer: str) -> "LayerPlan":
        """The plan of an MTP layer."""
        if layer not in self._plan:
            narrows = any(known.neurons is not None for known in self._plan.values())
            raise PlanError(
                f"plan: has no entry {layer!r}, so which experts of that multi-token-prediction "
                "layer matter is unknown; drop MTP layers (`mtp='drop'`)"
                f"{'' if narrows else ', or add the entry to the plan'}."
            )
        return self._plan[layer]


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
