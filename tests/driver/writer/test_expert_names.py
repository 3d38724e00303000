"""Settings that name experts by number: read here by each format's own rules, they decide alike
before and after for every module that is kept."""

import fnmatch
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.expert_names import ExpertNames, NumberedExperts
from reap_kernels.errors import CheckpointError
from tests.driver.writer import saved

EXPERTS = 40  # so that one number begins another: 3 and 30 to 39
KEPT = {0: (1, 3, 4, 8, 31, 39), 1: (0, 2, 3, 5, 30, 33), 2: (3, 4, 6, 7, 38, 39)}
PROJECTIONS = ("down_proj", "gate_proj", "up_proj")
PARTS = {"": 0, **{f".{p}": 1 for p in PROJECTIONS}, **{f".{p}.weight": 2 for p in PROJECTIONS}}
OTHERS = ["lm_head", *(f"model.layers.{i}.{m}" for i in range(5) for m in ("mlp.gate", "attn.q"))]


def lists(root: str = "model.") -> list[NumberedExperts]:
    return [
        NumberedExperts(
            f"{root}layers.{layer}.mlp.experts.",
            {old: new for new, old in enumerate(kept)},
            EXPERTS,
            PARTS,
        )
        for layer, kept in KEPT.items()
    ]


NAMES = ExpertNames(lists(), OTHERS)


def pairs(root: str = "model.") -> list[tuple[str, str]]:
    """(old name, new name) of every module that stays."""
    found = [(name, name) for name in OTHERS]
    for layer, kept in KEPT.items():
        for new, old in enumerate(kept):
            stem = f"{root}layers.{layer}.mlp.experts."
            found += [(f"{stem}{old}.{p}", f"{stem}{new}.{p}") for p in PROJECTIONS]
    return found


# What readers of each format do with one text.


def compressed_tensors(text: str, name: str) -> bool:
    if text.startswith("re:"):
        return re.match(text[3:], name) is not None
    return text == name


def gptqmodel(text: str, name: str) -> bool:
    return re.match(text.removeprefix("+:").removeprefix("-:"), name) is not None


def auto_round(text: str, name: str) -> bool:
    return text == name or re.search(text, name) is not None


def modelopt(text: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, text) or text in name


def transformers(text: str, name: str) -> bool:
    """`text + "."` anywhere was its rule until 2024."""
    return re.match(text, name) is not None or name.endswith(text) or f"{text}." in name


def autoawq(text: str, name: str) -> bool:
    return text in name


def torchao(text: str, name: str) -> bool:
    return text == name or (text.startswith("re:") and re.fullmatch(text[3:], name) is not None)


Reader = Callable[[str, str], bool]
ONE, STEM = "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts"
LISTS: list[tuple[Reader, str, list[str]]] = [
    (compressed_tensors, "compressed-tensors", ["lm_head", ONE, f"{STEM}.4.up_proj"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*mlp\.experts\.4\.down_proj$"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.3\.up_proj", "re:.*gate$"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.3.*"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.[3-5]\..*"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*layers\.1\.mlp\.experts\.(3|5|11)\.\w+"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.\d\.up_proj$"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.\d+\.up_proj$", "re:.*lm_head"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*\.3\..*"]),
    (compressed_tensors, "compressed-tensors", [r"re:(lm_head|.*experts\.3\.down_proj)"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*experts\.4\.down"]),
    (compressed_tensors, "compressed-tensors", [r"re:.*xperts.4.down_proj"]),
    (compressed_tensors, "compressed-tensors", [r"re:^model\.layers\.2\.mlp\.experts\.38\..*$"]),
    (compressed_tensors, "compressed-tensors", [r"re:model.layers\.1.mlp\.experts.3\.up_proj"]),
    (gptqmodel, "gptq", [r"-:.*\.experts\.3\..*", r"+:.*experts\.(4|6)\.up_proj$"]),
    (gptqmodel, "gptq", [r"-:model\.layers\.1\.mlp\.experts\.3\..*"]),
    (auto_round, "auto-round", [ONE, r".*experts\.3\.down_proj", r"layers\.1\.mlp\.experts\.3\."]),
    (auto_round, "auto-round", [r"experts\.4\..*", r"experts\.3\.up_proj"]),
    (modelopt, "modelopt", ["lm_head", f"{STEM}.3*", "model.layers.2*"]),
    (modelopt, "modelopt", [f"{STEM}.5*", "model.layers.0.mlp.experts.39*"]),
    (modelopt, "modelopt", ["*.mlp.experts.4.*", "*experts.3.down_proj"]),
    (modelopt, "modelopt", [f"{STEM}.3?.up_proj"]),
    (transformers, "fp8", [ONE, "experts.3.down_proj", "mlp.gate", "lm_head"]),
    (transformers, "fp8", [r"model\.layers\.\d+\.mlp\.experts\.4\.up_proj"]),
    (transformers, "bitsandbytes", [f"{STEM}.3", "lm_head"]),
    (autoawq, "awq", ["gate", f"{STEM}.3", "mlp.experts.4.down_proj"]),
    (autoawq, "awq", ["mlp.experts.4."]),
    (torchao, "torchao", [ONE, r"re:.*experts\.4\.up_proj", r"re:.*\.8\..*"]),
    (auto_round, "gemma", [r"experts\.3\.(up|down)", r"^model\.layers\.1\.mlp\.experts\.5\."]),
]


@pytest.mark.parametrize(("reader", "method", "entries"), LISTS)
def test_a_list_names_the_same_modules_afterwards(
    reader: Reader, method: str, entries: list[str]
) -> None:
    written = NAMES.rewrite(entries, "config.json: ignore", method)
    decided = set()
    for old, new in pairs():
        before = any(reader(text, old) for text in entries)
        assert any(reader(text, new) for text in written) == before, (old, new, written)
        decided.add(before)
    assert decided == {True, False}
    if method != "awq":  # whose readers find a text anywhere
        assert written != entries or entries == [r"re:.*experts\.\d+\.up_proj$", "re:.*lm_head"]


EXACT = [
    # Only the number changes, whatever the text looks like.
    (ONE, "compressed-tensors", "model.layers.1.mlp.experts.2.up_proj"),
    ("language_model.model.layers.1.mlp.experts.3.w1", None,
     "language_model.model.layers.1.mlp.experts.2.w1"),
    ("layers.1.mlp.experts.3", None, "layers.1.mlp.experts.2"),
    (r"re:model\.layers\.1\.mlp\.experts\.3\..*", None,
     r"re:model\.layers\.1\.mlp\.experts\.2\..*"),
    (r"re:model.layers.1\.mlp\.experts\.3\.up_proj$", None,
     r"re:model.layers.1\.mlp\.experts\.2\.up_proj$"),
    (r"re:.*layers\.1\.(mlp|ffn)\.experts\.3\.", None, r"re:.*layers\.1\.(mlp|ffn)\.experts\.2\."),
    *(("model.layers.1.mlp.experts.5*", method, "model.layers.1.mlp.experts.3*")
      for method in ("modelopt", "compressed-tensors", "quark", "auto-round", "fp8", None)),
    (r"-:^model\.layers\.1\.mlp\.experts\.5\.(up|gate)_proj$", "gptq",
     r"-:^model\.layers\.1\.mlp\.experts\.3\.(up|gate)_proj$"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "method", "expected"), EXACT)
def test_only_the_number_changes(text: str, method: str | None, expected: str) -> None:
    assert NAMES.rewrite([text], "x", method) == [expected]


@pytest.mark.parametrize(
    "text",
    ["model.layers.0.mlp.experts.5.up_proj", r"re:.*layers\.0\.mlp\.experts\.5\..*",
     r"re:.*experts\.9\.down_proj$", r"re:.*experts\.(9|10)\.down_proj$"],
)  # fmt: skip
def test_entries_of_removed_experts_are_dropped(text: str) -> None:
    assert NAMES.rewrite(["lm_head", text], "x", "compressed-tensors") == ["lm_head"]


@pytest.mark.parametrize(
    "text",
    ["Linear", "re:.*self_attn.*", "re:.*mlp.gate$", "re:.*experts.*up_proj", "model.layers.13.mlp",
     "auto_round:auto_gptq", "0.12.4", "W4A16", "3", "re:.*", "model.layers.1.attn.q"],
)  # fmt: skip
def test_what_names_no_expert_by_number_stays(text: str) -> None:
    assert NAMES.rewrite([text], "x", "compressed-tensors") == [text]
    assert NAMES.rewrite({text: text}, "x", "gptq") == {text: text}


@pytest.mark.parametrize(
    "body", [r"(?:.*\.)?experts\.4\.up_proj", r".*\.(4)\.(up|down)_proj[*+]?$"]
)
def test_groups_that_do_not_repeat_are_read(body: str) -> None:
    written = NAMES.rewrite(["re:" + body], "x", "compressed-tensors")
    assert "model.layers.2.mlp.experts.0.up_proj" not in written
    assert "model.layers.0.mlp.experts.2.up_proj" in written


def test_lists_of_every_expert_go_on() -> None:
    """GPTQ names the matrices of a layer relative to it: all experts, in every layer alike."""
    groups = [["self_attn.q"], [f"mlp.experts.{i}.up_proj" for i in range(EXPERTS)]]
    settings = {"modules_in_block_to_quantize": groups}
    written = NAMES.rewrite(settings, "config.json:", "gptq")["modules_in_block_to_quantize"]
    assert written == [["self_attn.q"], [f"mlp.experts.{i}.up_proj" for i in range(6)]]


REFUSED = [
    ({"modules_in_block_to_quantize": [["mlp.experts.3.up_proj"]]}, "gptq",
     r"modules_in_block_to_quantize: .*'mlp\.experts\.3\.up_proj'.*relative to a layer"),
    ({"ignore": ["re:.*experts.(4"]}, "compressed-tensors", r"ignore: .*experts\.\(4.*correct it"),
    *(({"ignore": ["re:" + body]}, "compressed-tensors", "repeats a group")
      for body in (r"(\w+)+\.experts\.4", r"(a|aa)*experts\.4", r"((x*)y){3,}experts\.4")),
    ({"skip": [f"{STEM}.3*.up_proj"]}, "unheard-of", "wildcard and as a regular expression"),
    ({"extra_config": {r".*experts\.4\..*": {"bits": 8}, r".*up_proj.*": {"bits": 2}}},
     "auto-round", "decide about the same experts"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "method", "says"), REFUSED)
def test_what_cannot_be_kept_is_refused(settings: Any, method: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^file:.*{says}"):
        NAMES.rewrite(settings, "file:", method)


def resolve(options: Mapping[str, Any], reader: Reader, name: str) -> Any:
    """Exact names first, then the first pattern."""
    if name in options:
        return options[name]
    return next((value for text, value in options.items() if reader(text, name)), None)


OPTIONS: list[tuple[Reader, str, dict[str, Any]]] = [
    (auto_round, "auto-round", {ONE: {"bits": 8}, r".*experts\.4\..*": {"bits": 2}}),
    (auto_round, "auto-round", {r".*experts\.3\.up_proj": {"bits": 2}, ONE: {"bits": 16}}),
    (gptqmodel, "gptq", {r"-:.*experts\.3\..*": {}, r"+:.*up_proj.*": {"bits": 8}}),
    (
        gptqmodel,
        "gptq",
        {r"+:.*experts\.(3|4)\.up_proj": {"bits": 2}, r"+:.*up_proj$": {"bits": 8}},
    ),
    (compressed_tensors, "modelopt", {ONE: {"algo": "FP8"}, f"{STEM}.5.gate_proj": {"algo": "X"}}),
]


@pytest.mark.parametrize(("reader", "method", "options"), OPTIONS)
def test_options_by_module_decide_the_same_afterwards(
    reader: Reader, method: str, options: dict[str, Any]
) -> None:
    written = NAMES.rewrite(options, "x", method)
    assert written != options
    values = set()
    for old, new in pairs():
        value = resolve(options, reader, old)
        assert resolve(written, reader, new) == value, (old, new, written)
        values.add(str(value))
    assert len(values) > 1


def test_two_stacks_with_layers_of_the_same_name() -> None:
    """A thinker and a talker: the root tells them apart, and without it both are meant."""
    thinker, talker = lists("thinker.model.")[:1], lists("talker.model.")[:1]
    talker = [NumberedExperts(talker[0].prefix, {3: 0, 5: 1}, EXPERTS, PARTS)]
    names = ExpertNames([*thinker, *talker])
    stem = "model.layers.0.mlp.experts."
    assert names.rewrite([f"thinker.{stem}3.up_proj"], "x", None) == [f"thinker.{stem}1.up_proj"]
    assert names.rewrite([f"talker.{stem}3.up_proj"], "x", None) == [f"talker.{stem}0.up_proj"]
    both = names.rewrite([rf"re:.*{re.escape(stem)}3\.up_proj$"], "x", "compressed-tensors")
    assert both == [f"thinker.{stem}1.up_proj", f"talker.{stem}0.up_proj"]


def test_long_lists_are_rewritten_quickly() -> None:
    """A name is looked up, not evaluated on every module: 4,608 entries on 2,304 modules."""
    experts = [
        NumberedExperts(f"model.layers.{i}.mlp.experts.", {3: 0, 100: 1}, 128, PARTS)
        for i in range(6)
    ]
    entries = [f"{x.prefix}{e}.{p}" for x in experts for e in range(128) for p in PROJECTIONS]
    escaped = ["re:" + re.escape(entry) + "$" for entry in entries]
    written = ExpertNames(experts).rewrite([*entries, *escaped], "x", "compressed-tensors")
    assert len(written) == 6 * 2 * 3 * 2


# Whole checkpoints.


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("qwen3_moe", tmp_path / "full")
    return tmp_path / "full"


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def plan_for(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


FILES: list[tuple[str, Callable[[str], Any]]] = [
    ("quantization_config.json", lambda n: {"quant_method": "auto-round", "extra_config": {n: 8}}),
    ("quantize_config.json", lambda n: {"bits": 4, "dynamic": {f"-:{re.escape(n)}$": {}}}),
    ("quant_config.json", lambda n: {"w_bit": 4, "modules_to_not_convert": [n]}),
    ("hf_quant_config.json", lambda n: {"quantization": {"exclude_modules": [f"{n}*"]}}),
    ("hf_quant_config.json", lambda n: {"quantization": {"quantized_layers": {n: {"a": "FP8"}}}}),
]


@pytest.mark.parametrize(("name", "content"), FILES)
def test_every_file_of_settings_is_rewritten(
    name: str, content: Callable[[str], Any], full: Path, tmp_path: Path
) -> None:
    plan = plan_for(full)
    layer = "model.layers.1.mlp.experts"
    old, new = plan.layers[layer].kept[3], 3
    assert old != new
    write(full / name, content(f"{layer}.{old}.up_proj"))
    apply_plan(full, plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / name).read_text())
    assert written == content(f"{layer}.{new}.up_proj")


@pytest.mark.parametrize("path", [("quantization_config",), ("compression_config",),
                                  ("vendor", "quantization_config")])  # fmt: skip
def test_settings_are_found_in_config_json(
    path: tuple[str, ...], full: Path, tmp_path: Path
) -> None:
    layer = "model.layers.1.mlp.experts"
    old = plan_for(full).layers[layer].kept[3]
    settings: Any = {"quant_method": "compressed-tensors", "ignore": [f"{layer}.{old}.up_proj"]}
    for name in reversed(path[1:]):
        settings = {name: settings}
    saved.change_config(full, **{path[0]: settings})
    apply_plan(full, plan_for(full), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in path:
        found = found[name]
    assert found["ignore"] == [f"{layer}.3.up_proj"]


def test_a_refusal_names_file_field_and_entry(full: Path, tmp_path: Path) -> None:
    write(
        full / "quantize_config.json", {"modules_in_block_to_quantize": [["mlp.experts.1.up_proj"]]}
    )
    plan = plan_for(full)
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: .*in_block.*experts\.1\.up"):
        apply_plan(full, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_by_the_layout_in_memory(tmp_path: Path) -> None:
    """Mixtral's files say block_sparse_moe, its modules mlp; stacked experts have numbers too."""
    for model, layer in (("mixtral", "model.layers.0.mlp.experts"),
                         ("gpt_oss", "model.layers.0.mlp.experts")):  # fmt: skip
        folder = tmp_path / model
        saved.save(model, folder)
        plan = plan_for(folder)
        old = plan.layers[layer].kept[2]
        ignore = [f"{layer}.{old}.down_proj", rf"re:.*mlp\.experts\.{old}\.up_proj$"]
        saved.change_config(folder, compression_config={"ignore": ignore})
        apply_plan(folder, plan, tmp_path / f"{model}-out")
        written = json.loads((tmp_path / f"{model}-out" / "config.json").read_text())
        expected = {
            f"{name}.{entry.kept.index(old)}.up_proj"
            for name, entry in plan.layers.items()
            if old in entry.kept
        }
        assert written["compression_config"]["ignore"][0] == f"{layer}.2.down_proj"
        assert set(written["compression_config"]["ignore"][1:]) == expected


def test_counts_beside_config_json_follow(full: Path, tmp_path: Path) -> None:
    write(full / "params.json", {"dim": 32, "moe": {"num_experts": 8, "num_experts_per_tok": 2}})
    apply_plan(full, plan_for(full), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "params.json").read_text())
    assert written == {"dim": 32, "moe": {"num_experts": 5, "num_experts_per_tok": 2}}


def test_copied_files_that_name_experts_are_reported(full: Path, tmp_path: Path) -> None:
    (full / "recipe.yaml").write_text(r"ignore: ['re:.*mlp\.experts\.4\..*']")
    (full / "quant_log.csv").write_text("layer,module\n1,mlp.experts.7.up_proj\n")
    (full / "notes.txt").write_text("experts are great")
    report = apply_plan(full, plan_for(full), tmp_path / "out")
    notes = " ".join(report.warnings)
    assert "recipe.yaml is copied as it is" in notes
    assert "quant_log.csv is copied as it is" in notes
    assert "notes.txt" not in notes


@pytest.mark.parametrize("shard_size", [None, 40_000])
def test_tensors_described_in_headers_follow(
    shard_size: int | None, full: Path, tmp_path: Path
) -> None:
    """torchao names every tensor in the files' metadata, and says there what it stands for."""
    tensors = saved.read_all(full)
    described = {key: json.dumps({"_type": "Tensor", "from": key}) for key in tensors}
    header = {"format": "pt", "tensor_names": json.dumps(sorted(tensors)), **described}
    save_file(tensors, full / "model.safetensors", metadata=header)
    plan = plan_for(full)
    apply_plan(full, plan, tmp_path / "out", shard_size=shard_size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) > 1) is (shard_size is not None)
    written = set(saved.read_all(tmp_path / "out"))
    for path in files:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert set(json.loads(metadata.pop("tensor_names"))) == written
        assert metadata.pop("format") == "pt"
        assert set(metadata) == written
        for key, text in metadata.items():
            new, old = (re.search(r"layers\.(\d)\.mlp\.experts\.(\d)", name) for name in
                        (key, json.loads(text)["from"]))  # fmt: skip
            if new is not None and old is not None:
                kept = plan.layers[f"model.layers.{new[1]}.mlp.experts"].kept
                assert (old[1], int(old[2])) == (new[1], kept[int(new[2])])
