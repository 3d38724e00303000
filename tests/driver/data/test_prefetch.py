"""Batches arrive in order, one ahead, from a thread that ends with the loop."""

import contextlib
import threading
import traceback
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor

from reap_driver.data.prefetch import THREAD, prefetched
from tests.limits import HUNG

CPU = torch.device("cpu")


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def numbered(count: int) -> Iterator[Tensor]:
    for i in range(count):
        yield torch.full((2, 3), i)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_order_and_end(count: int) -> None:
    assert [int(batch[0, 0]) for batch in prefetched(numbered(count), CPU)] == list(range(count))
    assert not alive()


def test_the_next_is_made_while_one_is_used_and_no_more() -> None:
    made = [threading.Event() for _ in range(4)]
    makers = set()

    def batches() -> Iterator[Tensor]:
        for i, event in enumerate(made):
            makers.add(threading.current_thread().name)
            event.set()
            yield torch.tensor([i])

    with contextlib.closing(prefetched(batches(), CPU)) as source:
        assert not made[0].is_set()  # nothing happens before it is asked for
        for i in range(3):
            assert int(next(source)) == i
            assert made[i + 1].wait(HUNG)  # without asking for it
            assert not any(event.is_set() for event in made[i + 2 :])
    assert len(makers) == 1
    assert next(iter(makers)).startswith(THREAD)
    assert not alive()


def test_an_error_comes_through_with_its_traceback() -> None:
    def broken() -> Iterator[Tensor]:
        yield torch.zeros(1)
        raise LookupError("a bad record")

    source = prefetched(broken(), CPU)
    assert next(source).shape == (1,)
    with pytest.raises(LookupError, match="a bad record") as caught:
        next(source)
    assert "broken" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert not alive()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_leaving_early_ends_the_thread(error: type[BaseException]) -> None:
    def use(batches: Iterable[Tensor]) -> None:
        for batch in batches:
            assert alive()
            if int(batch[0, 0]) == 3:
                raise error

    with contextlib.closing(prefetched(numbered(100), CPU)) as source, pytest.raises(error):
        use(source)
    assert not alive()


def test_batches_for_a_gpu_are_pinned_in_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def pin_memory(batch: Tensor) -> Tensor:
        pinned.append(threading.current_thread().name)
        return batch + 100

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    assert [int(b[0, 0]) for b in prefetched(numbered(2), torch.device("cuda"))] == [100, 101]
    assert len(pinned) == 2
    assert all(name.startswith(THREAD) for name in pinned)
    assert [int(b[0, 0]) for b in prefetched(numbered(2), CPU)] == [0, 1]
    assert len(pinned) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_on_a_gpu() -> None:
    for i, batch in enumerate(prefetched(numbered(3), torch.device("cuda"))):
        assert batch.is_pinned()
        assert torch.equal(batch.to("cuda", non_blocking=True).cpu(), torch.full((2, 3), i))
