"""A checkpoint with other down projections: the model that loads from it computes with them, and
everything else is as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import reap_driver as rd
from reap_driver.compat.text_model import text_model
from reap_driver.model.adapters import KernelAdapter
from reap_driver.model.discover import MoELayer, adapter_of
from reap_driver.writer.replace import rewrite
from reap_kernels.errors import PlanError, ReapError, UnsupportedModel
from tests.driver import zoo
from tests.driver.writer import saved, test_remote
from tests.driver.writer.test_truth import load

Down = dict[str, Tensor]
FIRST = "model.layers.0.mlp.experts"


def down_views(layer: MoELayer) -> list[Tensor]:
    """The down projection of every expert, [H, I], in the model's own storage."""
    adapter = adapter_of(layer)
    assert isinstance(adapter, KernelAdapter)
    return list(adapter.weights(layer.module, adapter.activation(layer.module)).down)


def random_down(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Down:
    generator = torch.Generator().manual_seed(5)

    def new(layer: MoELayer) -> Tensor:
        shape = layer.num_experts, layer.hidden_size, layer.intermediate_size
        return torch.randn(shape, generator=generator, dtype=dtype) / shape[-1] ** 0.5

    return {layer.name: new(layer) for layer in rd.find_moe_layers(model)}


def overwrite(model: PreTrainedModel, down: Down) -> None:
    with torch.no_grad():
        for layer in rd.find_moe_layers(model):
            for view, value in zip(down_views(layer), down[layer.name], strict=True):
                view.copy_(value)


@pytest.mark.parametrize("name", zoo.names())
def test_model_computes_with_new_matrices(
    name: str, original: Callable[[str], Path], tmp_path: Path
) -> None:
    full = original(name)
    model = load(full)
    down, inputs = random_down(model), zoo.tiny_inputs(name, model.config)
    with torch.no_grad():
        before = text_model(model)(**inputs).logits

    report = rd.replace_matrices(full, down, tmp_path / "new", record={})

    overwrite(model, down)
    with torch.no_grad():
        expected = text_model(model)(**inputs).logits
        actual = text_model(load(tmp_path / "new"))(**inputs).logits
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(actual, expected)
    old, new = saved.read_all(full), saved.read_all(tmp_path / "new")
    assert list(old) == list(new)
    changed = [key for key in old if not saved.same_bytes(old[key], new[key])]
    assert len(changed) == report.tensors
    assert {(t.shape, t.dtype) for t in old.values()} == {(t.shape, t.dtype) for t in new.values()}
    assert sum(new[key].nbytes for key in changed) == report.tensor_bytes


def test_a_copy_says_that_nothing_new_was_better(
    original: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without matrices all tensors are the source's, byte for byte, and card and record say why."""
    full = original("qwen3_moe")
    rows = [("text", "expected acceptance"), ("the cut", "0.8"), ("re-fitted", "0.7")]
    report = rewrite(full, {}, tmp_path / "new", record={"written": "cut"}, figures=rows)
    assert (report.layers, report.tensors) == (0, 0)
    old, new = saved.read_all(full), saved.read_all(tmp_path / "new")
    assert list(old) == list(new)
    assert all(saved.same_bytes(old[key], new[key]) for key in old)
    card = (tmp_path / "new/README.md").read_text()
    assert "did not follow the original more closely" in card
    assert "| re-fitted | 0.7 |" in card
    assert json.loads((tmp_path / "new/reap/refit.json").read_text()) == {"written": "cut"}


def test_experts_in_modules_of_their_own(tmp_path: Path) -> None:
    model = test_remote.save(tmp_path / "full", method=True)
    down = random_down(model)
    options = {"record": {}, "trust_remote_code": True}
    rd.replace_matrices(tmp_path / "full", down, tmp_path / "new", **options)
    new = saved.read_all(tmp_path / "new")
    for name, values in down.items():
        for expert, value in enumerate(values):
            assert torch.equal(new[f"{name}.{expert}.down_proj.weight"], value)


def test_code_that_runs_its_experts_inside_the_block_is_refused(tmp_path: Path) -> None:
    model = test_remote.save(tmp_path / "full")
    options = {"record": {}, "trust_remote_code": True}
    with pytest.raises(UnsupportedModel, match="does not say which matrix"):
        rd.replace_matrices(tmp_path / "full", random_down(model), tmp_path / "new", **options)


def test_files_dtype_and_one_layer_alone(tmp_path: Path) -> None:
    """A source of three files in bf16; keys of a layer are spread over all of them."""
    model = saved.save("qwen3_moe", tmp_path / "full", dtype=torch.bfloat16)
    saved.shard(tmp_path / "full", 3)
    down = {FIRST: random_down(model)[FIRST]}
    shown: list[tuple[int, int]] = []
    rd.replace_matrices(
        tmp_path / "full",
        down,
        tmp_path / "new",
        record={},
        progress=lambda done, total: shown.append((done, total)),
    )
    old, new = saved.read_all(tmp_path / "full"), saved.read_all(tmp_path / "new")
    for key, tensor in old.items():
        number = key.removeprefix(f"{FIRST}.").removesuffix(".down_proj.weight")
        expected = down[FIRST][int(number)].bfloat16() if number.isdigit() else tensor
        assert saved.same_bytes(new[key], expected), key
    assert shown == sorted(shown)
    done, total = shown[-1]
    assert done == total - sum(map(len, (b"{}\n", (tmp_path / "new/README.md").read_bytes())))
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(
        [*names, "reap", "README.md"]
    )
    config = (tmp_path / "full" / "config.json").read_bytes()
    assert (tmp_path / "new" / "config.json").read_bytes() == config


def test_record_and_card(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    front = "---\nlicense: mit\n---\n"
    (tmp_path / "full/README.md").write_text(f"{front}\n# Title\n")
    (tmp_path / "full/reap").mkdir()
    (tmp_path / "full/reap/plan.json").write_text("{}")
    (tmp_path / "full/reap/secret").symlink_to("/etc/hostname")
    record = {"ridge": [0.1, 0.01]}
    rd.replace_matrices(
        tmp_path / "full",
        random_down(model),
        tmp_path / "new",
        record=record,
        facts=[("ridge", "0.1 and 0.01")],
    )
    assert json.loads((tmp_path / "new/reap/refit.json").read_text()) == record
    assert sorted(path.name for path in (tmp_path / "new/reap").iterdir()) == [
        "plan.json",
        "refit.json",
    ]
    card = (tmp_path / "new/README.md").read_text()
    assert card.startswith(f"{front}\n> The down projections of 2 MoE layers were solved again")
    assert "| ridge | 0.1 and 0.01 |" in card
    assert card.endswith("\n# Title\n")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda down: {}, PlanError, "none are given"),
        (lambda down: {"model.layers.7.mlp.experts": down[FIRST]}, PlanError, "layers.7"),
        (lambda down: {FIRST: down[FIRST][:5]}, PlanError, r"\[5, 32, 24\].*\[8, 32, 24\]"),
        (lambda down: {FIRST: down[FIRST].mT}, PlanError, r"\[8, 24, 32\].*\[8, 32, 24\]"),
        (lambda down: {FIRST: down[FIRST] / 0}, PlanError, "not finite"),
    ],
)
def test_matrices_that_do_not_fit(
    change: Callable[[Down], Down], error: type[ReapError], words: str, tmp_path: Path
) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    before = saved.snapshot(tmp_path / "full")
    with pytest.raises(error, match=words):
        rd.replace_matrices(
            tmp_path / "full", change(random_down(model)), tmp_path / "new", record={}
        )
    assert saved.snapshot(tmp_path / "full") == before
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_quantized_sources_are_refused(tmp_path: Path) -> None:
    model = saved.save("qwen3_moe", tmp_path / "full")
    down = random_down(model)
    saved.change_config(tmp_path / "full", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"quantized.*'gptq'.*quantized from"):
        rd.replace_matrices(tmp_path / "full", down, tmp_path / "new", record={})


def test_stopping_leaves_nothing(tmp_path: Path) -> None:
    """Also while values are computed, which is after the copying."""
    model = saved.save("qwen3_moe", tmp_path / "full")

    class Stopping(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise KeyboardInterrupt

    down = Stopping(random_down(model))
    with pytest.raises(KeyboardInterrupt):
        rd.replace_matrices(tmp_path / "full", down, tmp_path / "new", record={})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_conversion_that_cannot_be_reversed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library would make of the new files is compared with what is meant, bit by bit."""
    from transformers import core_model_loading

    model = saved.save("qwen3_moe", tmp_path / "full")
    split = core_model_loading.SplitModulelist.convert

    def wrong(self: object, *args: object, **kwargs: object) -> dict[str, Tensor]:
        made = split(self, *args, **kwargs)
        return dict(zip(made, reversed(made.values()), strict=True))

    monkeypatch.setattr(core_model_loading.SplitModulelist, "convert", wrong)
    with pytest.raises(UnsupportedModel, match="cannot be reversed"):
        rd.replace_matrices(tmp_path / "full", random_down(model), tmp_path / "new", record={})
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
