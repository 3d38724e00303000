"""AutoRound takes our bits by expert, and at equal size they beat equal bits for all experts."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import reap_driver as rd
from tests.interop import after_pruning

PROGRAM = Path(__file__).parents[3] / "examples" / "quantize" / "with_auto_round.py"
LAYER = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, the file of bits, and both quantized to 3 bits on average."""
    folder = tmp_path_factory.mktemp("made")
    text = after_pruning.texts(folder)
    whole = after_pruning.padded(folder / "whole")
    observed = rd.observe_data(whole, text["calibration"], out=folder / "stats", seq_len=128)
    bits = folder / "bits.json"
    rd.convert(observed.stats, "auto-round", bits=3.0, out=bits)
    quantize = runpy.run_path(str(PROGRAM))["quantize"]
    options = {
        "scheme": "W3A16",
        "data": f"{text['calibration']}:{after_pruning.TOKENS}",
        "seq_len": after_pruning.SEQ_LEN,
        "group_size": 32,
        "iters": 0,
    }
    found = {"bits": bits, "whole": whole, "text": text["held_out"]}
    for name, given in (("equal", None), ("by expert", bits)):
        found[name] = Path(quantize(whole, folder / name, bits=given, **options))
    return found


def weights(folder: Path) -> int:
    """Bytes of the experts' codes."""
    tensors = load_file(folder / "model.safetensors")
    return sum(t.nbytes for n, t in tensors.items() if ".experts." in n and n.endswith("qweight"))


def test_each_expert_has_its_bits(made) -> None:
    given = json.loads(made["bits"].read_text())
    assert {options["bits"] for options in given.values()} >= {2, 3, 4}
    assert weights(made["by expert"]) <= weights(made["equal"])
    assert weights(made["by expert"]) > 0.98 * weights(made["equal"])
    config = json.loads((made["by expert"] / "config.json").read_text())
    extra = config["quantization_config"]["extra_config"]
    for expert in range(32):
        bits = given[f"{LAYER}.{expert}."]["bits"]
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert extra.get(f"{LAYER}.{expert}.{matrix}", {"bits": 3})["bits"] == bits


def test_they_beat_equal_bits(made) -> None:
    batches = rd.calibration(made["whole"], f"{made['text']}:8ktok", seq_len=128)
    rows = torch.cat([b["input_ids"] for _, b in batches if b["input_ids"].shape[1] == 128])
    found: dict[str, Tensor] = {}
    for name in ("whole", "equal", "by expert"):
        model = AutoModelForCausalLM.from_pretrained(made[name], dtype="auto").eval()
        with torch.no_grad():
            parts = [model(input_ids=part).logits.float() for part in rows.split(16)]
        found[name] = torch.cat(parts).log_softmax(-1).flatten(0, 1)
    full = found["whole"]
    equal, own = ((full.exp() * (full - found[n])).sum(-1).mean() for n in ("equal", "by expert"))
    assert own < 0.95 * equal
