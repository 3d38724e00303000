"""What conversions are about: the model a file is of, and what a file is written from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reap_driver.planning.plan import Plan
from reap_driver.planning.selection import layer_number
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError
from reap_kernels.schema import short


@dataclass(frozen=True)
class ModelFacts:
    """The model that a file is of.

    Attributes:
        record: `model` and `layers`, as the provenance of statistics has them.
        decoder_layers: how many there are, without experts or with; None where it was not looked
            up, for formats that do not need it.
    """

    record: Mapping[str, Any]
    decoder_layers: int | None = None

    @property
    def layers(self) -> Mapping[str, Mapping[str, Any]]:
        """Facts of each MoE layer by its name; other tools' files know no MTP layers."""
        recorded: Mapping[str, Mapping[str, Any]] = self.record.get("layers") or {}
        return {name: facts for name, facts in recorded.items() if facts.get("mtp") is not True}

    @property
    def name(self) -> str:
        """Path or hub id of the model; empty where it is not recorded."""
        return str((self.record.get("model") or {}).get("id") or "")

    def experts(self, layer: str) -> int:
        """Number of experts of a layer."""
        return int(self.layers[layer]["num_experts"])

    def numbers(self) -> dict[int, str]:
        """{number of the decoder layer: name of its MoE layer}, as other tools count them.

        Raises:
            PlanError: two MoE layers have one number, or one has none.
        """
        found: dict[int, str] = {}
        for name in self.layers:
            number = layer_number(name)
            if number is None:
                raise PlanError(
                    f"layer {name}: has no number in its name, by which other tools know layers; "
                    "this model's plans and statistics cannot be exchanged with them"
                )
            if number in found:
                raise PlanError(
                    f"layers {found[number]} and {name} both have the number {number}, by which "
                    "other tools know layers; plans and statistics of a model with two stacks of "
                    "layers cannot be exchanged with them"
                )
            found[number] = name
        return found


@dataclass(frozen=True)
class Source:
    """What a file is written from.

    Attributes:
        model: whose it is.
        stats: statistics, for formats made from them.
        plan: for formats made from one; of others, the plan that says which experts are left.
        criterion: that ranks experts.
        ep: devices that experts are placed on.
        bits: of a weight of an expert, on average over the experts.
    """

    model: ModelFacts
    stats: SaliencyStats | None = None
    plan: Plan | None = None
    criterion: str = "reap"
    ep: int | None = None
    bits: float | None = None

    def statistics(self) -> SaliencyStats:
        """The statistics of the model's layers.

        They leave out its multi-token-prediction layer, which is none of its decoder layers.

        Raises:
            DataError: nothing says how a layer routes.
        """
        assert self.stats is not None  # the table says that the format is made from them
        known, observed, last = self.model.layers, self.stats.layers, self.model.decoder_layers
        recorded = self.model.record.get("layers") or {}
        for name in observed:
            number = layer_number(name)
            if name not in recorded and (last is None or number is None or number < last):
                raise DataError(
                    f"layer {name}: neither statistics nor model say how it routes; observe with "
                    'reap-kernels, or add it to provenance["layers"]'
                )
        layers = {name: layer for name, layer in observed.items() if name in known}
        return SaliencyStats(layers, self.stats.groups, self.stats.provenance)

    def all_statistics(self, what: str) -> SaliencyStats:
        """The statistics, of every MoE layer of the model.

        Args:
            what: the file in words.

        Raises:
            DataError: see `statistics`; or a layer was not observed.
        """
        stats = self.statistics()
        wanted = [*self.model.layers, *stats.provenance.get("unobserved", ())]
        for name in wanted:
            if name not in stats.layers:
                raise DataError(
                    f"layer {name}: is not in the statistics, and the {what} is of all layers; "
                    "observe data whose tokens reach it"
                )
        return stats

    def experts_plan(self, what: str) -> Plan:
        """The plan, one of whole experts.

        Args:
            what: the file in words.

        Raises:
            PlanError: the plan removes neurons or changes experts that it keeps.
        """
        assert self.plan is not None
        if self.plan.compensates:
            raise PlanError(
                f"the plan changes experts that it keeps (it removes neurons of them, or solves "
                f"them again), which no {what} can say; write its checkpoint with `reap-kernels "
                "apply`"
            )
        return self.plan

    def kept(self, layer: str) -> Sequence[int]:
        """Experts of a layer that the plan, if there is one, leaves; ascending."""
        if self.plan is None or layer not in self.plan.layers:
            return range(self.model.experts(layer))
        return self.plan.layers[layer].kept


def uniform_count(source: Source, what: str) -> int:
    """How many experts each layer is left with.

    Raises:
        PlanError: layers are left with different numbers, which the tool cannot read.
    """
    counts = {name: len(source.kept(name)) for name in source.model.layers}
    if len(set(counts.values())) > 1:
        raise PlanError(
            f"layers keep different numbers of experts, {short(counts)}, and the {what} has one "
            "for all; plan with the allocation `uniform`"
        )
    return next(iter(counts.values()))
