"""How many threads work: beside the one that computes, leaving it its cores; and alone."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def background(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads that do not disturb the ones that compute: each makes its copies alone.

    A thread that starts a team of OpenMP threads of its own makes more of them than there are
    cores, and the runtime then puts all teams to sleep between two operations: with two cores,
    streaming took a third longer than it does.

    Args:
        threads: at most so many.
        name: what their names begin with.
    """
    team = torch.get_num_threads()

    def work_alone() -> None:
        torch.get_num_threads()  # the first call gives a thread the number that all begin with
        torch.set_num_threads(1)  # for this thread, and as the number that later ones begin with
        other = threading.Thread(target=torch.set_num_threads, args=(team,))
        other.start()
        other.join()

    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=work_alone)


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for operations so small that a team's waiting takes longer than its work.

    Where other processes want the cores too, hundreds of operations on half a megabyte each take
    ten times as long with two threads as with one.
    """
    team = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(team)
