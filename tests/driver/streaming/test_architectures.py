"""Every architecture streamed: the bits of a resident observation, each byte read once."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from reap_driver.compat.decoder_layers import owner_of
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.load.resident import load_model
from tests.driver import zoo
from tests.driver.observation.test_architectures import NAMES
from tests.driver.published.models import MODELS
from tests.driver.streaming import passes
from tests.driver.writer import saved


@dataclass(frozen=True)
class Loaded:
    """An architecture's checkpoint in three files, and its model in memory; neither is changed."""

    name: str
    folder: Path
    model: PreTrainedModel


@pytest.fixture(scope="module", params=NAMES)
def loaded(
    request: pytest.FixtureRequest,
    original: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Loaded:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(original(request.param), folder)
    saved.shard(folder, 3)
    return Loaded(request.param, folder, load_model(folder))


def test_loaded_is_what_was_saved(loaded: Loaded) -> None:
    """Every tensor, those that the library's initialization overwrites (zaya) included."""
    _, model = zoo.tiny(loaded.name)
    state = loaded.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key


def test_streamed_is_resident(loaded: Loaded, support: Callable[[str, str, str], None]) -> None:
    name, folder = loaded.name, loaded.folder
    data = passes.batches(loaded.model.config.get_text_config().vocab_size)
    mine, opened = passes.streamed(folder, data)
    passes.assert_same_bits(mine, passes.resident(folder, data, model=loaded.model))
    unread = {name for name, _ in opened.layers} - {name for name, _ in opened.text_layers}
    entries = open_checkpoint(folder).tensors
    read = [e.nbytes for key, e in entries.items() if owner_of(key, unread) is None]
    assert opened.bytes_read == sum(read)
    assert bool(unread) == (name == "qwen3_omni_moe_whole")  # text goes to no layer of a talker
    assert all(p.is_meta for _, layer in opened.layers for p in layer.parameters())
    support(name, "streamed", "pass")


_SPARSE = {"num_hidden_layers": 5, "mlp_layer_types": ["dense", *["sparse"] * 4]}
_GEMMA_TYPES = ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        # Keys and values of layers 1 and 2 serve layers 3 to 5.
        (
            "gemma4",
            {
                "num_hidden_layers": 6,
                "num_kv_shared_layers": 3,
                "layer_types": _GEMMA_TYPES * 2,
                "hidden_size_per_layer_input": 8,
            },
        ),
        ("zaya", {"num_hidden_layers": 4}),  # a router's state goes to the next router
        # Keys selected by one layer are used by later ones.
        (
            "glm_moe_dsa",
            {**_SPARSE, "indexer_types": ["full", "full", "shared", "shared", "full"]},
        ),
        ("qwen4_exp", {}),  # several residual streams
    ],
)
def test_state_that_crosses_layers(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """What layers pass on besides their output, also through files."""
    model = saved.save(name, tmp_path / "model", **fields)
    data = passes.batches(model.config.get_text_config().vocab_size)
    mine, _ = passes.streamed(tmp_path / "model", data, "file", tmp_path / "states")
    passes.assert_same_bits(mine, passes.resident(tmp_path / "model", data))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_published_layouts(name: str, checkpoint: Callable[[str], Path]) -> None:
    """FP8 blocks and MXFP4 are dequantized layer by layer; MTP layers are never read."""
    folder = checkpoint(name)
    data = passes.batches(256)
    mine, opened = passes.streamed(folder, data)
    passes.assert_same_bits(mine, passes.resident(folder, data))
    mtp = MODELS[name].mtp is not None
    assert opened.bytes_read <= open_checkpoint(folder).nbytes
    assert mtp == (opened.bytes_read < open_checkpoint(folder).nbytes)


def test_zoo_is_complete() -> None:
    """The list above is that of the zoo, without what this transformers version refuses."""
    assert set(NAMES) >= set(zoo.core_names())
