"""Train the bundled model: ``python -m bench.demo_model.train --out DIR``.

A Qwen3-MoE of a few million parameters with its own byte-level BPE tokenizer, trained on the
running Python's own library (``corpus.py``) and saved in Hugging Face format. Seeded; one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bench.demo_model.specialization import router_outputs
from reap_driver.demo.corpus import DOMAINS, Document, load_corpus

END_OF_TEXT = "<|endoftext|>"
# Plain words, no special tokens: the model has never seen a chat, the template only makes
# `messages` records usable with it.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, beside the Python version whose library is read."""

    seed: int = 0
    vocab_size: int = 2048
    hidden_size: int = 160
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    experts_per_token: int = 4
    expert_size: int = 48
    seq_len: int = 256
    batch: int = 8  # sequences a step
    steps: int = 2600
    warmup: int = 80
    muon_lr: float = 0.01
    adam_lr: float = 0.008
    weight_decay: float = 0.05
    balance: float = 0.02  # weight of the load-balancing loss
    # share of the sequences per domain, in the order of DOMAINS
    mixture: tuple[float, ...] = (0.60, 0.22, 0.08, 0.10)


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe) -> Qwen3MoeForCausalLM:
    """The untrained model, fp32."""
    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.expert_size * recipe.experts_per_token,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.experts_per_token,
        moe_intermediate_size=recipe.expert_size,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2 * recipe.seq_len,
        router_aux_loss_coef=recipe.balance,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config)
    # 1.4 times the speed of the loop over experts, with gradients
    model.set_experts_implementation("grouped_mm")
    return model


def token_streams(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int
) -> dict[str, Tensor]:
    """All tokens of each domain, documents in shuffled order, each followed by END_OF_TEXT."""
    rng = np.random.default_rng(seed)
    streams = {}
    for domain in DOMAINS:
        texts = [d.text + END_OF_TEXT for d in documents if d.domain == domain]
        order = rng.permutation(len(texts))
        encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
        streams[domain] = torch.tensor([token for ids in encoded for token in ids])
    return streams


def batches(streams: dict[str, Tensor], recipe: Recipe) -> Iterator[Tensor]:
    """Endless [batch, seq_len] token ids: the mixture's domains, each without replacement."""
    rng = np.random.default_rng(recipe.seed)
    windows = {d: _windows(s, recipe.seq_len, rng) for d, s in streams.items()}
    while True:
        domains = rng.choice(DOMAINS, size=recipe.batch, p=recipe.mixture)
        yield torch.stack([next(windows[d]) for d in domains])


def _windows(stream: Tensor, length: int, rng: np.random.Generator) -> Iterator[Tensor]:
    while True:  # one epoch a turn, cut at a new offset each time
        offset = int(rng.integers(length))
        for start in rng.permutation(np.arange(offset, len(stream) - length, length)):
            yield stream[start : start + length]


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    """Load-balancing loss of one layer, 1 when all experts are used alike.

    E * sum_e f_e p_e with f_e the share of routed slots and p_e the mean router probability (Fedus
    et al. 2021, eq. 4), over a whole batch of mixed domains: experts stay free to specialize by
    domain. logits [T, E], chosen [T, k].
    """
    experts = logits.shape[-1]
    share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


def as_matrices(parameter: Tensor, blocks: int = 1) -> list[Tensor]:
    """The matrices of a parameter as parameters of their own, with its memory and its gradients.

    `torch.optim.Muon` takes [rows, columns] only and orthogonalizes the update of a whole
    parameter. Experts are stacked, and their gate and up projections fused.

    Args:
        parameter: [rows, columns], or experts [E, blocks * rows, columns].
        blocks: matrices fused along the rows.

    Returns:
        E * blocks parameters [rows, columns]; each backward pass sets their gradients.
    """

    def split(tensor: Tensor) -> list[Tensor]:
        stack = tensor if tensor.ndim == 3 else tensor[None]
        return [block for matrix in stack.unbind() for block in matrix.chunk(blocks)]

    matrices = [nn.Parameter(block) for block in split(parameter.detach())]

    def share_gradient(whole: Tensor) -> None:
        assert whole.grad is not None
        for matrix, gradient in zip(matrices, split(whole.grad), strict=True):
            matrix.grad = gradient

    parameter.register_post_accumulate_grad_hook(share_gradient)
    return list(matrices)


def optimizers(model: Qwen3MoeForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the projections and experts, AdamW for embedding, router and norms."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.ndim < 2 or "embed" in name or ".gate.weight" in name:
            others.append(p)
        else:
            matrices += as_matrices(p, blocks=2 if "gate_up" in name else 1)
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(
            others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Factor on the peak rates: linear warm-up, then cosine to 2 %."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train(model: Qwen3MoeForCausalLM, streams: dict[str, Tensor], recipe: Recipe) -> list[float]:
    """Train in place and return every step's loss; a line of progress every 20 steps on stderr."""
    optims = optimizers(model, recipe)
    schedules = [LambdaLR(o, lambda step: learning_rate(step, recipe)) for o in optims]
    losses: list[float] = []
    began = time.time()
    with router_outputs(model) as routed:
        for ids in itertools.islice(batches(streams, recipe), recipe.steps):
            routed.clear()
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            balance = torch.stack([balance_loss(out[0], out[2]) for out in routed]).mean()
            (loss + recipe.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim, schedule in zip(optims, schedules, strict=True):
                optim.step()
                optim.zero_grad()
                schedule.step()
            model.zero_grad()
            losses.append(loss.item())
            if len(losses) % 20 == 0:
                rate = len(losses) * ids.numel() / (time.time() - began)
                print(
                    f"step {len(losses)}/{recipe.steps}  loss {sum(losses[-20:]) / 20:.3f}"
                    f"  balance {balance.item():.3f}  {rate:.0f} tokens/s",
                    file=sys.stderr,
                    flush=True,
                )
    return losses


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bf16 with tokenizer, generation config and config."""
    model.generation_config.update(max_new_tokens=128, do_sample=True, temperature=0.7, top_p=0.9)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # published Qwen3-MoE configs call the count num_experts, which every reader knows;
    # transformers 5 reads both names and writes the other one
    path = out / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_and_save(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Train by a recipe, write the model, and return the record that is written beside it."""
    began, cpu = time.time(), time.process_time()
    documents = load_corpus(["train"])
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    streams = token_streams(documents, tokenizer, recipe.seed)
    model = build_model(recipe)
    losses = train(model, streams, recipe)
    save(model, tokenizer, out)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_available": {d: len(s) for d, s in streams.items()},
        "final_loss": round(sum(losses[-100:]) / len(losses[-100:]), 4),
        "tokens_seen": recipe.steps * recipe.batch * recipe.seq_len,
        "seconds": round(time.time() - began),
        "cpu_seconds": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "software": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    """Command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    for name, value in asdict(Recipe()).items():
        if isinstance(value, (int, float)):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    out: Path = options.pop("out")
    print(json.dumps(train_and_save(Recipe(**options), out)), file=sys.stderr)


if __name__ == "__main__":
    main()
