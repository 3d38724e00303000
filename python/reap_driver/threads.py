"""Threads that work beside the one that computes, and leave it its cores."""

import threading
from concurrent.futures import ThreadPoolExecutor

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
