"""The same bits again: resident and streamed, wherever states are stored, whatever is masked."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.run import BatchList
from reap_driver.refitting.engine import LayerFacts, Refit, refit_layers
from tests.driver.refitting.pairs import Pair, pair

NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "jamba")
HELD = [False, False, False, True] * 2


def streamed(given: Pair, **how: Any) -> tuple[dict[str, LayerFacts], dict[str, Tensor]]:
    """The re-fit of a pair, streamed from disk."""
    found: dict[str, Tensor] = {}
    batches = BatchList.checked(given.batches, None)
    how = {"put": found.__setitem__, **how}
    refit = Refit(batches, range(len(HELD)), HELD, **how)
    with contextlib.ExitStack() as stack:
        models = [
            stack.enter_context(open_streamed(folder)) for folder in (given.full, given.small)
        ]
        return refit_layers(refit, *models), found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all matrices have the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("offload", ["device", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_is_as_resident(tmp_path: Path, name: str, offload: str) -> None:
    given = pair(name)
    done: list[float] = []
    facts, matrices = streamed(given, offload=offload, folder=tmp_path, done=done.append)
    want = rd.refit_models(*given.models(), given.batches, held_out=HELD)
    assert want.matrices
    assert same(matrices, want.matrices)
    assert facts == want.layers
    assert sum(done) == pytest.approx(1)
    assert not (tmp_path / "rows").exists()


def test_a_run_again_has_the_same_bits() -> None:
    given = pair("qwen3_moe")
    first, again = (rd.refit_models(*given.models(), given.batches) for _ in range(2))
    assert first.matrices
    assert same(first.matrices, again.matrices)
    assert first.layers == again.layers


def test_tokens_that_do_not_count_change_nothing() -> None:
    given = pair("qwen3_moe")
    inside = torch.ones(4, 32, dtype=torch.int64)
    inside[1:, 20:] = 0
    found = []
    for padding in (0, 7):
        ids = [torch.where(inside == 1, batch["input_ids"], padding) for batch in given.batches]
        batches = [{"input_ids": one, "attention_mask": inside} for one in ids]
        found.append(rd.refit_models(*given.models(), batches))
    assert found[0].matrices
    assert same(found[0].matrices, found[1].matrices)
    assert found[0].layers == found[1].layers
    assert [facts.held_out for facts in found[0].layers.values()] == [int(inside.sum())] * 2
