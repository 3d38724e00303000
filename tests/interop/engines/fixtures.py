"""Fixtures of every engine's tests; its conftest.py imports them."""

import os
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from tests.interop.engines import table
from tests.interop.engines.models import BOUND, Checkpoint, Pair, difference, write_pair
from tests.interop.engines.sources import SOURCES

# Environment and architecture -> tensors that the engine does not read, by regular expression. They
# are zero in what it is compared with.
_BIAS = r"e_score_correction_bias$"
NOT_READ = {("mlx", "ernie4_5_moe"): _BIAS, ("vllm", "ernie4_5_moe"): _BIAS}
# Architectures whose experts an engine reads in the published format only, MXFP4.
PACKED = {("mlx", "gpt_oss")}


class Ran(NamedTuple):
    """What an engine said of a checkpoint: how many experts it found, how many it uses for a token,
    and log-probabilities `[rows, vocabulary]` after the tokens `rows` of `models.TOKENS`.
    """

    experts: int
    top_k: int
    rows: list[int]
    logprobs: torch.Tensor


Pairs = Callable[[str], Pair]
Run = Callable[[Checkpoint], Ran]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """The checkpoints of an architecture, made once and never changed."""
    made: dict[str, Pair] = {}

    def pair(architecture: str) -> Pair:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture] = write_pair(
                architecture, folder, zeroed=_not_read(architecture), packed=_packed(architecture)
            )
        return made[architecture]

    return pair


class Compare:
    """Asserts what an engine does with the checkpoints of an architecture, and remembers it.

    Args:
        pairs: the fixture.

    Attributes:
        rows: what was found so far, for the table of engines.
    """

    def __init__(self, pairs: Pairs) -> None:
        self._pairs, self.rows = pairs, table.Rows()

    def agree(self, architecture: str, run: Run) -> None:
        """It computes what transformers computes, of the pruned checkpoint and of the whole one,
        and counts the experts they have.
        """
        pair, found = self._pairs(architecture), []
        for checkpoint in (pair.whole, pair.pruned):
            ran = run(checkpoint)
            assert (ran.experts, ran.top_k) == (checkpoint.experts, checkpoint.top_k)
            found.append(difference(checkpoint, ran.rows, ran.logprobs))
        assert max(found) < BOUND, f"whole and pruned: {found}"
        notes = []
        if _not_read(architecture):
            notes.append("its bias zero")
        if _packed(architecture):
            notes.append("experts in MXFP4")
        self._found(pair, {"difference": found, "notes": notes})

    def refuse(self, architecture: str, run: Run, message: str, reason: str) -> None:
        """It refuses the whole checkpoint, and the pruned one with the same words.

        Args:
            architecture: of `SOURCES`.
            run: loads one.
            message: regular expression of what both tracebacks say.
            reason: for the table.
        """
        pair = self._pairs(architecture)
        for checkpoint in (pair.whole, pair.pruned):
            with pytest.raises((Exception, SystemExit)) as caught:  # told apart by its words
                run(checkpoint)
            text = "".join(traceback.format_exception(caught.value))
            assert re.search(message, text), text
        self._found(pair, {"refused": reason})

    def _found(self, pair: Pair, outcome: dict[str, Any]) -> None:
        self.rows[pair.architecture] = {
            "model": SOURCES[pair.architecture].model,
            "experts": [pair.whole.experts, pair.pruned.experts],
            **outcome,
        }


@pytest.fixture(scope="session")
def compare(pairs: Pairs) -> Iterator[Compare]:
    """A run of all architectures is recorded."""
    compared = Compare(pairs)
    yield compared
    if compared.rows.keys() == SOURCES.keys():
        table.record(os.environ["REAP_INTEROP"], compared.rows)


def _not_read(architecture: str) -> str:
    return NOT_READ.get((os.environ["REAP_INTEROP"], architecture), "")


def _packed(architecture: str) -> bool:
    return (os.environ["REAP_INTEROP"], architecture) in PACKED
