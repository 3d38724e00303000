"""Fails a test that passes without an assertion that ran, which would pass whatever the code does.

What counts, while the test's own function runs: an `assert` statement that held, in a test module
or in a helper of `tests`; `pytest.raises` and `pytest.warns`, which fail where nothing comes;
`torch.testing.assert_close`. A test whose property is that nothing is raised says so:
`@pytest.mark.does_not_raise`. `tests/conftest.py` loads this module; `pyproject.toml` sets the
option that pytest's assertion hook needs.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from _pytest.assertion import rewrite

# Of the test whose function runs, whether it has asserted anything; None between tests.
_asserted: bool | None = None


def pytest_configure(config: pytest.Config) -> None:
    """Counts `assert` statements that hold, and what asserts without one."""
    rewrite._check_if_assertion_pass_impl = _held
    for place, name in ((pytest, "raises"), (pytest, "warns"), (torch.testing, "assert_close")):
        setattr(place, name, _counted(getattr(place, name)))


def _note() -> None:
    global _asserted
    if _asserted is not None:
        _asserted = True


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        _note()
        return function(*args, **kwargs)

    return counted


def _held() -> bool:
    """In place of pytest's question whether a hook wants to know of an assertion that held. With
    the hook itself, pytest would put the operands into words, for a model's tensors half a second.
    """
    _note()
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fails the test after it has passed."""
    global _asserted
    _asserted = False
    try:
        yield
        asserted = _asserted
    finally:
        _asserted = None
    if not asserted and item.get_closest_marker("does_not_raise") is None:
        pytest.fail(
            f"{item.nodeid} passed without an assertion that ran; assert its property, or mark it "
            "with @pytest.mark.does_not_raise where that is the property",
            pytrace=False,
        )
