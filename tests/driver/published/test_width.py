"""What fewer neurons of an expert mean for published models: the table in docs/support.md."""

import json
import re
from pathlib import Path

import pytest

from reap_driver.compat.config_file import read_config
from reap_driver.compat.library_faults import fault
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.workflow.inspection import Model, inspect_model
from reap_driver.writer.narrowing import smaller_model
from reap_driver.writer.pruned_model import stacks_of_files
from reap_kernels.errors import UnsupportedModel
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import published_config, small_config
from tests.driver.writer.test_narrow import REFUSED
from tests.driver.zoo import names

PAGE = (Path(__file__).parents[3] / "docs/support.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([\w.-]+) \| (\d+) \| ([\w. ]+) \| ([\w. ]+) \|$", re.MULTILINE)
ROWS = {name: (int(width), three, half) for name, width, three, half in ROW.findall(PAGE)}
# Experts that every token takes: their matrices, by the end of their names.
SHARED = re.compile(r"(shared_experts?|share_expert)\.(gate_proj|up_proj|down_proj)\.weight$")


def narrow(model: Model, folder: Path, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the model whose experts keep so many neurons."""
    layers = {
        layer.name: LayerPlan.keeping(
            layer.num_experts,
            tuple(range(layer.num_experts)),
            layer.intermediate_size,
            (tuple(range(width)),) * layer.num_experts,
        )
        for layer in model.layers
    }
    raw, plan = read_config(folder), Plan({}, "x", "uniform", 0.5, layers, "")
    experts = {layer.name: layer.num_experts for layer in model.layers}
    stacks = stacks_of_files(folder, model.meta, raw, experts, trust_remote_code=False)
    made = smaller_model(folder, model.meta, raw, plan, stacks, trust=False)
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def shared_width(model: Model, folder: Path, width: int) -> str:
    """What becomes of shared experts, as the table says it; nothing else may change."""
    before = {name: tuple(tensor.shape) for name, tensor in model.meta.state_dict().items()}
    try:
        after = narrow(model, folder, width)
    except UnsupportedModel:
        return "refused"
    inside = tuple(f"{layer.name}." for layer in model.layers)
    changed = {n for n in before if before[n] != after[n] and not n.startswith(inside)}
    assert all(SHARED.search(name) for name in changed)
    if not any(SHARED.search(name) for name in before):
        return "none"
    if not changed:
        return "as before"
    [factor] = {
        b / a for name in changed for a, b in zip(before[name], after[name], strict=True) if a != b
    }
    return f"{factor:g} times"


def test_the_table_has_every_published_model() -> None:
    assert list(ROWS) == list(MODELS)
    assert f"is written for {len(names()) - len(REFUSED)} of the {len(names())} architectures" in (
        PAGE
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_the_configuration_gives(name: str, tmp_path: Path) -> None:
    config = small_config(name)
    config.pop("quantization_config", None)  # as in the checkpoint that it was quantized from
    why = fault(config["architectures"][0])
    if why is not None:
        pytest.skip(f"transformers cannot run it: {why}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = inspect_model(str(tmp_path))
    width = model.layers[0].intermediate_size
    found = [shared_width(model, tmp_path, part * width // 4) for part in (3, 2)]
    assert found == list(ROWS[name][1:])
    text = json.dumps(published_config(name))
    assert re.search(rf'"(moe_|expert_)?intermediate_size(_mlp)?": {ROWS[name][0]}\b', text)
