"""Every storage format: `--dry-run`, `observe` and `apply` do what docs/formats.md says."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.format_tables import COMPARED, ENVIRONMENTS, pinned
from reap_driver import observe_streamed
from reap_driver.load.methods import METHODS
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import open_streamed
from reap_driver.planning.plan import Plan
from reap_kernels.errors import CheckpointError, UnsupportedModel
from tests.driver.cli.conftest import Run, run
from tests.driver.formats.build import EACH, FORMATS, Format, plain_model
from tests.driver.formats.kept import check_kept, check_kept_files, weights
from tests.driver.formats.table import outcomes, rows
from tests.driver.writer import saved

__all__ = ["run"]  # a fixture


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("plain")
    return {name: plain_model(root / name, name) for name in {f.model for f in FORMATS}}


@pytest.mark.parametrize("stored", FORMATS, ids=lambda stored: stored.id)
def test_format(stored: Format, plain: dict[str, Path], run: Run, tmp_path: Path) -> None:
    """A plan of the plain release, applied, leaves the kept experts as they were."""
    found = outcomes(stored, plain[stored.model], tmp_path, run)
    assert found.dry_run == found.observe
    assert rows()[stored.id] == found.cells
    if found.apply != "yes":
        return
    kept = {name: layer.kept for name, layer in Plan.load(tmp_path / "plan.json").layers.items()}
    if stored.layout == EACH:
        check_kept_files(tmp_path / "model", tmp_path / "out", kept)
    if found.observe == "yes":
        check_kept(weights(tmp_path / "model"), weights(tmp_path / "out"), kept)


def test_the_table_has_every_format() -> None:
    assert list(rows()) == [stored.id for stored in FORMATS]


def test_what_is_read_here_is_compared_with_its_package() -> None:
    """Every method of the one table that has a reader, by a test of an environment that pins it."""
    assert COMPARED.keys() == {name for name, method in METHODS.items() if method.reader}
    modules = {"nvidia-modelopt": "modelopt"}
    for environment, package in COMPARED.values():
        assert pinned(environment, package)
        files = (ENVIRONMENTS.parent / environment).glob("test_*.py")
        module = modules.get(package, package.replace("-", "_"))
        texts = [file.read_text(encoding="utf-8") for file in files]
        assert any(re.search(rf"^(import|from) {module}\b", text, re.M) for text in texts), module


HQQ = next(stored for stored in FORMATS if stored.name == "HQQ")
COMMANDS = {
    "observe": (),
    "observe --stream always": ("--stream", "always"),
    "observe --device-map auto": ("--device-map", "auto"),
    "prune": ("--ratio", 0.5),
    "prune --dry-run": ("--ratio", 0.5, "--dry-run"),
}


@pytest.fixture(scope="module")
def unread(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that cannot be observed."""
    return HQQ.write(plain[HQQ.model], tmp_path_factory.mktemp("unread") / "model")


@pytest.mark.parametrize("words", COMMANDS)
def test_every_way_to_run_a_model_asks(words: str, unread: Path, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(3, 67))}))
    options = (*COMMANDS[words], "--data", data, "--seq-len", 32, "--out", tmp_path / "out")
    done = run(words.split()[0], unread, *options)
    assert done.code == 3
    assert "stored by HQQ, which is not read" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["original", "pruned"])
def test_compare_asks_for_both(
    place: str, unread: Path, plain: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"input_ids": list(range(3, 67))}))
    pair = (unread, plain["qwen3_moe"]) if place == "original" else (plain["qwen3_moe"], unread)
    done = run("compare", *pair, "--data", data, "--seq-len", 32)
    assert done.code == 3
    assert "stored by HQQ, which is not read" in done.error


def _streamed(folder: Path) -> None:
    with open_streamed(folder):
        pass


BATCH = {"input_ids": torch.arange(3, 35)[None]}
CALLS: dict[str, Callable[[Path], object]] = {
    "load_model": load_model,
    "load_model with a device map": lambda folder: load_model(folder, device_map="cpu"),
    "open_streamed": _streamed,
    "observe_streamed": lambda folder: observe_streamed(folder, [BATCH]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_call_that_runs_a_model_asks(call: Callable[[Path], object], unread: Path) -> None:
    with pytest.raises(UnsupportedModel, match="stored by HQQ, which is not read"):
        call(unread)


BY_NAME = {stored.name: stored for stored in reversed(FORMATS)}  # the first of a name
UNREAD = ["hqq", "aqlm", "vptq", "spqr", "bitnet", "quark", "higgs", "fbgemm_fp8", "gguf", "mxfp8"]


SETTINGS = [
    ({"quant_method": method}, f"(?i)stored by .*{method}.*, which is not read")
    for method in (*UNREAD, "unknown")
]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        *SETTINGS,
        ({"bits": 4}, "by the method 'unnamed', which"),
        ({}, "a layout that is not read without a quantization_config; observe"),
    ],
)
def test_other_methods(
    settings: dict[str, object], says: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    stored = replace(HQQ, settings=settings)
    with pytest.raises(UnsupportedModel, match=rf"{says}.* apply the plan to this one"):
        load_model(stored.write(plain[stored.model], tmp_path / "model"))


def test_settings_beside_config_json(plain: dict[str, Path], tmp_path: Path) -> None:
    """They name the method, unless they are left over beside weights that are not quantized."""
    beside = {"quantization": {"quant_algo": "W4A8_AWQ"}}
    for stored in (BY_NAME["bfloat16"], replace(HQQ, settings=None)):
        folder = stored.write(plain[stored.model], tmp_path / stored.name)
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert load_model(tmp_path / "bfloat16").dtype == torch.bfloat16
    with pytest.raises(UnsupportedModel, match=r"quant_algo of ModelOpt's settings is 'W4A8_AWQ'"):
        load_model(tmp_path / "HQQ")


def test_settings_only_beside_config_json(plain: dict[str, Path], tmp_path: Path) -> None:
    """As ModelOpt first wrote them: they count as those of config.json do."""
    stored = BY_NAME["ModelOpt NVFP4"]
    folder = stored.write(plain[stored.model], tmp_path / "model")
    expected = weights(folder)
    config = json.loads((folder / "config.json").read_text())
    beside = {"quantization": {"quant_algo": config.pop("quantization_config")["quant_algo"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    found = weights(folder)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_methods_that_transformers_reads_from_elsewhere(
    plain: dict[str, Path], tmp_path: Path
) -> None:
    """transformers would load the codes as weights."""
    stored = replace(BY_NAME["FP8 blocks"], settings=None)
    folder = stored.write(plain[stored.model], tmp_path / "model")
    saved.change_config(folder, compression_config=BY_NAME["FP8 blocks"].settings)
    with pytest.raises(UnsupportedModel, match=r"compression_config of config.json names .* 'fp8'"):
        load_model(folder)


def test_a_lost_tensor_is_no_layout(plain: dict[str, Path], tmp_path: Path) -> None:
    """A damaged checkpoint is still said to be one."""
    folder = replace(HQQ, settings=None, pack=None).write(plain["qwen3_moe"], tmp_path / "model")
    lost = "model.layers.0.mlp.experts.3.down_proj.weight"
    saved.change_tensors(folder, lambda tensors: {k: t for k, t in tensors.items() if k != lost})
    with pytest.raises(
        CheckpointError, match=r"of one and the same checkpoint|cannot be converted"
    ):
        load_model(folder)


SPOILED = [
    ("FP8 blocks", {"weight_block_size": [128, "x"]}),
    ("FP8 blocks", {"weight_block_size": [0, 0]}),
    ("FP8 blocks", {"activation_scheme": 7}),
    ("FP8 blocks", {"modules_to_not_convert": 7}),
    ("compressed-tensors INT4", {"config_groups": 7}),
    ("compressed-tensors INT4", {"config_groups": {"group_0": 7}}),
    ("compressed-tensors INT4", {"config_groups": {"group_0": {"weights": [7]}}}),
    ("compressed-tensors INT4", {"config_groups": {"group_0": {"weights": {"type": []}}}}),
    ("compressed-tensors INT4", {"config_groups": {"group_0": {"weights": {"num_bits": "4"}}}}),
    ("compressed-tensors INT4", {"format": ["pack-quantized"]}),
    ("compressed-tensors INT4", {"sparsity_config": "dense"}),
    ("compressed-tensors INT4", {"transform_config": [7]}),
    ("compressed-tensors INT4", {"ignore": [7]}),
    ("compressed-tensors FP8", {"quantization_status": "frozen"}),
]


@pytest.mark.parametrize(("name", "fields"), SPOILED)
def test_spoiled_settings(
    name: str, fields: dict[str, object], plain: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    """The dry run with weights, without them, and the run itself: one error, the same."""
    stored = BY_NAME[name]
    stored = replace(stored, settings={**(stored.settings or {}), **fields})
    model = stored.write(plain[stored.model], tmp_path / "model")
    alone = tmp_path / "alone" / "config.json"
    alone.parent.mkdir()
    shutil.copy(model / "config.json", alone)
    for given in (model, alone):
        done = run("observe", given, "--dry-run", "--tokens", 4096)
        assert done.code == 3
        assert "quantization_config" in done.error
    with pytest.raises((CheckpointError, UnsupportedModel), match="quantization_config"):
        load_model(model)


def test_a_pattern_that_is_none(plain: dict[str, Path], run: Run, tmp_path: Path) -> None:
    """Only the estimate from config.json alone reads the patterns."""
    stored = BY_NAME["compressed-tensors INT8"]
    stored = replace(stored, settings={**(stored.settings or {}), "ignore": ["re:(", "lm_head"]})
    model = stored.write(plain[stored.model], tmp_path / "model")
    (model / "model.safetensors").unlink()
    done = run("observe", model / "config.json", "--dry-run", "--tokens", 4096)
    assert done.code == 3
    assert "invalid regular expression for modules" in done.error


OTHERS = [
    ({"num_hidden_layers": 90}, "has 90 layers, and the files have no tensor of 89 of them"),
    (
        {"num_attention_heads": 8},
        "tensors are of another shape than config.json says, first model.l",
    ),
    ({"vocab_size": 300}, "2 tensors are of another shape than config.json says, first lm_head"),
]


@pytest.mark.parametrize(("fields", "says"), OTHERS)
@pytest.mark.parametrize("name", ["bfloat16", "FP8 blocks", "compressed-tensors INT4"])
def test_another_models_config(
    name: str, fields: dict[str, int], says: str, plain: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    """Said by the dry run already: in a streamed run, it came when the layer was reached."""
    stored = BY_NAME[name]
    model = stored.write(plain[stored.model], tmp_path / "model")
    saved.change_config(model, **fields)
    done = run("observe", model, "--dry-run", "--tokens", 4096)
    assert done.code == 3
    assert says in done.error
    assert "of one and the same checkpoint" in done.error
