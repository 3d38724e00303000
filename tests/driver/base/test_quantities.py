"""Sizes, counts and rates as people write them."""

import pytest

from reap_driver.base.quantities import number, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5GB", 5 * 10**9),
        ("800 MB", 8 * 10**8),
        ("1.5kB", 1500),
        ("20b", 20),
        ("2T", 2 * 10**12),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert whole(text, "B") == value


@pytest.mark.parametrize(
    "text", ["", "B", "16", "GB", "-5GB", "5 G B", "5iB", "1e9", "0", "1.5", "\u0665"]
)
def test_what_is_no_size(text: str) -> None:
    assert whole(text, "B") is None


def test_rates() -> None:
    assert number("2.5GB/s", "B/s") == 2.5e9
    assert number("400T", "FLOP/s") == number("400 TFLOP/s", "FLOP/s") == 400e12
    assert number("2GB", "B/s") is None
    assert number("400", "FLOP/s") is None
