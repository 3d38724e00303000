"""A model that does not exist, with statistics and plans of it, for files of other tools."""

import torch

from reap_driver.interchange.content import ModelFacts, Source
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import plan_of_kept
from reap_kernels import SaliencyStats
from tests.driver.planning.statistics import EXPERTS, MODEL, Rows, model_stats

NUMBERS = (1, 2, 5)  # of its decoder layers; the others are dense
NAMES = tuple(f"model.layers.{number}.mlp.experts" for number in NUMBERS)
DECODER_LAYERS = 6


def stats(groups: int = 2, **facts: int) -> SaliencyStats:
    rows = {name: Rows(groups, seed=number) for number, name in enumerate(NAMES)}
    return model_stats(rows, [f"g{number}" for number in range(groups)], **facts)


def model(**facts: int) -> ModelFacts:
    layer = {"num_experts": EXPERTS, "top_k": 2, "n_group": 1, "topk_group": 1, **facts}
    return ModelFacts({"model": MODEL, "layers": dict.fromkeys(NAMES, layer)}, DECODER_LAYERS)


def plan(*kept: tuple[int, ...]) -> Plan:
    """The plan that keeps these experts of each layer, by default other ones in each."""
    ids = kept or ((0, 2, 3, 5), (1, 2, 3, 4), (0, 1, 4, 5))
    return plan_of_kept(dict(zip(NAMES, ids, strict=True)), model().record, criterion="mine")


def source(*kept: tuple[int, ...]) -> Source:
    return Source(model(), stats(), plan(*kept))


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)
