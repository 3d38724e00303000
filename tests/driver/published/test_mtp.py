"""What becomes of published models' multi-token-prediction layers: the table in docs/support.md."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.mtp_layer import why_not_run
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.writer.mtp_config import OWN_COUNTS
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import published_config

PAGE = (Path(__file__).parents[3] / "docs/support.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| ([\w.-]+) \| (\d) \| (experts|dense) \| (\w+) \| (\w+) \| (\w+) \|$", re.MULTILINE
)
ROWS = {name: tuple(rest) for name, *rest in ROW.findall(PAGE)}
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def test_the_table_has_every_published_model_with_such_layers() -> None:
    assert list(ROWS) == [name for name, entry in MODELS.items() if entry.mtp is not None]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_what_the_checkpoint_gives(name: str, checkpoint: Callable[[str], Path]) -> None:
    entry, source = MODELS[name], checkpoint(name)
    assert entry.mtp is not None
    config = published_config(name)
    text = config.get("text_config", config)
    count = next(text[field] for field in COUNTS if field in text)
    model = meta_model(load_config(source))
    keys = open_checkpoint(source).tensors
    experts = any(entry.mtp.like == f"{entry.block.format(i=i)[:-4]}" for i in entry.moe_layers)
    layers = model.config.get_text_config().num_hidden_layers
    observed = experts and why_not_run(model, keys) is None
    kept = not experts or config["model_type"] in OWN_COUNTS
    pruned = "pruned" if experts else "copied"
    assert ROWS[name] == (
        str(count),
        "experts" if experts else "dense",
        "yes" if observed else "no",
        pruned,
        ("kept" if experts else "copied") if kept else "refused",
    )
    if observed:
        ids = torch.randint(3, 259, (1, 8), generator=torch.Generator().manual_seed(0))
        stats = rd.observe_streamed(source, [{"input_ids": ids}], with_mtp=True)
        assert list(stats.layers)[-1] == f"{entry.mtp.block}mlp.experts".format(n=layers)
