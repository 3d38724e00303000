"""Evaluates a model on held-out text, and how closely a pruned model follows the unpruned one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reap_driver.demo.corpus import DOMAINS, Document
from reap_kernels.errors import DataError


@dataclass(frozen=True)
class Evaluation:
    """Figures over ``tokens`` predicted tokens.

    Attributes:
        loss: mean negative log-likelihood per token in nats, domains weighted equally.
        domain_loss: mean negative log-likelihood per token of each domain, in nats.
        agreement: share of positions whose most likely next token is the reference's, in [0, 1];
            1 without a reference.
        tokens: number of predicted tokens.
        predictions: int64 [windows, length - 1], most likely next tokens; later evaluations use
            them as their reference.
    """

    loss: float
    domain_loss: dict[str, float]
    agreement: float
    tokens: int
    predictions: Tensor = field(repr=False)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(self.loss)


def token_windows(
    documents: list[Document], tokenizer: Any, *, per_domain: int, length: int
) -> dict[str, Tensor]:
    """Fixed windows of token ids for each domain: int64 [per_domain, length].

    The windows of a domain are equally spaced in the concatenation of its documents, so they depend
    only on the text. They overlap where a Python version has a little less text.

    Raises:
        DataError: a domain has less than half the text that windows without overlap would need.
    """
    windows = {}
    for domain in DOMAINS:
        texts = [d.text + tokenizer.eos_token for d in documents if d.domain == domain]
        ids = [i for text in tokenizer(texts)["input_ids"] for i in text] if texts else []
        if 2 * len(ids) < per_domain * length:
            raise DataError(
                f"demo text of the domain {domain!r} has {len(ids)} tokens, {per_domain} windows"
                f" of {length} need at least {per_domain * length // 2}; use a Python installation"
                " with its full library"
            )
        step = (len(ids) - length) / max(1, per_domain - 1)
        starts = [int(i * step) for i in range(per_domain)]
        windows[domain] = torch.tensor([ids[s : s + length] for s in starts])
    return windows


@torch.no_grad()
def evaluate(
    model: Any,
    windows: dict[str, Tensor],
    *,
    reference: Evaluation | None = None,
    batch: int = 16,
) -> Evaluation:
    """Evaluates a model on windows of text.

    Every window is a sequence of its own; its first token is not predicted.

    Args:
        model: a language model in eval mode.
        windows: domain -> token ids, int64 [n, length].
        reference: an evaluation on the same windows, to measure agreement with.
        batch: windows per forward.
    """
    losses: dict[str, list[Tensor]] = {domain: [] for domain in windows}
    predictions = []
    for domain, ids in _batches(windows, batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses[domain].append(nll.double())
        predictions.append(logits.argmax(-1))
    domain_loss = {domain: float(torch.cat(parts).mean()) for domain, parts in losses.items()}
    guesses = torch.cat(predictions)
    agreement = 1.0
    if reference is not None:
        agreement = float((guesses == reference.predictions).double().mean())
    loss = sum(domain_loss.values()) / len(domain_loss)
    return Evaluation(loss, domain_loss, agreement, guesses.numel(), guesses)


def _batches(windows: dict[str, Tensor], batch: int) -> Iterator[tuple[str, Tensor]]:
    for domain, ids in windows.items():
        for part in ids.split(batch):
            yield domain, part
