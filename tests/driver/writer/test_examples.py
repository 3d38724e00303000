"""The examples in docstrings of the writer are correct."""

import doctest
import importlib
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from tests.driver.writer import saved


@pytest.mark.parametrize(
    "name", ["apply", "codes", "expert_names", "markdown", "mask_file", "report"]
)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with a checkpoint and a plan that keeps 5 of 8 experts."""
    saved.save("qwen3_moe", tmp_path / "model")
    saved.make_plan(tmp_path / "model", meta_model(load_config(tmp_path / "model"))).save(
        tmp_path / "plan.json"
    )
    monkeypatch.chdir(tmp_path)
    rd.save_masks("model", rd.Plan.load("plan.json"), "masks.safetensors")
    module = importlib.import_module(f"reap_driver.writer.{name}")
    found = doctest.testmod(module, extraglobs={"rd": rd})
    assert found.attempted > 0
    assert found.failed == 0
