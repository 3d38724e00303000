"""Observe, plan, apply, load and generate, on every published model through the public API."""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_kernels import errors
from tests.driver.published.checkpoint import is_mtp
from tests.driver.published.entry import Published
from tests.driver.published.expected import (
    digests,
    expected_config,
    expected_tensors,
    read_tensors,
    same_bytes,
)
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import get_field
from tests.driver.writer import saved

Checkpoints = Callable[[str], Path]
DENSE_MTP = ("step-3.5-flash", "ernie-4.5-21b-a3b")  # their MTP layers have no experts
TEXT = "def merge(left, right):\n    return [*left, *right]\n"


@pytest.mark.parametrize("name", MODELS)
def test_prune(
    name: str, checkpoint: Checkpoints, tmp_path: Path, support: Callable[[str, str, str], None]
) -> None:
    entry, source, out = MODELS[name], checkpoint(name), tmp_path / "pruned"
    before = digests(source)
    plan = rd.make_plan(rd.score(observed(name, source)), ratio=entry.ratio)
    kept = kept_by_block(plan, entry)
    assert list(kept) == [entry.block.format(i=i) for i in entry.moe_layers]
    assert {len(experts) for experts in kept.values()} == {entry.kept}
    check_groups(json.loads((source / "config.json").read_text()), entry, kept)

    report = rd.apply_plan(source, plan, out)

    assert digests(source) == before
    check_written(entry, source, out, kept)
    check_report(entry, report, source, out)
    generates(load(entry, out), out)
    support(name, "published", name)


@pytest.mark.parametrize("name", DENSE_MTP)
def test_mtp_layers_without_experts_can_stay(
    name: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    entry, source, out = MODELS[name], checkpoint(name), tmp_path / "pruned"
    plan = rd.make_plan(rd.score(observed(name, source)), ratio=entry.ratio)
    rd.apply_plan(source, plan, out, mtp="keep")
    check_written(entry, source, out, kept_by_block(plan, entry), mtp=True)
    generates(load(entry, out), out)


@pytest.mark.parametrize(
    "name", [name for name in MODELS if MODELS[name].mtp is not None and name not in DENSE_MTP]
)
def test_mtp_layers_with_experts_are_pruned(
    name: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """By the last layer's ids: FP8 matrices with scales, stacked ones in a module of their own."""
    entry, source, out = MODELS[name], checkpoint(name), tmp_path / "pruned"
    assert entry.mtp is not None
    config = json.loads((source / "config.json").read_text())
    root = entry.mtp.block.format(i=0, n=config.get("num_hidden_layers"))
    chosen = functools.partial(chosen_experts, groups=config.get("n_group") or 1, kept=entry.kept)
    plan = saved.make_plan(source, meta_model(load_config(source)), chosen)
    *_, last = plan.layers
    kept = {**kept_by_block(plan, entry), root + "mlp.": plan.layers[last].kept}
    assert len(set(kept.values())) == len(entry.moe_layers)
    with pytest.raises(errors.UnsupportedModel, match=re.escape(root) + r".*`mtp='prune'`"):
        rd.apply_plan(source, plan, out, mtp="keep")
    assert not out.exists()
    report = rd.apply_plan(source, plan, out, mtp="prune")
    check_written(entry, source, out, kept, mtp=True)
    [(layer, written)] = report.mtp_layers.items()
    assert (layer, written.like) == (f"{root}mlp.experts", last)
    assert not report.mtp_dropped


def chosen_experts(layer: Any, generator: torch.Generator, *, groups: int, kept: int) -> list[int]:
    """Experts of a layer at random, equally many of each routing group."""
    size = layer.num_experts // groups
    return sorted(
        group * size + int(expert)
        for group in range(groups)
        for expert in torch.randperm(size, generator=generator)[: kept // groups]
    )


def test_command_line_prunes_a_model_type_unknown_to_transformers(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Kimi-K2: config, model, key conversion and tokenizer all found through its architecture."""
    entry, source, out = MODELS["kimi-k2"], checkpoint("kimi-k2"), tmp_path / "pruned"
    data = tmp_path / "data.txt"
    data.write_text(TEXT * 8)
    options = ["--seq-len", "64", "--ratio", "0.5", "--out", str(out), "--quiet"]
    assert main(["prune", str(source), "--data", str(data), *options]) == 0
    assert json.loads((out / "config.json").read_text())["n_routed_experts"] == entry.kept
    generates(rd.load_model(out), out)


@functools.cache
def observed(name: str, source: Path) -> Any:
    """Statistics of a model over a few rows of random tokens, every slot counted; not changed."""
    entry, model = MODELS[name], rd.load_model(source)
    tokens = torch.randint(3, 259, (2, 96), generator=torch.Generator().manual_seed(0))
    with rd.observe(model) as observer:
        for row in tokens:
            observer(input_ids=row[None])
    top_k = get_field(json.loads((source / "config.json").read_text()), entry.top_k)
    assert len(observer.stats.layers) == len(entry.moe_layers)
    for stats in observer.stats.layers.values():
        assert int(stats.count.sum()) == tokens.numel() * top_k
    return observer.stats


def kept_by_block(plan: Any, entry: Published) -> dict[str, tuple[int, ...]]:
    """Kept experts of the main layers by the disk prefix of their MoE block."""
    return {
        entry.block.format(i=name.partition("layers.")[2].partition(".")[0]): kept
        for name, kept in plan.kept.items()
    }


def check_groups(
    config: dict[str, Any], entry: Published, kept: dict[str, tuple[int, ...]]
) -> None:
    """Routing groups are consecutive ids; each keeps the same number, so membership survives."""
    groups = config.get("n_group") or 1
    size = get_field(config, entry.counts[0]) // groups
    for experts in kept.values():
        counts = Counter(expert // size for expert in experts)
        assert counts == dict.fromkeys(range(groups), entry.kept // groups)


def check_written(
    entry: Published,
    source: Path,
    out: Path,
    kept: dict[str, tuple[int, ...]],
    *,
    mtp: bool = False,
) -> None:
    """Every byte of every tensor and every field of config.json, as computed from the table."""
    config = json.loads((source / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == expected_config(entry, config, mtp=mtp)
    expected = expected_tensors(entry, config, read_tensors(source), kept, mtp=mtp)
    written = read_tensors(out)
    assert written.keys() == expected.keys()
    wrong = [key for key, tensor in written.items() if not same_bytes(tensor, expected[key])]
    assert not wrong


def check_report(entry: Published, report: Any, source: Path, out: Path) -> None:
    """The report lists the changes to experts, MTP layers and the configuration."""
    config = json.loads((source / "config.json").read_text())
    before, after = read_tensors(source), read_tensors(out)
    assert report.experts_before == get_field(config, entry.counts[0])
    assert report.experts_after == entry.kept
    assert set(report.mtp_dropped) == {key for key in before if is_mtp(key, entry, config)}
    assert report.tensors == len(after)
    files = (path for path in out.rglob("*") if path.is_file())  # the record in reap/ included
    assert report.bytes_written == sum(path.stat().st_size for path in files)
    edited = {field: get_field(config, field) for field in (*entry.counts, *entry.cleared)}
    edited |= {field: get_field(config, field) for field in entry.per_layer}
    pruned = expected_config(entry, config)
    assert report.edited_config == {
        field: (old, get_field(pruned, field))
        for field, old in edited.items()
        if old != get_field(pruned, field)
    }


def load(entry: Published, folder: Path) -> PreTrainedModel:
    """The pruned model as transformers loads it, if it can load such checkpoints."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0], None)
    if cls is None or entry.not_plain:
        return rd.load_model(folder)
    model, loading = cls.from_pretrained(str(folder), output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    return model


def generates(model: PreTrainedModel, folder: Path) -> None:
    """The pruned model continues a text through the tokenizer copied with it."""
    inputs = PreTrainedTokenizerFast.from_pretrained(str(folder))(TEXT, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    with torch.no_grad():
        assert model(input_ids=output, use_cache=False).logits.isfinite().all()
