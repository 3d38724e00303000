"""Reference comparison of logits, from the formulas, in float64 and with whole distributions."""

import torch
from torch import Tensor


def compare_logits(full: Tensor, candidate: Tensor, full_lse: Tensor | None) -> tuple[Tensor, ...]:
    """See `reap_kernels.compare.op.compare_logits`; normalizes anew whatever `full_lse` says."""
    f, c = full.double(), candidate.double()
    log_p, log_q = f.log_softmax(dim=1), c.log_softmax(dim=1)
    p, q = log_p.exp(), log_q.exp()
    valid = log_p.isnan().any(dim=1).logical_or(log_q.isnan().any(dim=1)).logical_not()
    acceptance = torch.minimum(p, q).sum(dim=1)
    # p log(p / q) is 0 where p is, whatever q.
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)
    kl = torch.where(valid, kl, torch.nan)
    same_top = (f.argmax(dim=1) == c.argmax(dim=1)) & valid
    lse = [_normalizer(x) for x in (f, c)]
    return acceptance.float(), kl.float(), *lse, same_top


def _normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp of rows, NaN for those that have no softmax."""
    lse = logits.logsumexp(dim=1)
    return torch.where(lse.isfinite(), lse, torch.nan).float()
