"""CPU comparison of logits: a few rows at a time, in float32, in buffers that stay in the cache.

Exponentials are powers of 2, which torch computes three times as fast as those of e; its softmax
would be fast too, but is off by 1e-5 on 262,144 tokens.
"""

import math

import torch
from torch import Tensor

# Elements of a buffer, for each thread: 1 MiB, of which three fit in the caches; with less, torch's
# own work for each operation shows.
_BUFFER = 1 << 18
# Elements whose maximum is taken first: torch finds a maximum ten times faster than its position.
_GROUP = 128


def compare_logits(full: Tensor, candidate: Tensor, full_lse: Tensor | None) -> tuple[Tensor, ...]:
    """See `reap_kernels.compare.op.compare_logits`; normalizes anew whatever `full_lse` says."""
    rows, vocabulary = full.shape
    width = -(-vocabulary // _GROUP) * _GROUP
    together = max(1, _BUFFER * torch.get_num_threads() // width)
    buffers = torch.empty(3, min(together, rows), width, dtype=torch.float32)
    tops = torch.empty(2, rows, dtype=torch.int64)
    measures = torch.empty(6, rows, dtype=torch.float32)
    for start in range(0, rows, together):
        part = slice(start, start + together)
        _measure(full[part], candidate[part], buffers, tops[:, part], measures[:, part])
    high_p, high_q, sum_p, sum_q, accepted, gained = measures.double()
    log_p, log_q = sum_p.log(), sum_q.log()
    kl = gained * math.log(2) / sum_p - log_p + log_q
    same_top = (tops[0] == tops[1]) & (log_p + log_q).isfinite()
    numbers = (accepted / sum_p, kl, high_p + log_p, high_q + log_q)
    return *(number.float() for number in numbers), same_top


def _measure(full: Tensor, candidate: Tensor, buffers: Tensor, tops: Tensor, out: Tensor) -> None:
    """Measures n rows that fit `buffers`, [3, at least n, V rounded up to groups].

    With weights p and q, exponentials of logits less the largest: `tops` [2, n], where each is
    largest first; `out` [6, n], the largest logits, the sums of p and of q, and, relative to the
    sum of p, of min(p, q) normalized alike and of p times the logits' difference.
    """
    f, c, p = buffers[:, : len(full)]
    _shift(f, full, tops[0], out[0])
    _shift(c, candidate, tops[1], out[1])
    torch.exp2(f, out=p)
    gap = f.sub_(c)
    q = torch.exp2(c, out=c)
    torch.sum(p, dim=1, out=out[2])
    torch.sum(q, dim=1, out=out[3])
    # Infinite logits give 0 * inf where p is 0, which adds nothing; a row without a softmax has a
    # sum of NaN.
    torch.nansum(gap.mul_(p), dim=1, out=out[5])
    q.mul_((out[2] / out[3]).unsqueeze(1))
    torch.sum(torch.minimum(p, q, out=p), dim=1, out=out[4])


def _shift(buffer: Tensor, logits: Tensor, top: Tensor, high: Tensor) -> None:
    """Writes n rows of logits less their largest, in units of log 2, and -inf beyond them; to `top`
    and `high` [n], where a row is largest first and that logit.
    """
    rows, vocabulary = logits.shape
    buffer[:, :vocabulary] = logits
    if vocabulary < buffer.shape[1]:
        buffer[:, vocabulary:] = -torch.inf
    groups = buffer.unflatten(1, (-1, _GROUP))
    which = groups.amax(dim=2).argmax(dim=1)
    within = groups[torch.arange(rows), which].argmax(dim=1)
    torch.add(within, which, alpha=_GROUP, out=top)
    index = top.unsqueeze(1)
    high.copy_(buffer.gather(1, index).squeeze(1))
    buffer.sub_(high.unsqueeze(1)).mul_(1 / math.log(2))
