"""Expert statistics: what one layer accumulates, and the file a whole model's statistics live in.

Every field adds (or takes a maximum or minimum), so merge(a, b) is observing both. Sums are float64
and counts int64: splitting batches differently moves a sum by at most about 1e-12 relative.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reap_kernels.documents import Format
from reap_kernels.errors import DataError, ShapeError, UsageError
from reap_kernels.files import replaced
from reap_kernels.model_match import merged_provenance
from reap_kernels.provenance import PROVENANCE
from reap_kernels.schema import Int, ListOf, Text, short
from reap_kernels.stats_values import check_parts, check_values
from reap_kernels.tensor_files import read_tensors, write_tensors

COUNTS = ("count", "nonfinite")
SUMS = ("router_weight_sum", "norm_sum", "weighted_norm_sum", "norm_sq_sum", "weighted_norm_sq_sum")
EXTREMA = ("out_max", "out_min")
FIELDS = (*COUNTS, *SUMS, *EXTREMA, "tokens")
OPTIONAL = (*SUMS, *EXTREMA)  # what statistics from elsewhere may lack
# Names of fields in files, where they differ. Files keep the names they had first.
_IN_FILES = {
    "router_weight_sum": "gate_sum",
    "weighted_norm_sum": "gate_norm_sum",
    "weighted_norm_sq_sum": "gate_norm_sq_sum",
}
_DTYPES = dict.fromkeys(SUMS, torch.float64) | dict.fromkeys(EXTREMA, torch.float32)
FORMAT = Format(
    "reap-stats",
    2,
    "statistics file",
    {
        "layers": ListOf(Text(500)),
        "groups": ListOf(Text(500), shortest=1),
        "parts": Int(0, 10_000),
        "provenance": PROVENANCE,
    },
    DataError,
    "make one with `reap-kernels observe`",
    {"missing": ListOf(Text(choices=tuple(_IN_FILES.get(name, name) for name in OPTIONAL)))},
    sealed=True,
)


def _recorded(name: str) -> property:
    """The property that reads a field which statistics may lack, so that nothing takes the zeros
    it was made with for sums.
    """
    kind = "sums" if name in SUMS else "extrema"
    place = (SUMS if name in SUMS else EXTREMA).index(name)

    def read(self: "LayerStats") -> Tensor:
        if name in self.missing:
            raise DataError(
                f"{name} is not recorded in these statistics, which another tool observed; "
                "observe the model with reap-kernels"
            )
        found: Tensor = getattr(self, kind)[place]
        return found

    return property(read)


class LayerStats:
    """Per (group, expert) statistics of one MoE layer, packed so that kernels write few tensors.

    With g the router weight and f the expert's output before it is multiplied by g, over the rows
    routed to the expert:

    | field | dtype, shape | value |
    |---|---|---|
    | `count` | int64 [G, E] | rows counted |
    | `nonfinite` | int64 [G, E] | rows whose norm was NaN or Inf: here and in no other field |
    | `router_weight_sum` | float64 [G, E] | sum g |
    | `norm_sum`, `norm_sq_sum` | float64 [G, E] | sum ||f||, sum ||f||^2 |
    | `weighted_norm_sum` | float64 [G, E] | sum g ||f|| |
    | `weighted_norm_sq_sum` | float64 [G, E] | sum (g ||f||)^2 |
    | `out_max`, `out_min` | float32 [G, E] | extreme elements of f; -inf, +inf when empty |
    | `tokens` | int64 [G] | tokens counted |

    Statistics that another tool observed may lack some of them: reading such a field raises
    DataError, and nothing can be added but by `merge_`, which leaves it out.

    Args:
        num_experts: E.
        num_groups: G, the number of calibration groups.
        device: where the tensors live.
        missing: names of fields that are not recorded, of `OPTIONAL`.

    Raises:
        ShapeError: less than one expert or group.
        DataError: `missing` names another field.

    Example:
        >>> import torch
        >>> import reap_kernels as rk
        >>> stats = rk.LayerStats(num_experts=4)
        >>> rk.accumulate(torch.ones(3, 2), torch.tensor([0, 0, 2]), torch.ones(3), stats)
        >>> stats.count
        tensor([[2, 0, 1, 0]])
    """

    def __init__(
        self,
        num_experts: int,
        num_groups: int = 1,
        device: torch.device | str = "cpu",
        missing: Collection[str] = (),
    ) -> None:
        if not set(missing) <= set(OPTIONAL):
            raise DataError(
                f"missing names {short(sorted(set(missing) - set(OPTIONAL)))}; only "
                f"{', '.join(OPTIONAL)} can be missing"
            )
        self.missing = frozenset(missing)
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
        self.missing = frozenset()
        self.counts, self.sums, self.extrema, self.tokens = packed
        return self

    def packed(self) -> list[Tensor]:
        """counts [2, G, E], sums [5, G, E], extrema [2, G, E], tokens [G], as kernels take them.

        Raises:
            DataError: see `check_complete`.
        """
        self.check_complete()
        return self._tensors()

    def check_complete(self) -> None:
        """Raises DataError where a field is not recorded: nothing more can be observed into it."""
        if self.missing:
            raise DataError(
                f"these statistics do not record {', '.join(sorted(self.missing))}, so nothing can "
                "be added to them; observe into new ones and merge"
            )

    def _tensors(self) -> list[Tensor]:
        return [self.counts, self.sums, self.extrema, self.tokens]

    def __repr__(self) -> str:
        return f"LayerStats(num_experts={self.num_experts}, tokens={self.tokens.tolist()})"

    count = property(lambda self: self.counts[0])
    nonfinite = property(lambda self: self.counts[1])
    router_weight_sum = _recorded("router_weight_sum")
    norm_sum = _recorded("norm_sum")
    weighted_norm_sum = _recorded("weighted_norm_sum")
    norm_sq_sum = _recorded("norm_sq_sum")
    weighted_norm_sq_sum = _recorded("weighted_norm_sq_sum")
    out_max = _recorded("out_max")
    out_min = _recorded("out_min")

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
        """The fields that are recorded, as views."""
        return {name: getattr(self, name) for name in FIELDS if name not in self.missing}

    def add_tokens(self, number: int, group: int = 0) -> None:
        """Counts `number` more tokens in `group`, for hosts that call `accumulate`."""
        self.tokens[group] += number

    def merge_(
        self, other: "LayerStats", groups: Sequence[int | None] | None = None
    ) -> "LayerStats":
        """Adds another layer's statistics in place. What either lacks, the result lacks.

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
        self.missing |= other.missing
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
            copy = LayerStats.from_packed([t.to(device, copy=True) for t in self._tensors()])
        copy.missing = self.missing
        return copy

    def regrouped(self, targets: Sequence[int | None], num_groups: int) -> "LayerStats":
        """A copy with other groups.

        Args:
            targets: for each group, the group of the copy it adds to; None leaves it out.
            num_groups: of the copy; groups that nothing adds to are empty.

        Raises:
            ShapeError: not one target per group, or a target that the copy does not have.
        """
        copy = LayerStats(self.num_experts, num_groups, self.device)
        return copy.merge_(self, targets)


@dataclass
class SaliencyStats:
    """Statistics of every MoE layer of a model, with where they came from.

    Attributes:
        layers: qualified name of the experts module -> its statistics; all with the same groups.
        groups: names of the calibration groups, in the order of the statistics' first dimension.
        provenance: JSON-serializable record of model, data, gate rule, software and backend.
        parts: disjoint shares of the calibration data, each with the layers, the groups and the
            provenance of the whole, which is their merge; without parts of their own. They say how
            far the scores depend on the sample. Empty where the data were not divided.

    Raises:
        ShapeError: a layer has more or fewer groups than `groups` names.

    Example:
        >>> import reap_kernels as rk
        >>> first, second = (
        ...     rk.SaliencyStats({"layers.0.mlp.experts": rk.LayerStats(4)}, [group])
        ...     for group in ("code", "chat")
        ... )
        >>> first.merge(second).groups
        ['code', 'chat']
    """

    layers: dict[str, LayerStats]
    groups: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    parts: list["SaliencyStats"] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, layer in self.layers.items():
            if layer.num_groups != len(self.groups):
                raise ShapeError(
                    f"layer {name} has statistics of {layer.num_groups} groups, but groups names "
                    f"{len(self.groups)}: {self.groups}; name each group, in order"
                )

    def __repr__(self) -> str:
        counts = f"layers={len(self.layers)}, groups={self.groups}, parts={len(self.parts)}"
        return f"SaliencyStats({counts}, model={(self.provenance.get('model') or {}).get('id')!r})"

    @property
    def missing(self) -> tuple[str, ...]:
        """Fields of `LayerStats` that some layer does not record, in their order; none of what
        reap-kernels observed.
        """
        lacking = frozenset[str]().union(*(layer.missing for layer in self.layers.values()))
        return tuple(name for name in FIELDS if name in lacking)

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

        Where the models differ in nothing that decides (see `reap_kernels.model_match`), what else
        differs is noted in the provenance.

        Equally many parts add one by one; otherwise the merged statistics have none, since there
        would be parts of unlike shares.

        Raises:
            DataError: the two come from models that do not match or different gate rules; the
                message names the field that differs.
        """
        if not isinstance(other, SaliencyStats):
            raise UsageError(f"other is a {type(other).__name__}; give statistics")
        provenance = merged_provenance(self.provenance, other.provenance, "cannot merge statistics")
        if list(self.layers) != list(other.layers):
            raise DataError(
                f"cannot merge statistics: layers is {list(self.layers)!r} here and "
                f"{list(other.layers)!r} there; merge observations of one model only"
            )
        groups = list(dict.fromkeys([*self.groups, *other.groups]))
        layers = {}
        for name, mine in self.layers.items():
            layers[name] = LayerStats(mine.num_experts, len(groups), mine.device)
            for part, names in ((mine, self.groups), (other.layers[name], other.groups)):
                layers[name].merge_(part, [groups.index(group) for group in names])
        parts = []
        if len(self.parts) == len(other.parts):
            pairs = zip(self.parts, other.parts, strict=True)
            parts = [mine.merge(theirs) for mine, theirs in pairs]
        return SaliencyStats(layers, groups, provenance, parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file (temporary sibling, fsync, rename).

        Raises:
            DataError: the provenance holds what could not be read again.
        """
        missing = self.missing
        recorded = [key for key in FIELDS if key not in missing]
        tensors = {
            f"{name}|{_IN_FILES.get(key, key)}": getattr(layer, key)
            for name, layer in self.layers.items()
            for key in recorded
        }
        for name in self.layers if self.parts else ():
            shares = [part.layers[name].fields() for part in self.parts]
            for key in recorded:  # [parts, ...]: few tensors, so that many layers load fast
                tensors[f"{name}|parts|{_IN_FILES.get(key, key)}"] = torch.stack(
                    [share[key] for share in shares]
                )
        content = {
            "layers": list(self.layers),
            "groups": self.groups,
            "parts": len(self.parts),
            "provenance": self.provenance,
        }
        if missing:
            content["missing"] = [_IN_FILES.get(name, name) for name in missing]
        with replaced(path) as temporary:
            write_tensors(tensors, temporary, FORMAT, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SaliencyStats":
        """Reads a file `save` wrote, onto the CPU.

        Raises:
            DataError: the file is missing, not statistics, of another version, damaged, or its
                numbers are none that an observation leaves; the message names layer and field.
        """
        content, tensors = read_tensors(path, FORMAT)
        try:
            return cls._of(content, tensors)
        except ValueError as error:
            raise FORMAT.refusal(path, str(error), ":") from error

    @classmethod
    def _of(cls, content: Mapping[str, Any], tensors: dict[str, Tensor]) -> "SaliencyStats":
        names, groups, provenance = content["layers"], content["groups"], content["provenance"]
        for field_name in ("layers", "groups"):
            if len(set(content[field_name])) < len(content[field_name]):
                raise ValueError(f"field {field_name!r} has a name twice")
        wholes, shares = {}, {}
        absent = content.get("missing", ())
        fields = [name for name in FIELDS if _IN_FILES.get(name, name) not in absent]
        for name in names:
            wholes[name] = _taken(tensors, name, [len(groups)], fields)
            experts = wholes[name]["count"].shape[-1]
            facts = provenance.get("layers", {}).get(name, {})
            if facts.get("num_experts", experts) != experts:
                raise ValueError(
                    f"layer {name}: num_experts is {facts['num_experts']} in its provenance; "
                    f"expected {experts}"
                )
            rows = facts.get("top_k", experts)
            check_values(name, wholes[name], rows)
            if content["parts"]:
                shape = [content["parts"], len(groups)]
                shares[name] = _taken(tensors, f"{name}|parts", shape, fields)
                check_values(name, shares[name], rows)
                check_parts(name, wholes[name], shares[name])
        if tensors:
            raise ValueError(f"has the tensor {short(min(tensors))}, which no layer has")
        layers = {name: _layer(fields) for name, fields in wholes.items()}
        parts = [
            cls({name: _layer(stack, part) for name, stack in shares.items()}, groups, provenance)
            for part in range(content["parts"])
        ]
        return cls(layers, groups, provenance, parts)


def _taken(
    tensors: dict[str, Tensor], prefix: str, shape: list[int], fields: Sequence[str]
) -> dict[str, Tensor]:
    """The fields of one layer, taken out of `tensors`: [*shape, E] each, `tokens` [*shape]."""
    found = {}
    stored = {key: f"{prefix}|{_IN_FILES.get(key, key)}" for key in fields}
    for key, name in stored.items():
        if name not in tensors:
            raise ValueError(f"tensor '{name}' is missing")
        found[key] = tensors.pop(name)
    experts = found["count"].shape[-1:]
    for key, tensor in found.items():
        wanted = (*shape, *(() if key == "tokens" else experts))
        dtype = _DTYPES.get(key, torch.int64)
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype or not tensor.numel():
            raise ValueError(
                f"tensor '{stored[key]}' is {tensor.dtype} {list(tensor.shape)}; expected "
                f"{dtype} {list(wanted)}, an expert at least"
            )
    return found


def _layer(fields: Mapping[str, Tensor], part: int | None = None) -> LayerStats:
    """Statistics that are a copy of these fields, [G, E] each, or of one part of [P, G, E]."""
    groups, experts = fields["count"].shape[-2:]
    layer = LayerStats(experts, groups, missing=[key for key in OPTIONAL if key not in fields])
    for key, view in layer.fields().items():
        view.copy_(fields[key] if part is None else fields[key][part])
    return layer
