"""Sums of inner activations as values: packing, merging, the symmetric matrix, sizes, refusals."""

import pytest
import torch

import reap_kernels as rk
from reap_kernels.errors import ShapeError, UsageError


def filled(seed: int, experts: int = 3, width: int = 5) -> rk.LayerGram:
    rng = torch.Generator().manual_seed(seed)
    sums = rk.LayerGram(experts, width)
    for tensor in sums.packed():
        tensor.copy_(torch.randint(1, 100, tensor.shape, generator=rng))
    return sums


def test_sums_begin_at_zero_in_their_dtypes() -> None:
    sums = rk.LayerGram(3, 5)
    facts = [(tuple(tensor.shape), tensor.dtype) for tensor in sums.packed()]
    assert facts == [
        ((3, 5, 5), torch.float32),
        ((3, 5), torch.float64),
        ((3,), torch.float64),
        ((3,), torch.int64),
    ]
    assert not any(bool(tensor.any()) for tensor in sums.packed())
    assert (sums.num_experts, sums.intermediate_size, sums.device.type) == (3, 5, "cpu")


def test_packed_sums_are_the_same_tensors() -> None:
    sums = filled(0)
    again = rk.LayerGram.from_packed(sums.packed())
    for mine, theirs in zip(sums.packed(), again.packed(), strict=True):
        assert mine is theirs


def test_a_copy_shares_nothing() -> None:
    sums, want = filled(0), filled(0)
    sums.to("cpu").merge_(filled(1))
    for mine, theirs in zip(sums.packed(), want.packed(), strict=True):
        assert torch.equal(mine, theirs)


def test_merging_adds_every_field() -> None:
    sums = filled(1).merge_(filled(2))
    for total, one, two in zip(sums.packed(), filled(1).packed(), filled(2).packed(), strict=True):
        assert torch.equal(total, one + two)


def test_only_the_lower_triangle_is_read() -> None:
    sums = filled(3)
    want = sums.gram[1].double().tril()
    want = want + want.T - want.diag().diag()
    sums.gram[1] += torch.full((5, 5), torch.nan).triu(1)
    second = sums.second(1)
    assert second.dtype == torch.float64
    assert torch.equal(second, want)


def test_stated_bytes_are_those_of_the_tensors() -> None:
    held = sum(tensor.nbytes for tensor in rk.LayerGram(3, 5).packed())
    assert rk.LayerGram.nbytes_of(3, 5) == held


def test_sums_made_in_inference_mode_can_be_added_to_later() -> None:
    with torch.inference_mode():
        sums = rk.LayerGram(2, 2)
    sums.merge_(filled(0, 2, 2))
    assert not any(tensor.is_inference() for tensor in sums.packed())


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_empty_sums_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=f"got {sizes[0]} experts of {sizes[1]} neurons"):
        rk.LayerGram(*sizes)


def test_sums_of_another_layer_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 experts of 6 neurons into 3 of 5"):
        filled(0).merge_(filled(0, width=6))


@pytest.mark.parametrize("expert", [-1, 3])
def test_experts_there_are_not_are_refused(expert: int) -> None:
    with pytest.raises(UsageError, match=rf"expert {expert} leaves 0\.\.2"):
        filled(0).second(expert)
