"""Fixtures of every engine's tests; its conftest.py imports them."""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch

from tests.interop.engines import table
from tests.interop.engines.models import (
    BOUND,
    PUBLISHED,
    Checkpoint,
    Pair,
    difference,
    write_pair,
)


class Ran(NamedTuple):
    """What an engine said of a checkpoint: how many experts it found, how many it uses for a token,
    and log-probabilities `[rows, vocabulary]` after the tokens `rows` of `models.TOKENS`.
    """

    experts: int
    top_k: int
    rows: list[int]
    logprobs: torch.Tensor


Pairs = Callable[[str], Pair]
Compare = Callable[[str, Callable[[Checkpoint], Ran]], None]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The checkpoints of an architecture, made once and never changed."""
    made: dict[str, Pair] = {}

    def pair(architecture: str) -> Pair:
        if architecture not in made:
            made[architecture] = write_pair(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return pair


@pytest.fixture(scope="session")
def compare(pairs: Pairs) -> Iterator[Compare]:
    """Asserts that an engine computes what transformers computes, of the pruned checkpoint and of
    the whole one, and counts the experts they have. A run of all architectures is recorded.
    """
    rows: table.Rows = {}

    def compared(architecture: str, run: Callable[[Checkpoint], Ran]) -> None:
        pair, found = pairs(architecture), []
        for checkpoint in (pair.whole, pair.pruned):
            ran = run(checkpoint)
            assert (ran.experts, ran.top_k) == (checkpoint.experts, checkpoint.top_k)
            found.append(difference(checkpoint, ran.rows, ran.logprobs))
        assert max(found) < BOUND, f"whole and pruned: {found}"
        rows[architecture] = {
            "model": PUBLISHED[architecture],
            "experts": [pair.whole.experts, pair.pruned.experts],
            "difference": found,
        }

    yield compared
    if rows.keys() == PUBLISHED.keys():
        table.record(os.environ["REAP_INTEROP"], rows)
