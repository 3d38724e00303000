"""What tests of GPTQ, AWQ and AutoRound share: quantizing apart, our weights, pruned models."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.quantization import quantization_of
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored
from tests.interop.whole_path import pruned

ROOT = Path(__file__).parents[2]


def in_own_process(module: str, source: Path, out: Path) -> None:
    """Runs a module of the tests that quantizes `source` into `out`, where it may leave logs."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(source), str(out)],
        cwd=out,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def packed_weights(folder: Path) -> dict[str, Tensor]:
    """Our weights of a checkpoint's packed modules, by the module's name."""
    source = open_checkpoint(folder)
    reader = TensorReader(source.fingerprints)
    found = stored(source.tensors, reader)
    made = plain_weights(found, quantization_of(source), folder, torch.device("cpu"))
    names = [key for key in made if key not in found]
    try:
        return {key.removesuffix(".weight"): made[key][...] for key in names}
    finally:
        reader.close()


def check_weights(folder: Path, expected: dict[str, Tensor]) -> None:
    """Checks that our weights are the expected ones, bit for bit, those of experts among them."""
    found = packed_weights(folder)
    assert found.keys() == expected.keys()
    for module, weight in expected.items():
        assert found[module].dtype == weight.dtype
        assert torch.equal(found[module], weight), module
    assert any("experts" in module for module in expected)


def check_pruned(model: Path, plain: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Prunes a quantized checkpoint by a plan of its own and by one of its plain release.

    Args:
        model: the quantized checkpoint.
        plain: the same model, not quantized.
        folder: for files.

    Returns:
        Logits of the pruned model, and of the whole one with the removed experts masked.
    """
    small = rd.load_model(pruned(model, plain, folder), dtype="float32")
    full = rd.load_model(model, dtype="float32")
    tokens = torch.arange(3, 67)[None]
    with rd.masked_experts(full, rd.Plan.load(folder / "by-own-plan-files" / "plan.json").kept):
        masked = full(input_ids=tokens).logits
    return small(input_ids=tokens).logits, masked
