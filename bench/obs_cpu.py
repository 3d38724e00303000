"""Neurons removed by Optimal Brain Surgeon on the CPU: process seconds of order and cut.

Of all experts of the bundled model, with Gram matrices of its calibration text; and of some experts
of the shape of Qwen3-30B-A3B's layers, with synthetic rows, scaled to a layer and to the model.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer

from bench import rows
from reap_driver import load_model, observe
from reap_driver.compensation.width import cut_width, width_order
from reap_driver.demo.run import MODEL, read_texts
from reap_kernels import LayerGram

# Experts, neurons and hidden size of a layer of Qwen3-30B-A3B, its layers, and what is kept.
EXPERTS, WIDTH, HIDDEN, LAYERS, KEEP = 128, 768, 2048, 48, 512
KEEP_BUNDLED = 32
ROWS = 16 * WIDTH  # per expert: about what 262,144 tokens give
Layer = tuple[Tensor | Sequence[Tensor], LayerGram]


def bundled() -> list[Layer]:
    """Down projections and Gram matrices of every layer of the bundled model."""
    calibration, _ = read_texts(AutoTokenizer.from_pretrained(MODEL))
    model = load_model(MODEL, dtype=torch.float32)
    with observe(model, gram=True) as obs:
        for windows in calibration.values():
            for part in windows.split(16):
                obs(input_ids=part)
        grams = obs.grams
    return [(model.get_submodule(name).down_proj, gram) for name, gram in grams.items()]


def synthetic(experts: int) -> Layer:
    """Experts whose neurons are correlated; values are of order 1."""
    generator = torch.Generator().manual_seed(0)
    sums = LayerGram(experts, WIDTH)
    for expert in range(experts):
        mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        h = torch.randn(ROWS, WIDTH, generator=generator)
        h = h + h @ mix
        sums.gram[expert] = h.T @ h
        sums.count[expert] = ROWS
    return torch.randn(experts, HIDDEN, WIDTH, generator=generator) / WIDTH**0.5, sums


def seconds(layers: list[Layer], keep: int, rounds: int) -> tuple[float, float]:
    """Process seconds of the orders, and of the cuts; medians over rounds."""
    orders, cuts = [], []
    for _ in range(rounds):
        began = time.process_time()
        found = [width_order(*layer, least=keep) for layer in layers]
        ordered = time.process_time()
        for layer, order in zip(layers, found, strict=True):
            cut_width(*layer, order, keep)
        orders.append(ordered - began)
        cuts.append(time.process_time() - ordered)
    return statistics.median(orders), statistics.median(cuts)


def row(
    name: str, layers: list[Layer], keep: int, rounds: int, of: tuple[int, int]
) -> dict[str, object]:
    """Figures of some layers, scaled to `of` experts and layers."""
    order, cut = seconds(layers, keep, rounds)
    measured = sum(gram.num_experts for _, gram in layers)
    each = (order + cut) / measured
    experts, number = of
    return {
        "model": name,
        "experts": experts,
        "width": layers[0][1].intermediate_size,
        "hidden": layers[0][0][0].shape[0],
        "keep": keep,
        "layers": number,
        "rounds": rounds,
        "measured_experts": measured,
        "order_s": f"{order:.3f}",
        "cut_s": f"{cut:.3f}",
        "expert_s": f"{each:.5f}",
        "layer_s": f"{each * experts:.2f}",
        "model_s": f"{each * experts * number:.1f}",
    }


def main(arguments: list[str]) -> None:
    """Measures both and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench obs_cpu", description=__doc__)
    parser.add_argument("--experts", type=int, default=4, help="of Qwen3's shape (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    layers = bundled()
    experts = layers[0][1].num_experts
    found = [row("bundled", layers, KEEP_BUNDLED, options.rounds, (experts, len(layers)))]
    large = [synthetic(options.experts)]
    found.append(row("Qwen3-30B-A3B", large, KEEP, options.rounds, (EXPERTS, LAYERS)))
    if options.dry_run:
        print(*found, sep="\n")
    else:
        rows.write("obs_cpu", found)
