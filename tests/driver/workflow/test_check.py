"""Checks before serving as users call them: of plans, of models and of checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.workflow.check import _scales
from reap_kernels.errors import DataError, PlanError
from tests.driver.writer import saved

Place = tuple[Path, rd.Plan]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkpoint of 8 experts with 24 neurons in each of 2 layers, and a plan that keeps 4."""
    root = tmp_path_factory.mktemp("check")
    model = saved.save("qwen3_moe", root / "model")
    record = rd.record_of(model, name=str(root / "model"))
    own = {name: range(8) for name in record["layers"]}
    plan = rd.make_plan(own, 0.5, criterion="mine", of=record)
    plan.save(root / "plan.json")
    return root, plan


def configured(root: Path, folder: Path, **fields: Any) -> Path:
    """The model's configuration with other fields."""
    folder.mkdir()
    config = json.loads((root / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def test_a_plan_and_what_it_leaves(place: Place, tmp_path: Path) -> None:
    root, plan = place
    rd.apply(root / "model", plan, out=tmp_path / "cut")
    for source in (plan, root / "plan.json", str(root / "plan.json"), tmp_path / "cut"):
        assert rd.check(source, "sglang", tp=4, ep=4).obstacles == ()
        [why] = rd.check(source, "sglang", tp=8, ep=8).obstacles
        assert why.startswith("4 experts are not shared out equally among 8 GPUs")
    assert rd.check(root / "model", "sglang", tp=8, ep=8).obstacles == ()


def test_layers_that_keep_different_numbers(place: Place, tmp_path: Path) -> None:
    root, plan = place
    names = list(plan.layers)
    scores = {name: range(8) for name in names}
    record = rd.record_of(rd.load_model(root / "model"), name=str(root / "model"))
    uneven = rd.make_plan(scores, 0.5, criterion="mine", of=record, layer_ratios={names[0]: 0.25})
    rd.apply(root / "model", uneven, out=tmp_path / "cut", non_uniform=True)
    for source in (uneven, tmp_path / "cut"):
        [why] = rd.check(source, "vllm").obstacles
        assert why.startswith("layers have different numbers of experts, and vllm reads one")


def test_the_model_that_a_plan_is_applied_to_counts(place: Place, tmp_path: Path) -> None:
    root, plan = place
    quantization = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    other = configured(root, tmp_path / "fp8", quantization_config=quantization)
    assert rd.check(plan, "vllm", tp=4).obstacles == ()
    [why] = rd.check(plan, "vllm", tp=4, model=other).obstacles
    assert "do not divide into 4 parts of whole blocks of 8; divide them among 3 at most" in why
    another = configured(root, tmp_path / "another", moe_intermediate_size=64)
    with pytest.raises(DataError, match="is not the model of the plan: intermediate_size"):
        rd.check(plan, "vllm", model=another)


def test_what_is_no_source(place: Place) -> None:
    for source in (3, [place[1]]):
        with pytest.raises(rd.OptionError, match="give a plan, or the name of one or of a model"):
            rd.check(source, "vllm")
    with pytest.raises(rd.OptionError, match="only with a plan as SOURCE"):
        rd.check(place[0] / "model", "vllm", model=place[0] / "model")
    with pytest.raises(rd.OptionError, match="`ep=0`: give a whole number above 0"):
        rd.check(place[1], "vllm", ep=0)


SCALES: dict[str, tuple[dict[str, Any], tuple[list[int], list[int]]]] = {
    "none": ({}, ([], [])),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ([128, 128], [])),
    "fp8 per tensor": ({"quant_method": "fp8", "weight_block_size": None}, ([], [])),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 64}, ([], [64])),
    "gptq per channel": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, ([], [])),
    "int4": ({"config_groups": {"a": {"weights": {"group_size": 32}}}}, ([], [32])),
    "blocks": (
        {"config_groups": {"a": {"weights": {"block_structure": [128, 64]}}, "b": {}}},
        ([128, 64], []),
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_blocks_and_groups_of_a_quantization(name: str) -> None:
    settings, found = SCALES[name]
    assert _scales(settings) == found


def test_on_the_command_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", str(place[0] / "plan.json"), "--serve"]
    assert main([*words, "vllm", "--tp", "2"]) == 0
    assert capsys.readouterr().out == "nothing is known that vllm with tp 2 and ep 1 would refuse\n"
    assert main([*words, "vllm", "--ep", "3"]) == 0
    assert "note: 4 experts are not shared out equally among 3" in capsys.readouterr().err
    assert main([*words, "sglang", "--tp", "5", "--ep", "2", "--json"]) == 3
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["obstacles"] == [
        "SGLang shares experts out among a part of the GPUs of tensor parallelism, and `ep=2` does "
        "not divide `tp=5`; use a divisor"
    ]
    assert printed.err.startswith("reap-kernels: error: sglang (tp 5, ep 2) would refuse the model")
    assert "--ep 2 does not divide --tp 5" in printed.err
    with pytest.raises(PlanError, match="would refuse the model: SGLang"):
        rd.check(place[1], "sglang", tp=5, ep=2).require()
    assert "would refuse it:" in rd.check(place[1], "sglang", tp=5, ep=2).describe()
    assert main([*words, "ollama"]) == 2
    assert main([*words, "vllm", "--tp", "0"]) == 2
