"""Two checkpoints streamed one after the other give the figures of the models in memory."""

import contextlib
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_driver.evaluation.models import compare_streamed
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.run import BatchList
from reap_driver.observation.state_store import StateStore
from tests.driver import zoo
from tests.driver.evaluation.test_compare import documents, packed, padded

NAMES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4")


def write(folder: Path, name: str, seed: int) -> Path:
    zoo.tiny(name, seed)[1].save_pretrained(str(folder), max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("offload", ["device", "file"])
@pytest.mark.parametrize("name", NAMES)
def test_streamed_is_as_resident(tmp_path: Path, name: str, offload: str) -> None:
    folders = [write(tmp_path / str(seed), name, seed) for seed in (0, 1)]
    parts = documents()
    batches = [padded(parts[:2]), packed(parts[2:]), {"input_ids": parts[0][None]}]
    groups = ["a", "b", "a"]
    want = rd.compare_models(*map(rd.load_model, folders), batches, groups=groups)
    done = []
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(open_streamed(folder)) for folder in folders]
        stores = [
            StateStore(offload, model.device, tmp_path / f"states-{n}")
            for n, model in enumerate(models)
        ]
        for store in stores:
            stack.callback(store.close)
        [sums] = compare_streamed(
            models, stores, BatchList.checked(batches, groups), range(3), done=done.append
        )
    found = sums.comparison(want.draws, want.seed)
    assert torch.equal(found.sums, want.sums)
    assert torch.equal(found.counts, want.counts)
    assert (found.groups, found.group.tolist()) == (want.groups, want.group.tolist())
    assert sum(done) == pytest.approx(1)
