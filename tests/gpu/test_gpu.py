"""Every check of a GPU as a test, the kernels' variants, and compute-sanitizer: `pytest -m gpu`.

Other tests of the same session run kernels on the CPU, in Triton's interpreter and as compiled for
the CPU, so that whatever runs here on a GPU runs in processes of its own, without their settings.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from bench.gpu import ROOT
from bench.gpu.clock import Deadline
from tests.gpu import processes, running, sanitize
from tests.gpu.checks import Check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and torch sees none"
    ),
]
# What tests/conftest.py sets for the CPU.
_SETTINGS = ("TRITON_INTERPRET", "REAP_CUDA_HOST", "REAP_CPU_DTYPE")
_HOURS = 4 * 3600.0


def name_of(check: Check) -> str:
    """A test's id."""
    return f"{check.name}-{check.backend}-{str(check.dtype).removeprefix('torch.')}"


def judge(row: dict[str, object]) -> None:
    """Passes, skips or fails by the row of a check."""
    if row["result"] in ("refused", "skipped"):
        pytest.skip(f"{row['result']}: {row['detail']}")
    if row["result"] != "pass":
        pytest.fail(str(row["detail"]), pytrace=False)


@contextmanager
def as_users_run() -> Iterator[None]:
    """Without the settings of tests; processes that begin inside do not have them."""
    held = {name: os.environ.pop(name) for name in _SETTINGS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> dict[str, dict[str, object]]:
    """The rows of all checks that this session selected, which share processes."""
    chosen: dict[str, Check] = {}
    for item in request.session.items:
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        if isinstance(check, Check):
            chosen[name_of(check)] = check
    device = torch.device("cuda", torch.cuda.current_device())
    with as_users_run():
        found = processes.run(device, list(chosen.values()), Deadline(_HOURS))
    return dict(zip(chosen, found, strict=True))


@pytest.mark.parametrize("check", running.plan(smoke=False), ids=name_of)
def test_check(check: Check, rows: dict[str, dict[str, object]]) -> None:
    row = rows[name_of(check)]
    judge(row)
    assert row["result"] == "pass"


def test_every_variant_of_every_cuda_kernel() -> None:
    reason = sanitize.no_kernels()
    if reason is not None:
        pytest.skip(reason)
    with as_users_run():
        command = [sys.executable, "-m", "tests.gpu.variants", "cuda"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitize.TOOLS)
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    reason = sanitize.absent()
    if reason is not None:
        pytest.skip(reason)
    with as_users_run():
        assert sanitize.check(tool)
