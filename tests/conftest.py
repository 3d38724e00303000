"""Shared by all tests: one thread per worker, and uninitialized memory filled with NaN."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run in its interpreter, on the CPU; their self-checks' verdicts stay out of $HOME.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("REAP_CACHE_DIR", str(Path(__file__).parent.parent / "out/test-cache"))
# The CPU backend computes alike on every machine, whatever instructions it has.
os.environ.setdefault("REAP_CPU_DTYPE", "float32")
# No test reads the hub: a name that only it could have is refused at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# CUDA kernels run as `make host` compiles them, for the CPU.
os.environ.setdefault(
    "REAP_CUDA_HOST",
    next(map(str, (Path(__file__).parent.parent / "out/host").glob("_host*.so")), ""),
)

import pytest
import torch

import tests.interpreter  # noqa: F401  what it replaces, all tests run by

pytest_plugins = ("tests.assertions",)
# Assertions in helpers that tests import count as those in the tests themselves do.
_HELPERS = ("csrc", "driver", "forks", "fuzz", "gpu", "ops", "sealed")
pytest.register_assert_rewrite(*(f"tests.{name}" for name in _HELPERS))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _loading_has_ended() -> Iterator[None]:
    """What transformers replaces while it loads is back after each test; else models that later
    tests make would keep uninitialized weights.
    """
    yield
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return
    made = {
        name: getattr(library.PreTrainedModel, name) for name in ("init_weights", "tie_weights")
    }
    made |= {"normal_": torch.nn.init.normal_}
    left = [f"{name} is {own}" for name, own in made.items() if own.__name__ != name]
    assert not left, f"this test ended in the middle of loading: {'; '.join(left)}"


@pytest.fixture
def poisoned():
    """`torch.empty` yields NaN (integers: their maximum), so a value nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the backends that an installed library has on a CPU; none that tests alone have."""
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delenv("REAP_CUDA_HOST")
