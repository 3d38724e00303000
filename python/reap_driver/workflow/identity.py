"""What identifies a run: what its command asks for, and the environment it runs in."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import transformers

import reap_kernels
from reap_driver.data.packing import PackedSource
from reap_driver.files.digest import weights_digest
from reap_driver.observation.data_parallel import Ranks
from reap_driver.workflow.holding import Holding
from reap_driver.workflow.inspection import Model, device_of
from reap_driver.workflow.options import DataOptions, RunOptions


def asked_for(
    model: Model,
    sources: Sequence[PackedSource],
    options: DataOptions,
    run: RunOptions,
    folds: int,
) -> dict[str, Any]:
    """What a command asks to be observed: its outcome is the same, but for rounding, wherever and
    however it runs.
    """
    data = {}
    for number, source in enumerate(sources, 1):
        facts = source.provenance()
        data[f"data {number}"] = f"{facts['group']}: {facts['tokens']} tokens {facts['digest']}"
    return {
        "model": model.provenance["model"]["config_digest"],
        "weights": weights_digest(model.source),
        "packing": options.packing,
        "seq_len": sources[0].seq_len,
        "seed": options.seed,
        "answers only": options.answers_only,
        "chat template": sources[0].chat_template,
        **data,  # last: what is above changes the tokens too, and errors name the first difference
        "folds": folds,
        "dtype": run.dtype,
        "backend": run.backend,
    }


def environment(run: RunOptions, how: Holding, world: Ranks) -> dict[str, Any]:
    """What must be the same besides for a run to go on with the same bits."""
    return {
        "batch sizes": how.batch_sizes,
        "streamed": how.stream,
        "offload": how.offload,
        "device": _device_name(run, world),
        "rank": f"{world.rank} of {world.size}",
        "reap_kernels": reap_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("REAP_")},
    }


def _device_name(run: RunOptions, world: Ranks) -> str:
    """The kind of device: another kind, or another number of threads, may round otherwise."""
    if run.device_map is not None:
        return f"map {run.device_map}"
    device = device_of(run, world)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{device.type} {capability}, {threads} threads"
