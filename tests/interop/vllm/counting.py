"""What a worker holds, asked by vLLM's route for development, `/collective_rpc`."""

import gc
from pathlib import Path

import torch

FLAGS = ("--worker-extension-cls", "tests.interop.vllm.counting.Counting")
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


class Counting:
    """Methods that vLLM adds to its worker class."""

    def count_tensors(self) -> dict[str, int]:
        """The number of tensors that live in this process, and their bytes."""
        gc.collect()
        found = [held for held in gc.get_objects() if type(held) is torch.Tensor]
        return {"tensors": len(found), "bytes": sum(tensor.nbytes for tensor in found)}


def resident(process: int) -> int:
    """Bytes of memory that a process holds."""
    [line] = [
        line
        for line in Path(f"/proc/{process}/status").read_text().splitlines()
        if line.startswith("VmRSS:")
    ]
    return int(line.split()[1]) * 1024
