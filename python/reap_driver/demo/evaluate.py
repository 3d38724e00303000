"""How good a model is on held-out text, and how closely a pruned one follows the unpruned one."""

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

    loss: mean negative log-likelihood per token, nats; perplexity is its exponential.
    domain_loss: the same per domain.
    agreement: share of positions with the reference's most likely next token (1 without reference).
    predictions: most likely next tokens [windows, length - 1], the reference of later evaluations.
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
    """Fixed windows of token ids [per_domain, length] for each domain, spread over its documents.

    The windows of a domain are equally spaced in its documents' concatenation, so they depend on
    nothing but the text. They overlap where a Python version brings a little less of it.

    Raises:
        DataError: a domain has less than half the text that windows without overlap need.
    """
    windows = {}
    for domain in DOMAINS:
        texts = [d.text + tokenizer.eos_token for d in documents if d.domain == domain]
        ids = [i for text in tokenizer(texts)["input_ids"] for i in text] if texts else []
        if 2 * len(ids) < per_domain * length:
            raise DataError(
                f"demo text of the domain {domain!r} has {len(ids)} tokens, {per_domain} windows"
                f" of {length} need {per_domain * length // 2} at least; use a Python installation"
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
    """Evaluate ``model`` on ``windows`` ({domain: token ids [n, length]}).

    All domains weigh alike. Every window is its own sequence; its first token is context only.
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
