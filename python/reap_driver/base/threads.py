"""Background threads that leave the cores to computation, and single-threaded sections."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def background(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of background threads whose torch operations are single-threaded.

    If background threads started OpenMP teams of their own, there would be more OpenMP threads than
    cores, and the runtime would put all teams to sleep between operations: on two cores, streaming
    took a third longer.

    Args:
        threads: how many at most.
        name: prefix of their names.
    """
    team = torch.get_num_threads()

    def work_alone() -> None:
        torch.get_num_threads()  # the first call in a thread applies the process-wide default to it
        torch.set_num_threads(1)  # changes this thread and the default of threads to come
        other = threading.Thread(target=torch.set_num_threads, args=(team,))
        other.start()
        other.join()

    return ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=work_alone)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Inside, torch uses one thread: for operations so small that synchronizing threads costs more.

    While other processes use the cores too, hundreds of operations on half a megabyte each take
    ten times as long with two threads as with one.
    """
    team = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(team)
