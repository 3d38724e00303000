"""Triton's interpreter, as `tests.interpreter` changes it, finds overflows of integers."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

LARGEST = 2**31 - 1


@triton.jit
def combine(left, right, out, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    a, b = tl.load(left + place), tl.load(right + place)
    if OPERATION == 0:
        found = a + b
    elif OPERATION == 1:
        found = a - b
    else:
        found = a * b
    tl.store(out + place, found)


def run(operation: int, left: int, right: int, dtype: torch.dtype) -> list[int]:
    a, b = (torch.tensor([7, value, 7, 7], dtype=dtype) for value in (left, right))
    out = torch.empty(4, dtype=dtype)
    combine[(1,)](a, b, out, OPERATION=operation, SIZE=4)
    values: list[int] = out.tolist()
    return values


@pytest.mark.parametrize(
    ("operation", "left", "right", "says"),
    [
        (0, LARGEST, 1, "int32 overflow detected for operation add"),
        (1, -LARGEST, 2, "int32 overflow detected for operation sub"),
        (2, 2**16, -(2**16), "int32 overflow detected for operation mul"),
    ],
)
def test_one_integer_that_overflows_is_an_error(
    operation: int, left: int, right: int, says: str
) -> None:
    with pytest.raises(InterpreterError, match=says):
        run(operation, left, right, torch.int32)


@pytest.mark.parametrize(
    ("operation", "left", "right", "found"),
    [(0, LARGEST - 1, 1, LARGEST), (1, -LARGEST, 1, -LARGEST - 1), (2, 2**15, -(2**16), -(2**31))],
)
def test_integers_at_their_limits_are_not(
    operation: int, left: int, right: int, found: int
) -> None:
    assert run(operation, left, right, torch.int32)[1] == found


def test_wide_integers_are_not_checked() -> None:
    assert run(0, 2**62, 2**61, torch.int64)[1] == 2**62 + 2**61
