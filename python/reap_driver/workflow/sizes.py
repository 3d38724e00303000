"""Sizes of a model before and after pruning, and how much must go for it to have a size."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from reap_driver.base.units import in_bytes, row, short
from reap_driver.compat.config_file import read_config
from reap_driver.files.checkpoint import Checkpoint, open_checkpoint
from reap_driver.memory.cache_size import CacheSize, cache_size
from reap_driver.memory.checkpoint_size import CheckpointSize, estimated, run_dtype, stored_files
from reap_driver.memory.decision import SHARE
from reap_driver.memory.model_sizes import model_sizes
from reap_driver.model.discover import find_moe_layers
from reap_driver.model.stacks import Stack
from reap_driver.planning.amount import Amount, smallest_within
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.serving import served_advice
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.jobs import EstimateOptions
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import WriteOptions
from reap_driver.workflow.rank_options import (
    CONTEXT,
    AllocationOptions,
    BudgetOptions,
    RankOptions,
)
from reap_driver.workflow.ranking import foreseen, planned, ratios
from reap_driver.workflow.shape_choice import ShapeChoice
from reap_driver.writer.apply import OutputSize, output_size
from reap_driver.writer.narrowing import smaller_model
from reap_driver.writer.plan_checks import check_counts
from reap_driver.writer.pruned_model import stacks_of_files
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError

Pair = tuple[int, int]  # before and after pruning
_SHARE = Fraction(str(SHARE))


@dataclass(frozen=True)
class Leaves:
    """What a plan leaves of a model.

    Attributes:
        experts: of each MoE layer.
        neurons: of each expert, of the MoE layers whose experts lose some.
        ratio: share of experts that was asked to be removed.
        shared: whether scores decide how many each layer loses; then `experts` is one possibility.
        parameters: of the model, multi-token-prediction layers left out.
        active_parameters: used for one token.
        weights: bytes of the weight files.
        exact: whether those of the output are exact; else they are estimated.
        mtp: bytes of multi-token-prediction layers, which `weights` counts where it is exact.
        output: bytes of the whole output.
        context: tokens whose cache is counted.
        cache: the key-value cache.
        limit: `target_size` or `fits`, by name and in bytes, where one of them was given.
    """

    experts: dict[str, Pair]
    neurons: dict[str, Pair]
    ratio: float
    shared: bool
    parameters: Pair
    active_parameters: Pair
    weights: Pair
    exact: bool
    mtp: Pair
    output: int
    context: int
    cache: CacheSize
    limit: tuple[str, int] | None

    @property
    def memory(self) -> int:
        """Bytes of weights and cache, where the result runs."""
        return self.weights[1] + self.cache.of(self.context)

    def lines(self) -> list[str]:
        """The sizes as lines of text."""
        how = "exact" if self.exact else "estimated"
        weights, cache = self.weights[1], self.cache.of(self.context)
        name, size = self.limit or ("", 0)
        bound = f", of at most {in_bytes(size)}" if name == "target_size" else ""
        parts = f"weights {in_bytes(weights)} + cache of {self.context:,} tokens {in_bytes(cache)}"
        lines = [
            row("experts", f"{_counts(self.experts, shared=self.shared)} (ratio {self.ratio:g})"),
            *([row("neurons", f"{_pairs(self.neurons)} in each expert")] if self.neurons else []),
            row("parameters", _change(self.parameters, _count)),
            row("active", f"{_change(self.active_parameters, _count)} used for a token"),
            row("weights", f"{_change(self.weights, in_bytes)} in files ({how}){bound}"),
            row("to run it", f"{in_bytes(self.memory)} = {parts}"),
        ]
        if self.mtp[0]:
            left = in_bytes(self.mtp[1]) if self.mtp[1] else "none"
            mtp = f"of which multi-token-prediction layers {in_bytes(self.mtp[0])} -> {left}"
            lines.insert(-1, row("", mtp))
        if name == "fits":
            share = in_bytes(math.floor(_SHARE * size))
            lines.append(row("", f"of at most {share}, which is {SHARE:.0%} of {in_bytes(size)}"))
        if self.cache.uncounted:
            named = ", ".join(sorted(self.cache.uncounted))
            lines.append(row("", f"without what {named} keeps, whose size is not known"))
        return lines

    def facts(self) -> dict[str, Any]:
        """The sizes as JSON values; sizes are in bytes."""
        return {
            "ratio": self.ratio,
            "experts_by_layer": {name: list(pair) for name, pair in self.experts.items()},
            "neurons_by_layer": {name: list(pair) for name, pair in self.neurons.items()},
            "parameters": list(self.parameters),
            "active_parameters": list(self.active_parameters),
            "weight_bytes": list(self.weights),
            "exact": self.exact,
            "mtp_bytes": list(self.mtp),
            "output_bytes": self.output,
            "context": self.context,
            "cache_bytes": self.cache.of(self.context),
            "cache_bytes_per_token": self.cache.per_token,
            "cache_uncounted": sorted(self.cache.uncounted),
            "memory_bytes": self.memory,
        }


class Sizing:
    """The sizes of one model for any plan.

    Args:
        model: what is known of it.
        folder: its checkpoint, or a folder that only has its config.json; or its hub id.
        files: size of its files; None where there are none, and sizes are estimated.
        write: how the output is written.
        dtype: of the model, where neither its configuration nor its weights tell.
        trust: run model code that comes with the checkpoint.
        force: plans may have been made for a model with other routing or sizes.

    Raises:
        CheckpointError, DataError: the configuration does not tell the size of the weights.
    """

    def __init__(
        self,
        model: Model,
        folder: str | Path,
        files: CheckpointSize | None,
        write: WriteOptions,
        *,
        dtype: str,
        trust: bool,
        force: bool = False,
    ) -> None:
        self._force = force
        self.model, self._folder, self._write, self._trust = model, Path(folder), write, trust
        self._raw = read_config(folder)
        self._dtype = _own_dtype(dtype, model, files)
        before = files or estimated(model.meta, model.config, self._dtype)
        self._exact, self._before = before.origin == "headers", before.file_bytes or before.nbytes
        self._known: dict[tuple[tuple[int, int | None], ...], OutputSize] = {}

    @cached_property
    def _source(self) -> Checkpoint:
        """The headers, which are read once for all plans."""
        return open_checkpoint(self._folder)

    def amount(
        self, rank: RankOptions, ratios: Sequence[float], plans: Callable[[Amount], list[Plan]]
    ) -> Amount:
        """The smallest amount with which the size that `rank` gives is kept.

        Args:
            rank: with `target_size` or `fits`.
            ratios: those that lead to different numbers of experts, ascending.
            plans: what an amount can lead to.

        Raises:
            PlanError: the model has that size as it is, or cannot be made so small.
            DataError: `context` is longer than the model's positions.
        """
        assert rank.limit is not None
        name, size = rank.limit
        limit, asked = size, {name: size}
        if name == "fits":
            asked["context"] = self.context(rank)
            limit = math.floor(_SHARE * size) - self.cache.of(asked["context"])

        def largest(ratio: float) -> int:
            return self.files(self.largest(plans(Amount(ratio, asked)))).weights

        whole = self._before
        if whole <= limit:
            cache = in_bytes(self.cache.of(asked.get("context", 0)))
            cached = f" and the cache {cache}" if name == "fits" else ""
            raise PlanError(
                f"`{name}={_given(size)}`: nothing has to be pruned for that: the weights take "
                f"{in_bytes(whole)}{cached}; use the model as it is, or give a smaller size"
            )
        found = smallest_within(ratios, largest, limit, whole)
        if found is None:
            most, least = (self.largest(plans(Amount(r, asked))) for r in (ratios[0], ratios[-1]))
            raise PlanError(self._unreachable(name, asked, most, least))
        return Amount(found, asked)

    def largest(self, plans: Sequence[Plan]) -> Plan:
        """The plan that leaves most."""
        return max(plans, key=lambda plan: self.files(plan).weights)

    def leaves(self, plan: Plan, rank: RankOptions) -> Leaves:
        """What a plan leaves; `rank` may give the context."""
        model, smaller, output = self.model, self._smaller(plan), self.files(plan)
        sizes = [
            model_sizes(one, layers, dtype=self._dtype, seq_len=1)
            for one, layers in ((model.meta, model.layers), (smaller, find_moe_layers(smaller)))
        ]
        return Leaves(
            experts=self._counts(plan),
            neurons=plan.widths,
            ratio=plan.ratio,
            shared=plan.allocation == "global",
            parameters=(sizes[0].parameters, sizes[1].parameters),
            active_parameters=(sizes[0].active_parameters, sizes[1].active_parameters),
            weights=(self._before, output.weights),
            exact=self._exact,
            mtp=output.mtp,
            output=output.total,
            context=self.context(rank),
            cache=self.cache,
            limit=rank.limit,
        )

    def files(self, plan: Plan) -> OutputSize:
        """Sizes of the files that a plan leads to: from the writer where there are weights, else
        estimated from the configuration.
        """
        left = tuple((len(layer.kept), layer.narrow_width) for layer in plan.layers.values())
        if left not in self._known:
            self._known[left] = self._computed(plan)
        return self._known[left]

    @cached_property
    def cache(self) -> CacheSize:
        """The key-value cache, which pruning does not change."""
        return cache_size(self.model.meta, self.model.layers, self._dtype)

    def context(self, rank: RankOptions) -> int:
        """Tokens whose cache is counted.

        Raises:
            DataError: more than the model has positions.
        """
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(longest, int):
            return rank.context or CONTEXT
        if rank.context is not None and rank.context > longest:
            raise DataError(
                f"`context={rank.context}` is longer than the {longest} positions "
                f"{self.model.path} was made for (max_position_embeddings); give "
                f"`context={longest}` or less"
            )
        return rank.context or min(CONTEXT, longest)

    def _computed(self, plan: Plan) -> OutputSize:
        write, trust = self._write, self._trust
        if self._exact:
            return output_size(
                self._source,
                plan,
                mtp=write.mtp,
                shard_size=write.shard_bytes,
                non_uniform=write.non_uniform,
                trust_remote_code=trust,
                force_model=self._force,
            )
        smaller = self._smaller(plan)
        nbytes = estimated(smaller, smaller.config, self._dtype).nbytes
        return OutputSize(nbytes, nbytes)

    def _smaller(self, plan: Plan) -> PreTrainedModel:
        """The pruned model, on the meta device."""
        counts, stacks = self._counts(plan), self._stacks
        write = self._write
        check_counts(plan, stacks, counts, non_uniform=write.non_uniform, mtp=write.mtp)
        whole, meta, trust = plan.covering(self._experts), self.model.meta, self._trust
        return smaller_model(self._folder, meta, self._raw, whole, stacks, trust=trust)

    @cached_property
    def _stacks(self) -> list[Stack]:
        """The stacks of the checkpoint, which are the same for every plan."""
        folder, meta, trust = self._folder, self.model.meta, self._trust
        return stacks_of_files(folder, meta, self._raw, self._experts, trust_remote_code=trust)

    @cached_property
    def _experts(self) -> dict[str, int]:
        """{MoE layer: its experts}."""
        return {layer.name: layer.num_experts for layer in self.model.layers}

    def _counts(self, plan: Plan) -> dict[str, Pair]:
        """{MoE layer: its experts before and after}."""
        kept = plan.covering(self._experts).kept
        return {name: (number, len(kept[name])) for name, number in self._experts.items()}

    def _unreachable(self, name: str, asked: Mapping[str, int], most: Plan, least: Plan) -> str:
        """Why a size cannot be reached, with the smallest that can.

        Args:
            name: of the option.
            asked: its value, and the context.
            most, least: plans that leave most and least.
        """
        weights = smallest = self.files(least).weights
        how, cached, remedy = "" if self._exact else " (estimated)", "", ""
        if name == "fits":
            cache = self.cache.of(asked["context"])
            smallest = math.ceil((weights + cache) / _SHARE)
            cached = f", and the cache of {asked['context']:,} tokens {cache:,}"
            remedy = ", a shorter `context`"
        return (
            f"`{name}={_given(asked[name])}` cannot be reached: with {_left(least)}, the fewest "
            f"that can be left, the weights take {weights:,} bytes{how}, of which "
            f"{in_bytes(self._rest(most, least))} are in no routed expert{cached}; the smallest "
            f"that can be reached is {smallest:,} bytes; give `{name}={_up(smallest)}`{remedy} or "
            "a quantized checkpoint of the model"
        )

    def _rest(self, most: Plan, least: Plan) -> int:
        """Bytes of all but experts and their rows of routers, from two plans' sizes."""
        (many, large), (few, small) = (
            (sum(after for _, after in self._counts(plan).values()), self.files(plan).weights)
            for plan in (most, least)
        )
        if many == few:  # only one number of experts is possible
            before, after = self.files(least).mtp
            dropped = before if after == 0 else 0
            many, large = sum(self._experts.values()), self._before - dropped
        return small - few * (large - small) // (many - few)


def _own_dtype(wanted: str, model: Model, files: CheckpointSize | None) -> torch.dtype:
    """The dtype of the checkpoint, in which the result runs, whatever the model is observed in."""
    try:
        return run_dtype("auto", model.config, files)
    except DataError:
        if wanted == "auto":
            raise
        return run_dtype(wanted, model.config, files)


def sizing_of(
    model: Model, write: WriteOptions, *, dtype: str, trust: bool, force: bool = False
) -> Sizing:
    """The sizes of a model whose weights are here; see `Sizing`."""
    folder = model.source.folder
    files = stored_files(folder, model.config)
    return Sizing(model, folder, files, write, dtype=dtype, trust=trust, force=force)


def foreseen_amount(
    sizing: Sizing,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions,
) -> Amount | None:
    """The amount that keeps a size, before any statistics; None where `rank` gives no size.

    Raises:
        PlanError, DataError: see `Sizing.amount`.
    """
    if rank.limit is None:
        return None
    blank = sizing.model.blank_scores()
    found = ratios(blank, rank, budget, allocation)
    return sizing.amount(
        rank, found, lambda amount: foreseen(blank, rank, budget, allocation, amount)
    )


def sized_plan(
    sizing: Sizing | None,
    scores: Scores,
    rank: RankOptions,
    budget: BudgetOptions,
    allocation: AllocationOptions | None = None,
    stats: SaliencyStats | None = None,
) -> Plan:
    """The plan that options ask for; with sizes, the one that removes least of those that keep it.

    Args:
        sizing: of the model; None where `rank` gives no size.
        scores, rank, budget, allocation, stats: see `planned`.

    Raises:
        PlanError, DataError: see `planned` and `Sizing.amount`.
    """

    def made(amount: Amount | None) -> Plan:
        return planned(scores, rank, budget, allocation, stats, amount)

    if sizing is None:
        return made(None)
    found = ratios(scores, rank, budget, allocation, stats)
    return made(sizing.amount(rank, found, lambda amount: [made(amount)]))


def leaves_of(options: EstimateOptions, sizing: Sizing, listener: Listener) -> Leaves:
    """What pruning with these options would leave, before any statistics.

    Raises:
        PlanError, DataError, CheckpointError: what `prune` would raise before the weights are read.
    """
    rank, budget, allocation = options.rank, options.budget, options.allocation
    model = sizing.model
    if options.shape.shape is not None:
        choice = ShapeChoice.of(options.shape, rank, model.blank_scores())
        plan = choice.foreseen()
        if len(choice.shapes) > 1:
            listener.note(
                f"the run chooses from {', '.join(map(str, choice.shapes))}; these sizes are of "
                f"{plan.shape or choice.shapes[0]}"
            )
    else:
        amount = foreseen_amount(sizing, rank, budget, allocation)
        plan = sizing.largest(foreseen(model.blank_scores(), rank, budget, allocation, amount))
    for note in [*plan.notes, *served_advice(plan, model.provenance["layers"])]:
        listener.note(note)
    return sizing.leaves(plan, rank)


def _given(size: int) -> str:
    """A size as it can be given."""
    number, unit = in_bytes(size).split()
    return f"{float(number):g}{unit}"


def _up(size: int) -> str:
    """A size as it can be given, rounded up to three digits."""
    step = 10 ** max(0, len(str(size)) - 3)
    return _given(-(-size // step) * step)


def _left(plan: Plan) -> str:
    """The experts that a plan leaves, in words."""
    layers = [(len(layer.kept), layer.num_experts) for layer in plan.layers.values()]
    if len(set(layers)) == 1:
        return f"{layers[0][0]} of {layers[0][1]} experts in each of {len(layers)} layers"
    kept, experts = map(sum, zip(*layers, strict=True))
    return f"{kept} of {experts} experts in {len(layers)} layers together"


def _counts(experts: Mapping[str, Pair], *, shared: bool = False) -> str:
    """Experts before and after, in words: per layer, or, where layers share a loss, in all."""
    if shared:
        whole, kept = map(sum, zip(*experts.values(), strict=True))
        return f"{whole} -> {kept} experts in {len(experts)} layers together"
    return f"{_pairs(experts)} experts in each of {len(experts)} layers"


def _pairs(found: Mapping[str, Pair]) -> str:
    """Numbers before and after, in words."""
    pairs = sorted(set(found.values()))
    if len(pairs) <= 2:
        return " and ".join(f"{before} -> {after}" for before, after in pairs)
    before, after = (sorted({pair[n] for pair in pairs}) for n in (0, 1))
    return f"{_range(before)} -> {_range(after)}"


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _count(number: int) -> str:
    return short(number, "kMBT")


def _change(pair: Pair, text: Callable[[int], str]) -> str:
    return f"{text(pair[0])} -> {text(pair[1])}"
