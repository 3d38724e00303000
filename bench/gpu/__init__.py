"""One command for a GPU: is everything right, how fast is it, beside what.

`python -m bench.gpu` runs from a checkout, nothing installed, in less than eight minutes: the
machine's peaks, then the checks of `tests/gpu` (`pytest -m gpu` runs them too), then timings of
single kernels, of one layer and of a whole model; `--only` names other stages: `steps` of a layer,
`choices` of backends, `short` calls by four clocks, `products` side by side, a `profile` of one
batch, `tiles`, layers of `vllm` under our plugin, and `streaming`, layers that are loaded while
others compute. `--queue --budget 480` answers what docs/gpu-status.md leaves open instead, as far
as the seconds reach, and says what they did not reach. Exit codes: 0; 1 where a check failed (and
nothing after it was timed), or an item of the queue (and the next ones ran); 4 without a CUDA
device. `python -m tests.gpu.sanitize` runs the CUDA kernels under compute-sanitizer.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
for _folder in (str(ROOT / "python"), str(ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)


def main(arguments: list[str]) -> None:
    """See `bench.gpu.command`."""
    from bench.gpu import command

    sys.exit(command.main(arguments))
