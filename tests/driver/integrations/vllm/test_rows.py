"""What layers inside vLLM compute with torch alone: lowest logits, chunks, sums, valid masks."""

import itertools

import pytest
import torch

from reap_driver.integrations.vllm.engine import rows
from reap_driver.planning.budget import Router
from reap_kernels.errors import PlanError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_removed_experts_have_no_weight_at_all(dtype: torch.dtype) -> None:
    low = rows.lowest(dtype)
    logits = torch.tensor([low, 1.0, low, -60.0], dtype=dtype)
    assert logits.isfinite().all()
    for scores in (
        logits.float().softmax(0),
        logits.softmax(0),
        logits.sigmoid(),
        logits.float().sigmoid(),
        torch.nn.functional.softplus(logits.float()).sqrt(),
    ):
        assert scores[[0, 2]].tolist() == [0, 0]
        assert scores[1] > 0
    assert (logits[0] + logits[2]).isfinite()
    # A bias that is lowered instead puts any score below every other one.
    assert 1.0 + logits[0] < -60.0


def test_masks_that_are_valid_are_those_that_plans_may_make() -> None:
    for n_group, topk_group, top_k in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3, 4)):
        if topk_group > n_group or top_k > 8 // n_group * topk_group:
            continue
        shape = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group}
        most = Router("layer", 8, **shape).most()
        size = 8 // n_group
        for each in range(size + 1):
            removed = [group * size + i for group in range(n_group) for i in range(each)]
            if len(removed) <= most:
                rows.check_removed("layer", removed, experts=8, **shape)
            else:
                with pytest.raises(
                    PlanError, match=r"layer layer: . experts are left.*remove fewer"
                ):
                    rows.check_removed("layer", removed, experts=8, **shape)


@pytest.mark.parametrize("removed", [[8], [-1], [2, 2]])
def test_unknown_experts_are_refused(removed: list[int]) -> None:
    with pytest.raises(PlanError, match=r"has experts 0\.\.7, each once"):
        rows.check_removed("layer", removed, experts=8, top_k=2, n_group=1, topk_group=1)


def test_chunks_hold_every_token_once_and_are_bounded() -> None:
    sizes = itertools.product((0, 1, 5, 3000), (1, 8, 40_000), (32, 7168, 2**27), (1, 8192, 2**20))
    for tokens, top_k, hidden, most_rows in sizes:
        found = list(rows.chunks(tokens, top_k, hidden, most_rows))
        assert [found[0].start, found[-1].stop] == [0, tokens]
        assert all(a.stop == b.start for a, b in itertools.pairwise(found))
        for part in found:
            held = (part.stop - part.start) * top_k
            # One token is computed whatever it takes.
            assert held <= max(top_k, min(rows.MOST_ROWS, most_rows))
            assert held <= top_k or held * hidden * 4 <= rows.MOST_BYTES


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(5 * 3, 16, generator=generator).to(dtype)
    weights = torch.rand(5, 3, generator=generator)
    own = y.double().view(5, 3, 16)
    for found, exact in (
        (rows.combined(y, weights, 5), (own * weights.double().unsqueeze(-1)).sum(1)),
        (rows.combined(y, None, 5), own.sum(1)),
    ):
        assert found.dtype == dtype
        # One rounding to dtype of a sum in float32 of three terms.
        bound = exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6
        assert ((found.double() - exact).abs() <= bound).all()
