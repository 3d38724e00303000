"""Starts real processes as torchrun does, and reads their output.

`torchrun` runs the command itself. `worlds` calls the function behind that command in one process
that has imported everything and is forked for each rank, so several worlds need only one import.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
_PACKAGE = "tests.driver.distributed"


def torchrun(size: int, module: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of this folder in `size` processes."""
    options = ["--standalone", "--nproc-per-node", str(size)]
    return _run("-m", "torch.distributed.run", *options, "-m", f"{_PACKAGE}.{module}")


def worlds(module: str, out: Path, sizes: tuple[int, ...]) -> None:
    """Calls `main(folder)` of a module of this folder in worlds of these sizes.

    Each gets its own folder, `out / str(size)`.
    """
    done = _run("-m", f"{_PACKAGE}.launch", module, str(out), *map(str, sizes))
    assert done.returncode == 0, done.stderr


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _main(module: str, out: Path, sizes: list[int]) -> None:
    import torch
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    main = importlib.import_module(f"{_PACKAGE}.{module}").main
    for size in sizes:
        folder = out / str(size)
        folder.mkdir()
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=f"{module}{size}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            max_restarts=0,
        )
        elastic_launch(config, main)(folder)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
