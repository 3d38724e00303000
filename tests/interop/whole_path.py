"""Observes, plans and prunes a checkpoint by the command line, and compares what was written."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.cli.main import main
from reap_driver.planning.plan import Plan
from reap_kernels import SaliencyStats
from tests.driver.formats.kept import check_kept, read_files, weights
from tests.driver.published.checkpoint import write_tokenizer


def run(*words: object) -> None:
    """A command line that succeeds."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    assert code == 0, err.getvalue()


def observed(model: Path, out: Path, *options: object) -> SaliencyStats:
    """Statistics of a checkpoint on a few tokens."""
    data = out.with_suffix(".jsonl")
    lines = [{"input_ids": [(7 * i + 3 * line) % 250 for i in range(64)]} for line in range(4)]
    data.write_text("\n".join(map(json.dumps, lines)))
    words = ("--data", data, "--seq-len", 32, "--quiet", "--out", out)
    run("observe", model, *words, *options)
    return SaliencyStats.load(out)


def dequantized(
    model: Path, out: Path, leaves: tuple[str, ...], value: Callable[[dict[str, Tensor]], Tensor]
) -> Path:
    """A checkpoint with the values that a library gives in place of the quantized ones.

    Args:
        model: the quantized checkpoint.
        out: for the new one.
        leaves: the last parts of the names of the tensors of a matrix, one of which every matrix
            has and other modules do not.
        value: the library's value of a matrix, given these tensors.
    """
    tensors = read_files(model)
    modules = {key.rpartition(".")[0] for key in tensors if key.endswith(f".{leaves[-1]}")}
    assert any("experts" in module for module in modules)
    plain = {key: part for key, part in tensors.items() if key.rpartition(".")[0] not in modules}
    for module in modules:
        parts = {leaf: tensors[f"{module}.{leaf}"] for leaf in leaves}
        plain[f"{module}.weight"] = value(parts)
    out.mkdir()
    config = json.loads((model / "config.json").read_text())
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps(config))
    write_tokenizer(out)
    write_tokenizer(model)
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    return out


def check_observed(model: Path, plain: Path, folder: Path) -> None:
    """A quantized checkpoint is observed as the one that holds the library's values is: the same
    weights, and the same statistics, streamed and not.
    """
    mine, theirs = weights(model), weights(plain)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(mine[name], value), name
    for way in ("always", "never"):
        found = observed(model, folder / f"mine-{way}.safetensors", "--stream", way)
        same_stats(found, observed(plain, folder / f"{way}.safetensors", "--stream", way))


def same_stats(mine: SaliencyStats, theirs: SaliencyStats) -> None:
    """Every bit."""
    assert mine.layers.keys() == theirs.layers.keys()
    for layer, stats in theirs.layers.items():
        for field, value in stats.fields().items():
            assert torch.equal(mine.layers[layer].fields()[field], value), (layer, field)


def pruned(model: Path, plain: Path, folder: Path) -> Path:
    """Prunes a quantized checkpoint by a plan made on it and by one made on the plain release, and
    checks that both leave the kept experts as they were; returns the first outcome.

    Args:
        model: the quantized checkpoint.
        plain: the same model, not quantized.
        folder: for files.
    """
    for name, source in (("by-plain-plan", plain), ("by-own-plan", model)):
        (folder / f"{name}-files").mkdir()
        kept = prune_by_plan_of(source, model, folder / name, folder / f"{name}-files")
        check_kept(weights(model), weights(folder / name), kept)
    return folder / name


def prune_by_plan_of(
    source: Path, model: Path, out: Path, folder: Path
) -> dict[str, tuple[int, ...]]:
    """Observes one checkpoint and prunes another; returns the kept experts by layer."""
    stats, plan = folder / "stats.safetensors", folder / "plan.json"
    observed(source, stats)
    run("plan", stats, "--ratio", 0.5, "--out", plan)
    run("apply", model, plan, "--out", out)
    return {layer: found.kept for layer, found in Plan.load(plan).layers.items()}
