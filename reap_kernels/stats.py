"""Expert statistics: what one layer accumulates, and the file a whole model's statistics live in.

Every field adds (or takes a maximum or minimum), so merge(a, b) is observing both. Sums are float64
and counts int64: splitting batches differently moves a sum by at most about 1e-12 relative.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reap_kernels.errors import DataError, ShapeError
from reap_kernels.files import replaced, save_tensors

COUNTS = ("count", "nonfinite")
SUMS = ("gate_sum", "norm_sum", "gate_norm_sum", "norm_sq_sum", "gate_norm_sq_sum")
EXTREMA = ("out_max", "out_min")
FIELDS = (*COUNTS, *SUMS, *EXTREMA, "tokens")
FORMAT = "reap-stats"
VERSION = 1


class LayerStats:
    """Per (group, expert) statistics of one MoE layer, packed so that kernels write few tensors.

    With g the gate weight that combines and f the expert's output before it, over the rows routed
    to the expert:

    | field | dtype, shape | value |
    |---|---|---|
    | `count` | int64 [G, E] | rows counted |
    | `nonfinite` | int64 [G, E] | rows whose norm was NaN or Inf: here and in no other field |
    | `gate_sum`, `norm_sum`, `gate_norm_sum` | float64 [G, E] | sum g, sum ||f||, sum g ||f|| |
    | `norm_sq_sum`, `gate_norm_sq_sum` | float64 [G, E] | sum ||f||^2, sum (g ||f||)^2 |
    | `out_max`, `out_min` | float32 [G, E] | extreme elements of f; -inf, +inf when empty |
    | `tokens` | int64 [G] | tokens counted |

    Args:
        num_experts: E.
        num_groups: G, the number of calibration groups.
        device: where the tensors live.
    """

    def __init__(
        self, num_experts: int, num_groups: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        if num_experts < 1 or num_groups < 1:
            raise ShapeError(
                f"LayerStats needs at least one expert and one group, got {num_experts} experts "
                f"and {num_groups} groups"
            )
        shape = (num_groups, num_experts)
        # Statistics outlive the forward pass, so they are never inference tensors.
        with torch.inference_mode(False):
            self.counts = torch.zeros(len(COUNTS), *shape, dtype=torch.int64, device=device)
            self.sums = torch.zeros(len(SUMS), *shape, dtype=torch.float64, device=device)
            self.extrema = torch.empty(len(EXTREMA), *shape, dtype=torch.float32, device=device)
            self.extrema[0].fill_(-torch.inf)
            self.extrema[1].fill_(torch.inf)
            self.tokens = torch.zeros(num_groups, dtype=torch.int64, device=device)

    @classmethod
    def from_packed(cls, packed: Sequence[Tensor]) -> "LayerStats":
        """Wraps the tensors of `packed()` without copying them."""
        self = cls.__new__(cls)
        self.counts, self.sums, self.extrema, self.tokens = packed
        return self

    def packed(self) -> list[Tensor]:
        """counts [2, G, E], sums [5, G, E], extrema [2, G, E], tokens [G], as kernels take them."""
        return [self.counts, self.sums, self.extrema, self.tokens]

    count = property(lambda self: self.counts[0])
    nonfinite = property(lambda self: self.counts[1])
    gate_sum = property(lambda self: self.sums[0])
    norm_sum = property(lambda self: self.sums[1])
    gate_norm_sum = property(lambda self: self.sums[2])
    norm_sq_sum = property(lambda self: self.sums[3])
    gate_norm_sq_sum = property(lambda self: self.sums[4])
    out_max = property(lambda self: self.extrema[0])
    out_min = property(lambda self: self.extrema[1])

    @property
    def num_groups(self) -> int:
        """G."""
        return self.counts.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.counts.device

    def fields(self) -> dict[str, Tensor]:
        """The named fields, as views."""
        return {name: getattr(self, name) for name in FIELDS}

    def add_tokens(self, number: int, group: int = 0) -> None:
        """Counts `number` more tokens in `group`, for hosts that call `accumulate`."""
        self.tokens[group] += number

    def merge_(
        self, other: "LayerStats", groups: Sequence[int | None] | None = None
    ) -> "LayerStats":
        """Adds another layer's statistics in place.

        Args:
            other: same number of experts.
            groups: for each group of `other`, the group of `self` it adds to, or None to leave it
                out; default the same.

        Raises:
            ShapeError: different numbers of experts, or a group that `self` does not have.
        """
        groups = range(other.num_groups) if groups is None else groups
        if other.num_experts != self.num_experts or len(groups) != other.num_groups:
            raise ShapeError(
                f"cannot merge statistics of {other.num_experts} experts and {other.num_groups} "
                f"groups into {self.num_experts} experts by {len(groups)} groups"
            )
        if any(group is not None and not 0 <= group < self.num_groups for group in groups):
            raise ShapeError(f"groups {list(groups)} leave 0..{self.num_groups - 1}; grow_groups")
        for source, target in enumerate(groups):
            if target is None:
                continue
            self.counts[:, target] += other.counts[:, source].to(self.device)
            self.sums[:, target] += other.sums[:, source].to(self.device)
            self.tokens[target] += other.tokens[source].to(self.device)
            high, low = other.extrema[:, source].to(self.device)
            self.extrema[0, target] = torch.maximum(self.extrema[0, target], high)
            self.extrema[1, target] = torch.minimum(self.extrema[1, target], low)
        return self

    def grow_groups(self, num_groups: int) -> None:
        """Makes room for groups up to `num_groups`; existing ones keep their values."""
        if num_groups > self.num_groups:
            grown = LayerStats(self.num_experts, num_groups, self.device)
            grown.merge_(self)
            self.counts, self.sums = grown.counts, grown.sums
            self.extrema, self.tokens = grown.extrema, grown.tokens

    def total(self) -> "LayerStats":
        """All groups together, as one group."""
        summed = LayerStats(self.num_experts, 1, self.device)
        return summed.merge_(self, [0] * self.num_groups)

    def to(self, device: torch.device | str) -> "LayerStats":
        """A copy on `device`."""
        with torch.inference_mode(False):
            return LayerStats.from_packed([t.to(device, copy=True) for t in self.packed()])

    def regrouped(self, targets: Sequence[int | None], num_groups: int) -> "LayerStats":
        """A copy with other groups.

        Args:
            targets: for each group, the group of the copy it adds to; None leaves it out.
            num_groups: of the copy; groups that nothing adds to are empty.

        Raises:
            ShapeError: not one target a group, or a target that the copy does not have.
        """
        copy = LayerStats(self.num_experts, num_groups, self.device)
        return copy.merge_(self, targets)


@dataclass
class SaliencyStats:
    """Statistics of every MoE layer of a model, with where they came from.

    Attributes:
        layers: qualified name of the experts module -> its statistics; all with the same groups.
        groups: names of the calibration groups, in the order of the statistics' first dimension.
        provenance: JSON-serialisable record of model, data, gate rule, software and backend.
        parts: disjoint shares of the calibration data, each with the layers, the groups and the
            provenance of the whole, which is their merge; without parts of their own. They say how
            far the scores depend on the sample. Empty where the data were not divided.
    """

    layers: dict[str, LayerStats]
    groups: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    parts: list["SaliencyStats"] = field(default_factory=list)

    def check_finite(self) -> None:
        """Raises DataError if any expert produced NaN or Inf, naming layer, group and count."""
        for name, layer in self.layers.items():
            per_group = layer.nonfinite.sum(dim=1).tolist()
            for group, bad in zip(self.groups, per_group, strict=True):
                if bad:
                    experts = layer.nonfinite[self.groups.index(group)].nonzero().flatten().tolist()
                    raise DataError(
                        f"layer {name}, group {group!r}: {bad} expert outputs were NaN or Inf "
                        f"(experts {experts[:8]}{'...' if len(experts) > 8 else ''}); check the "
                        "checkpoint's weights, or load it in a wider dtype"
                    )

    def merge(self, other: "SaliencyStats") -> "SaliencyStats":
        """Both observations as one; groups of the same name add.

        Equally many parts add one by one; otherwise the merged statistics have none, since there
        would be parts of unlike shares.

        Raises:
            DataError: the two come from different models or gate rules; the message names the
                field that differs.
        """
        for key, mine, theirs in (
            ("model", self.provenance.get("model"), other.provenance.get("model")),
            ("gate", self.provenance.get("gate"), other.provenance.get("gate")),
            ("layers", list(self.layers), list(other.layers)),
        ):
            if _identity(mine) != _identity(theirs):
                raise DataError(
                    f"cannot merge statistics: {key} is {_identity(mine)!r} here and "
                    f"{_identity(theirs)!r} there; merge observations of one model only"
                )
        groups = list(dict.fromkeys([*self.groups, *other.groups]))
        layers = {}
        for name, mine in self.layers.items():
            layers[name] = LayerStats(mine.num_experts, len(groups), mine.device)
            for part, names in ((mine, self.groups), (other.layers[name], other.groups)):
                layers[name].merge_(part, [groups.index(group) for group in names])
        data = [*self.provenance.get("data", []), *other.provenance.get("data", [])]
        parts = []
        if len(self.parts) == len(other.parts):
            pairs = zip(self.parts, other.parts, strict=True)
            parts = [mine.merge(theirs) for mine, theirs in pairs]
        return SaliencyStats(layers, groups, {**self.provenance, "data": data}, parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (temporary sibling, fsync, rename)."""
        tensors = {
            f"{name}|{key}": value.detach().cpu().contiguous()
            for name, layer in self.layers.items()
            for key, value in layer.fields().items()
        }
        for name in self.layers if self.parts else ():
            shares = [part.layers[name].fields() for part in self.parts]
            for key in FIELDS:  # [parts, ...]: few tensors, so that many layers load fast
                stack = [share[key].detach().cpu() for share in shares]
                tensors[f"{name}|parts|{key}"] = torch.stack(stack)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "layers": json.dumps(list(self.layers)),
            "groups": json.dumps(self.groups),
            "parts": str(len(self.parts)),
            "provenance": json.dumps(self.provenance),
        }
        with replaced(path) as temporary:
            save_tensors(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SaliencyStats":
        """Reads a file `save` wrote, onto the CPU.

        Raises:
            DataError: the file is missing, not statistics, of another version, or incomplete.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"statistics file {path} cannot be read: {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise DataError(
                f"{path} is not a statistics file of version {VERSION} (format "
                f"{metadata.get('format')!r}, version {metadata.get('version')!r}); make one with "
                "`reap-kernels observe`"
            )
        try:
            groups: list[str] = json.loads(metadata["groups"])
            names: list[str] = json.loads(metadata["layers"])
            provenance = json.loads(metadata["provenance"])
            layers = _layers_from(tensors, names, len(groups))
            # A file from before there were parts has none.
            parts = [
                cls(_layers_from(tensors, names, len(groups), part), groups, provenance)
                for part in range(int(metadata.get("parts", "0")))
            ]
            return cls(layers, groups, provenance, parts)
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"statistics file {path} is incomplete: {error}; observe again"
            ) from error


def _identity(value: Any) -> Any:
    """What must agree for two observations to be of one model: its digest, not its path."""
    return value.get("config_digest") if isinstance(value, Mapping) else value


def _layers_from(
    tensors: Mapping[str, Tensor], names: Sequence[str], num_groups: int, part: int | None = None
) -> dict[str, LayerStats]:
    """Layers of the whole, or of one part: its entry of the fields stacked over parts."""
    layers = {}
    for name in names:
        prefix = name if part is None else f"{name}|parts"
        saved = {key: tensors[f"{prefix}|{key}"] for key in FIELDS}
        if part is not None:
            saved = {key: stack[part] for key, stack in saved.items()}
        layers[name] = LayerStats(saved["count"].shape[-1], num_groups)
        for key, view in layers[name].fields().items():
            if saved[key].shape != view.shape or saved[key].dtype != view.dtype:
                raise ValueError(f"{prefix}|{key} is {saved[key].dtype} {tuple(saved[key].shape)}")
            view.copy_(saved[key])
    return layers
