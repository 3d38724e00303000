"""Pruned checkpoints to quantize, the text for it, and what quantizing changed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import reap_driver as rd
from reap_driver.demo.corpus import load_corpus
from reap_driver.demo.run import MODEL
from reap_driver.evaluation.figures import Figures

WIDTH = 64  # of the bundled model's experts, padded from 48: quantizers take multiples of 32
SEQ_LEN, TOKENS = 128, "6ktok"


def texts(folder: Path) -> dict[str, Path]:
    """The bundled model's calibration and held-out text, as files."""
    found = {}
    documents = load_corpus(("calibration", "held_out"))
    for split in ("calibration", "held_out"):
        found[split] = folder / f"{split}.jsonl"
        lines = [json.dumps({"text": d.text}) for d in documents if d.split == split]
        found[split].write_text("\n".join(lines))
    return found


def padded(out: Path) -> Path:
    """The bundled model with neurons that are zero: another width, the same outputs."""
    shutil.copytree(MODEL, out)
    tensors = load_file(MODEL / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            down = name.endswith("down_proj.weight")
            more = WIDTH - tensor.shape[1 if down else 0]
            pad = (0, more) if down else (0, 0, 0, more)
            tensors[name] = torch.nn.functional.pad(tensor, pad)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": WIDTH}))
    return out


def pair(folder: Path) -> dict[str, Path]:
    """The padded model with its experts, "whole", and without half of them, "pruned"."""
    text = texts(folder)
    whole = padded(folder / "whole")
    rd.prune(whole, f"{text['calibration']}:{TOKENS}", 0.5, out=folder / "pruned", seq_len=SEQ_LEN)
    return {**text, "whole": whole, "pruned": folder / "pruned"}


def cost(before: Path, after: Path, text: Path) -> Figures:
    """What quantizing `before` to `after` changed, by our own comparison."""
    found = rd.compare(before, after, f"{text}:4ktok", seq_len=SEQ_LEN, draws=50)
    return found.comparison.overall
