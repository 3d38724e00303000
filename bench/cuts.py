"""The methods that `bench.methods_cpu` compares: how each cuts the bundled model."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.compensation.constants import expert_constants
from reap_driver.compensation.shapes import Shape
from reap_driver.compensation.shaping import Shaping
from reap_kernels import LayerGram

BATCH = 4
# Shapes of each ratio, wherever they are not chosen: experts and neurons, neurons alone. Widths are
# multiples of 16 bytes, which torch's grouped products need.
BOTH = {0.25: Shape(28, 40), 0.5: Shape(24, 32)}
WIDTH = {0.25: Shape(32, 36), 0.5: Shape(32, 24)}


@dataclass(frozen=True)
class Cut:
    """What a method removes and changes.

    Attributes:
        plan: which experts and neurons stay; None where experts are merged.
        matrices: {layer: [E', H, I'] down projections}; empty: unchanged.
        refit: whether the pruned model is re-fitted.
        constants: {layer: [E, H], 0 for experts that stay}: what stands for the removed experts.
        merged: method and ratio of merging.
        shape: experts that each layer keeps, and if not all, neurons of each; or groups.
    """

    plan: rd.Plan | None
    matrices: Mapping[str, Tensor] | None = None
    refit: bool = False
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    merged: tuple[str, float] | None = None
    shape: str = ""

    def __post_init__(self) -> None:
        if self.plan is not None:
            layer = next(iter(self.plan.layers.values()))
            width, kept = layer.narrow_width, len(layer.kept)
            object.__setattr__(self, "shape", str(Shape(kept, width)) if width else str(kept))


@dataclass(frozen=True)
class Draw:
    """A model observed on a draw of calibration text.

    Attributes:
        model: the original.
        windows: {domain: int64 [n, length]}.
        stats, grams: of the text.
        seed: of the draw.
    """

    model: Any
    windows: Mapping[str, Tensor]
    stats: rd.SaliencyStats
    grams: Mapping[str, LayerGram]
    seed: int

    @classmethod
    def of(cls, model: Any, windows: Mapping[str, Tensor], seed: int) -> "Draw":
        """Observes the text."""
        with rd.observe(model, gram=True) as obs:
            for domain, ids in windows.items():
                with obs.group(domain):
                    for part in ids.split(BATCH):
                        obs(input_ids=part)
            return cls(model, windows, obs.stats, obs.grams, seed)

    @cached_property
    def scores(self) -> rd.Scores:
        """By which experts stay unless a method says otherwise."""
        return rd.score(self.stats, "reap")

    @cached_property
    def vectors(self) -> dict[str, rd.LayerVectors]:
        """What merging experts needs, of the same text."""
        with rd.observe_vectors(self.model) as obs:
            for ids in self.windows.values():
                for part in ids.split(BATCH):
                    obs(input_ids=part)
        return obs.vectors

    def down(self, name: str) -> Tensor:
        """Down projections of a layer, [E, H, I]."""
        down: Tensor = self.model.get_submodule(name).down_proj.detach()
        return down

    def shaping(self) -> Shaping:
        """The orders of all neurons."""
        shaping = Shaping(self.scores, self.stats)
        for name, gram in self.grams.items():
            shaping.measure(name, self.down(name), gram, 1)
        return shaping

    def batches(self) -> list[dict[str, Tensor]]:
        """The text in batches that have windows of all domains in turn."""
        turns = torch.stack(list(self.windows.values()), dim=1).flatten(0, 1)
        return [{"input_ids": part} for part in turns.split(BATCH)]

    def refit(self, pruned: Path, out: Path) -> float:
        """Re-fits a pruned checkpoint and writes it again; returns process seconds of the former.

        Where no layer gains, `out` is not written.
        """
        model = rd.load_model(pruned, dtype=torch.float32)
        began = time.process_time()
        found = rd.refit_models(self.model, model, self.batches()).matrices
        seconds = time.process_time() - began
        if found:
            rd.replace_matrices(pruned, found, out, record={})
        return seconds


def uniform(criterion: str) -> Callable[[Draw, float], Cut]:
    """As many experts of every layer, by a criterion."""
    return lambda draw, ratio: Cut(rd.make_plan(rd.score(draw.stats, criterion), ratio))


def random(draw: Draw, ratio: float) -> Cut:
    """Experts removed at random."""
    return uniform(f"random:{draw.seed}")(draw, ratio)


def constants(draw: Draw, ratio: float) -> Cut:
    """Constants in place of the experts that REAP removes, as in MoNE."""
    plan = rd.make_plan(draw.scores, ratio)
    found = {}
    for name, layer in plan.layers.items():
        values = expert_constants(draw.down(name), draw.grams[name]).float()
        found[name] = values.index_fill(0, torch.tensor(layer.kept), 0.0)
    return Cut(plan, constants=found)


def merging(method: str, groups: str) -> Callable[[Draw, float], Cut]:
    """Experts merged in place of removed ones."""

    def cut(draw: Draw, ratio: float) -> Cut:
        experts = len(next(iter(draw.grams.values())).count)
        shape = groups.format(round(experts * (1 - ratio)))
        return Cut(None, merged=(method, ratio), shape=shape)

    return cut


def shaped(choose: Callable[[Shaping, float], Shape]) -> Callable[[Draw, float], Cut]:
    """Experts by REAP and their neurons by Optimal Brain Surgeon."""

    def cut(draw: Draw, ratio: float) -> Cut:
        shaping = draw.shaping()
        plan = shaping.plan(choose(shaping, ratio), ratio, {})
        if not plan.narrows:
            return Cut(plan)
        return Cut(
            plan,
            {
                name: shaping.matrices(plan, name, draw.down(name), gram)
                for name, gram in draw.grams.items()
            },
        )

    return cut


def automatic(shaping: Shaping, ratio: float) -> Shape:
    """The shape of the least expected error."""
    return min(shaping.shapes(ratio), key=shaping.expected)


def refitted(method: Callable[[Draw, float], Cut]) -> Callable[[Draw, float], Cut]:
    """A method and a re-fit after it."""

    def cut(draw: Draw, ratio: float) -> Cut:
        found = method(draw, ratio)
        return Cut(found.plan, found.matrices, refit=True)

    return cut


OBS = shaped(lambda _, ratio: BOTH[ratio])
METHODS: dict[str, Callable[[Draw, float], Cut]] = {
    "random": random,
    "frequency": uniform("frequency"),
    "ean_sum": uniform("ean_sum"),
    "hc_smoe": merging("hc-smoe", "{} groups"),
    "m_smoe": merging("m-smoe", "{} groups, by layer"),
    "reap": uniform("reap"),
    "reap_constants": constants,
    "obs_width": shaped(lambda _, ratio: WIDTH[ratio]),
    "obs": OBS,
    "obs_auto": shaped(automatic),
    "reap_refit": refitted(uniform("reap")),
    "obs_refit": refitted(OBS),
}


@contextmanager
def constants_in(model: Any, cut: Cut) -> Iterator[None]:
    """Inside, removed experts of a Qwen3-MoE model give their constants, times router weights."""
    handles, saved = [], []
    assert cut.plan is not None
    for name, values in cut.constants.items():
        module, removed = model.get_submodule(name), list(cut.plan.layers[name].removed)
        saved.append((module.down_proj, removed, module.down_proj[removed].clone()))
        module.down_proj[removed] = 0.0
        handles.append(module.register_forward_hook(_adding(values)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for down, removed, before in saved:
            down[removed] = before


def _adding(values: Tensor) -> Callable[[Any, tuple[Tensor, Tensor, Tensor], Tensor], Tensor]:
    """A hook that adds each token's constants to the output of its experts."""

    def hook(_: Any, given: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Tensor:
        hidden, ids, weights = given
        shares = hidden.new_zeros(len(hidden), len(values)).scatter_add_(1, ids, weights)
        return out + shares @ values

    return hook
