"""Thread counts are restored."""

import pytest
import torch

from reap_driver.base.threads import single_threaded


def test_one_thread_inside_and_as_many_as_before_after() -> None:
    def fail() -> None:
        with single_threaded():
            assert torch.get_num_threads() == 1
            raise ValueError("inside")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
