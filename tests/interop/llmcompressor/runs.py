"""Runs of llm-compressor's `oneshot` that record what its REAP modifiers decided by."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
from loguru import logger
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from reap_driver.demo.corpus import load_corpus
from tests.driver import zoo

ROOT = Path(__file__).parents[3]
TRAINED = ROOT / "python" / "reap_driver" / "demo" / "model"  # four layers of 32 experts
LENGTH = 48

logger.remove()  # llm-compressor's, which write a line for every module


@dataclass(frozen=True)
class Observed:
    """What decided one layer: mean saliency [E], counts [E] and the experts kept."""

    saliency: Tensor
    count: Tensor
    kept: list[int]


def trained() -> PreTrainedModel:
    """The bundled model, in float32."""
    return AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()


def random_model(name: str, folder: Path) -> PreTrainedModel:
    """A tiny random model of one architecture, as it is loaded from a folder."""
    zoo.tiny(name)[1].save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_rows(sequences: int = 8) -> Dataset:
    """Text of the kind that the bundled model was trained on."""
    text = "\n".join(document.text for document in load_corpus(("calibration",))[:40])
    ids = AutoTokenizer.from_pretrained(TRAINED)(text)["input_ids"]
    return _rows([ids[i * LENGTH : (i + 1) * LENGTH] for i in range(sequences)])


def random_rows(vocabulary: int, sequences: int = 4) -> Dataset:
    """Random tokens."""
    seed = torch.Generator().manual_seed(0)
    return _rows(torch.randint(3, vocabulary, (sequences, LENGTH), generator=seed).tolist())


def _rows(ids: list[list[int]]) -> Dataset:
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])


@contextmanager
def recorded(found: list[Observed]) -> Iterator[None]:
    """Adds what each layer is decided by, in the order of pruning."""
    choose = REAPSaliencyTracker.compute_retained_experts

    def spy(self: REAPSaliencyTracker, *args: Any) -> Tensor:
        kept = choose(self, *args)
        found.append(Observed(self.mean_saliency.clone(), self.count.cpu().double(), kept.tolist()))
        return kept

    with mock.patch.object(REAPSaliencyTracker, "compute_retained_experts", spy):
        yield


def run(
    model: PreTrainedModel,
    recipe: str | Sequence[Any],
    data: Dataset,
    *,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    **options: Any,
) -> list[Observed]:
    """Runs `oneshot` on a model, which it changes; returns what decided each layer.

    Args:
        model: with the vocabulary of the data.
        recipe: modifiers, or the path or text of a recipe.
        data: rows of token ids.
        around: context the run lies in.
        options: more of `oneshot`.
    """
    found: list[Observed] = []
    with recorded(found), around():
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            processor=AutoTokenizer.from_pretrained(TRAINED),
            num_calibration_samples=len(data),
            max_seq_length=LENGTH,
            **options,
        )
    return found


def farthest(ours: list[Observed], theirs: list[Observed]) -> float:
    """The greatest relative difference of saliency, of any expert of any layer that was used."""
    return max(
        float(((a.saliency - b.saliency).abs() / b.saliency.clamp_min(1e-30)).max())
        for a, b in zip(ours, theirs, strict=True)
    )
