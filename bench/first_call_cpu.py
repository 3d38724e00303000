"""The first observed forward of a model beside its second, with and without grouped comparisons.

The first forward also compares every layer with its module's own forward. `loop` is that by each
module's own code, a loop over experts, each result read at once, as it was before; `now` is what
observing does. Both run in turn. Times are those of the process, which other processes do not
change much. A CPU shows the work, not the waiting for a device.
"""

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import cpu_model, rows
from reap_driver import observe
from reap_driver.observation.first_calls import Code, FirstCalls


class _Loop(FirstCalls):
    """Compares every layer with its module's own code, and waits for each result."""

    def reference(self, eager: Any, grouped: Any) -> Any:
        return eager, Code()

    def add(self, *args: Any) -> None:
        super().add(*args)
        self.settle(lambda: None)


VARIANTS: dict[str, type[FirstCalls]] = {"now": FirstCalls, "loop": _Loop}


def _forwards(model: Any, ids: Tensor, kind: type[FirstCalls]) -> tuple[float, float]:
    """CPU seconds of the first and of the second forward in one observation."""
    taken = []
    with mock.patch("reap_driver.observation.observer.FirstCalls", kind), observe(model) as obs:
        for _ in range(2):
            start = time.process_time()
            obs(input_ids=ids)
            taken.append(time.process_time() - start)
    return taken[0], taken[1]


def measure(dtype: torch.dtype, layers: int, length: int, rounds: int) -> dict[str, object]:
    """One row: medians over rounds of what the first forward takes beyond the second, and of their
    ratio, for both variants.
    """
    model = cpu_model.build(dtype, layers=layers)
    [ids] = cpu_model.tokens(1, length, 1)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name, kind in VARIANTS.items():
            pair = _forwards(model, ids, kind)
            if number:  # the first round warms up
                taken[name].append(pair)
    row: dict[str, object] = {
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "length": length,
        "rounds": rounds,
    }
    for name, pairs in taken.items():
        more = statistics.median(first - second for first, second in pairs)
        row[f"{name}_more_ms"] = f"{1e3 * more:.1f}"
        row[f"{name}_first/second"] = (
            f"{statistics.median(first / second for first, second in pairs):.3f}"
        )
    return row


def main(arguments: list[str]) -> None:
    """Runs both variants and appends the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench first_call_cpu", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=64, help="tokens of the one sequence")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    for name in options.dtype or ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        row = measure(dtype, options.layers, options.length, options.rounds)
        if options.dry_run:
            print(row, flush=True)
        else:
            rows.write("first_call_cpu", [row])
