"""Start-up time of `import reap_kernels` and `reap-kernels --help`, relative to `import torch`."""

import argparse
import statistics
import subprocess
import sys
import time

from bench import rows

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import reap_kernels": [sys.executable, "-c", "import reap_kernels"],
    "--help": [sys.executable, "-m", "reap_driver", "--help"],
}


def main(arguments: list[str]) -> None:
    """Runs the commands in turn, several rounds, and appends one row of medians."""
    parser = argparse.ArgumentParser(prog="python -m bench startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken[name].append(time.perf_counter() - start)
    # The first round warms the page cache and the byte code.
    middle = {name: statistics.median(times[1:]) for name, times in taken.items()}
    ratio = middle["import reap_kernels"] / middle["import torch"]
    row: dict[str, object] = {
        "rounds": options.rounds,
        "import_torch_s": f"{middle['import torch']:.3f}",
        "import_reap_kernels_s": f"{middle['import reap_kernels']:.3f}",
        "ratio": f"{ratio:.3f}",
        "help_s": f"{middle['--help']:.3f}",
    }
    rows.write("startup", [row])
