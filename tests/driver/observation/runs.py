"""Observed and plain forwards of the zoo's models, computed once per process for all tests."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.compat.text_model import text_model
from reap_driver.observation.observer import observe
from reap_kernels import SaliencyStats
from tests.driver import zoo
from tests.driver.observation import oracle


@dataclass(frozen=True)
class Run:
    """One batch through one model: plain, in float64, and observed."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    plain: Tensor
    double: Tensor
    observed: Tensor
    stats: SaliencyStats
    # Inputs of the experts modules in the observed forward, and in the plain one.
    calls: dict[str, oracle.Calls]
    plain_calls: dict[str, oracle.Calls]
    names: list[str]


@functools.cache
def run(name: str) -> Run:
    """The shared run of one architecture, in fp32."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config, batch=2, seq=16)
    observer = observe(model)
    names = [layer.name for layer in observer.layers]
    with torch.no_grad():
        with oracle.recorded(model, names) as plain_calls:
            plain = text_model(model)(**inputs, use_cache=False).logits
        with observer, oracle.recorded(model, names) as calls:
            observed = text_model(model)(**inputs, use_cache=False).logits
        double = text_model(copy.deepcopy(model).double())(**inputs, use_cache=False).logits
    stats = observer.stats
    return Run(model, inputs, plain, double, observed, stats, calls, plain_calls, names)


def kept_half(scores: Tensor) -> list[int]:
    """The half of the experts with the higher scores, ascending."""
    return sorted(scores.argsort(descending=True, stable=True)[: len(scores) // 2].tolist())


def mean_saliency(weighted_norm_sum: Tensor, count: Tensor) -> Tensor:
    """REAP's score: mean of gate times output norm, 0 where never routed."""
    return torch.where(count > 0, weighted_norm_sum / count.clamp_min(1), 0.0)
