"""Lines of launch tables that are off in the shipped one, put in force for a while."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from reap_kernels import device as here
from reap_kernels.tuning import Entry, Table


@contextmanager
def in_force(device: torch.device, lines: Sequence[Entry]) -> Iterator[None]:
    """Inside the context, `REAP_TUNING` names a table of these lines; others hold as before."""
    before = os.environ.get("REAP_TUNING")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.json"
        Table(here.architecture(device), "off in the shipped table", tuple(lines)).save(path)
        os.environ["REAP_TUNING"] = str(path)
        try:
            yield
        finally:
            del os.environ["REAP_TUNING"]
            if before is not None:
                os.environ["REAP_TUNING"] = before
