"""Measure the trained model, write its card: ``python -m bench.demo_model.measure DIR``.

Held-out perplexity, how evenly the experts are used, and how far they have specialized; the figures
are printed as JSON and go into the card, ``README.md``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo_model.specialization import ablation, domain_information, routing_shares
from reap_driver.demo.corpus import load_corpus
from reap_driver.demo.evaluate import evaluate, token_windows

WINDOWS = 64  # per domain, for perplexity and routing
ABLATION_WINDOWS = 4  # per domain, evaluated once for every expert
LENGTH = 256


def measure(model: Any, tokenizer: Any) -> dict[str, Any]:
    """All figures of the card, as plain values."""
    documents = load_corpus(["held_out"])
    windows = token_windows(documents, tokenizer, per_domain=WINDOWS, length=LENGTH)
    evaluation = evaluate(model, windows)
    shares = routing_shares(model, windows)
    few = {d: w[:: WINDOWS // ABLATION_WINDOWS] for d, w in windows.items()}
    with tqdm(desc="removing one expert at a time") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        growth = ablation(model, few, progress)
    return {
        "held_out_tokens": evaluation.tokens,
        "perplexity": evaluation.perplexity,
        "domain_perplexity": {d: math.exp(v) for d, v in evaluation.domain_loss.items()},
        "unigram_perplexity": math.exp(unigram_loss(windows, model.config.vocab_size)),
        "load": _load(shares),
        "domain_information_bits": domain_information(shares).tolist(),
        "domain_information_bits_at_most": math.log2(len(windows)),
        "ablation": _ablation_figures(growth),
    }


def unigram_loss(windows: dict[str, Tensor], vocab_size: int) -> float:
    """Loss in nats of the best model that ignores context: the entropy of the token frequencies.

    A yardstick: although fitted to the very text it is measured on, a language model must beat it.
    """
    counts = torch.bincount(
        torch.cat([w[:, 1:].flatten() for w in windows.values()]), minlength=vocab_size
    )
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log()).sum())


def _load(shares: Tensor) -> dict[str, Any]:
    """How evenly experts are used; 1 is an equal share of a layer's routed slots."""
    load = shares.mean(1) * shares.shape[-1]
    return {
        "least_used_expert": load.min(-1).values.tolist(),
        "most_used_expert": load.max(-1).values.tolist(),
        "unused_experts": int((load == 0).sum()),
    }


def _ablation_figures(growth: Tensor) -> dict[str, float]:
    """Loss growth in nats from losing one expert, [layers, E, domains] summed up."""
    worst = growth.max(-1).values
    return {
        "mean_growth": float(growth.mean()),
        "median_growth_of_the_worst_domain": float(worst.median()),
        "largest_growth_of_a_domain": float(worst.max()),
        "median_share_of_the_worst_domain": float(
            (worst / growth.clamp(min=0).sum(-1).clamp(min=1e-9)).median()
        ),
    }


_CARD = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: text-generation
---
# A small Mixture-of-Experts model of Python's own library

Qwen3-MoE architecture, {parameters:,} parameters, {layers} layers of {experts} experts of which
{active} serve a token, vocabulary {vocabulary}. It exists so that pruning can be tried, tested and
shown in seconds; it writes text that looks like Python and means nothing.

## Training

`python -m bench.demo_model.train --out DIR`, seed {seed}, read {tokens_seen:,} tokens in
{cpu_minutes:.1f} minutes of CPU time with {threads} thread(s); {minutes:.1f} minutes by the clock,
on {cores} cores busy with other work too. Python {python}, torch {torch}; the recipe is in
`training.json`.{note}

The text is the library that comes with Python, in four domains; training tokens available:
{available}.
Modules are split by a hash of their name into training (80 %), calibration (10 %) and held-out text
(10 %); no paragraph of the latter two is trained on.

## License

The weights and the tokenizer are under Apache-2.0, the license of the package they come with. They
were trained on the text of Python's library, which the Python Software Foundation distributes under
its own license (https://docs.python.org/3/license.html); none of its files is part of the model.

## Measured on {held_out_tokens:,} held-out tokens

`python -m bench.demo_model.measure DIR` measures and writes this page.

| | all | {domain_names} |
|---|---|{rule}
| perplexity | {perplexity:.2f} | {domain_perplexities} |

The best model without context, fitted to the same text, has perplexity {unigram_perplexity:.0f}.
Character tables repeat one another by nature, hence their low perplexity.

| MoE layer | least used expert | most used expert | expert tells domain |
|---|---|---|---|
{layer_rows}

Use is relative to an equal share of the layer's routed slots ({unused} experts are never used). The
last column is the information in bits that the chosen expert carries about the domain of the text
(0: all domains use the experts alike; at most {bits_at_most:.0f}).

Without one expert (its tokens go to the next in line) the loss grows by {mean:.4f} nats, averaged
over experts and domains. The median expert's most affected domain loses {median:.4f} nats, which is
{share:.0%} of that expert's damage; the most that any domain loses is {largest:.2f} nats.
"""


def render_card(config: Any, training: dict[str, Any], figures: dict[str, Any]) -> str:
    """The model card, every figure taken from the records."""
    per_domain = figures["domain_perplexity"]
    load, bits = figures["load"], figures["domain_information_bits"]
    layers = zip(load["least_used_expert"], load["most_used_expert"], bits, strict=True)
    lost = figures["ablation"]
    return _CARD.format(
        **{k: training[k] for k in ("parameters", "tokens_seen", "threads", "cores")},
        minutes=training["seconds"] / 60,
        cpu_minutes=training["cpu_seconds"] / 60,
        **training["software"],
        seed=training["recipe"]["seed"],
        note=f" {training['note']}" if "note" in training else "",
        layers=config.num_hidden_layers,
        experts=config.num_experts,
        active=config.num_experts_per_tok,
        vocabulary=config.vocab_size,
        available=", ".join(f"{d} {n:,}" for d, n in training["tokens_available"].items()),
        held_out_tokens=figures["held_out_tokens"],
        perplexity=figures["perplexity"],
        unigram_perplexity=figures["unigram_perplexity"],
        domain_names=" | ".join(per_domain),
        rule="---|" * len(per_domain),
        domain_perplexities=" | ".join(f"{p:.2f}" for p in per_domain.values()),
        layer_rows="\n".join(
            f"| {i} | {low:.2f} | {high:.2f} | {b:.2f} |" for i, (low, high, b) in enumerate(layers)
        ),
        unused=load["unused_experts"],
        bits_at_most=figures["domain_information_bits_at_most"],
        mean=lost["mean_growth"],
        median=lost["median_growth_of_the_worst_domain"],
        share=lost["median_share_of_the_worst_domain"],
        largest=lost["largest_growth_of_a_domain"],
    )


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder that the training script wrote")
    folder: Path = parser.parse_args().model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    figures = measure(model, AutoTokenizer.from_pretrained(folder))
    training = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(render_card(model.config, training, figures))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
