"""Tiny originals and their pruned models, and what their decoder layers return."""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.compat.text_model import text_model
from reap_driver.load.streamed_model import text_layers_first
from tests.driver import zoo
from tests.driver.writer import saved


@dataclass(frozen=True)
class Pair:
    """A model on disk, and one that lacks a quarter of its experts.

    Attributes:
        full, small: folders.
        batches: of both.
        plan: by which the one was made from the other.
    """

    full: Path
    small: Path
    batches: list[dict[str, Tensor]]
    plan: rd.Plan

    def models(self) -> list[PreTrainedModel]:
        """Both, loaded anew."""
        return [rd.load_model(self.full), rd.load_model(self.small)]


@functools.cache
def _folder() -> Any:
    """A folder that is deleted when the process ends."""
    return tempfile.TemporaryDirectory(prefix="reap-pairs-")


@functools.cache
def pair(name: str, batches: int = 8, **config: Any) -> Pair:
    """The pair of an architecture; not to be changed."""
    root = Path(tempfile.mkdtemp(dir=_folder().name))
    saved.save(name, root / "full", **config)
    model = rd.load_model(root / "full")
    given = [zoo.tiny_inputs(name, model.config, 4, 32, seed) for seed in range(batches)]
    with rd.observe(model) as obs:
        for batch in given:
            obs(**batch)
    plan = rd.make_plan(rd.score(obs.stats), 0.25)
    rd.apply_plan(root / "full", plan, root / "small")
    return Pair(root / "full", root / "small", given, plan)


@contextmanager
def outputs(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, the list has the hidden states that each decoder layer returned last."""
    layers = text_layers_first(model)
    found: list[Tensor] = [torch.empty(0)] * len(layers)
    handles = []
    for index, (_, layer) in enumerate(layers):

        def keep(_: Any, __: Any, output: Any, index: int = index) -> None:
            found[index] = output if isinstance(output, Tensor) else output[0]

        handles.append(layer.register_forward_hook(keep))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each decoder layer returns for a batch, [batch, seq, H]."""
    with outputs(model) as found:
        text_model(model)(**batch, use_cache=False)
    return list(found)


def errors(
    full: PreTrainedModel, small: PreTrainedModel, batches: list[dict[str, Tensor]]
) -> list[float]:
    """For each decoder layer the mean, over tokens, of the squared distance of what both return."""
    found = []
    with torch.no_grad():
        for batch in batches:
            both = zip(hidden(full, batch), hidden(small, batch), strict=True)
            found.append([float((a - b).double().square().sum(-1).mean()) for a, b in both])
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()
