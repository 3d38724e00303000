"""How checks of a GPU are run and judged, where there is no GPU."""

import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.gpu import verify
from bench.gpu.clock import Deadline
from reap_kernels.errors import BackendUnavailable, KernelError
from reap_kernels.layer import cuda_backend
from reap_kernels.testing import CASES, Case, make_experts, make_inputs
from tests.gpu import checks, failing, grams, models, norms, processes, running
from tests.gpu.checks import Check
from tests.gpu.test_gpu import as_users_run, judge, name_of
from tests.limits import HUNG

CPU = torch.device("cpu")
SMALL = replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2)


def test_single_ops_are_checked() -> None:
    """Apart from the smoke mode, since the self-checks of three ops take the interpreter long."""
    ran = checks.single_ops(CPU, "triton", torch.bfloat16, SMALL)
    assert ran == "sort equal, outputs and sums within bounds"
    ran = checks.single_ops(CPU, "cuda", torch.bfloat16, SMALL)
    assert ran == "sort equal, sums within bounds"


@pytest.mark.parametrize(
    ("run", "op", "says"),
    [
        (grams.summed, "observe_layer", "gram is off by"),
        (grams.alone, "gram", "gram is off by"),
        (grams.crossed, "cross", "moments are off by"),
    ],
)
def test_gram_matrices_are_checked(run, op: str, says: str, monkeypatch) -> None:
    """Right ones pass; a sum that is off by a hundredth fails."""
    case = replace(SMALL, hidden=16, intermediate=24)
    assert "e-" in run(CPU, "triton", torch.float32, case)
    real = getattr(grams.rk, op)

    def wrong(*arguments, backend=None, **rest):
        out = real(*arguments, backend=backend, **rest)
        sums = rest["gram"].gram if rest.get("gram") else None
        if op != "observe_layer":
            sums = arguments[3].gram if op == "gram" else arguments[5]
        if backend == "triton" and sums is not None:
            sums *= 1.01
        return out

    monkeypatch.setattr(grams.rk, op, wrong)
    with pytest.raises(checks.CheckFailed, match=says):
        run(CPU, "triton", torch.float32, case)


@pytest.mark.parametrize(
    ("op", "run", "sizes", "says"),
    [
        ("rms_norm", norms.normed, (3, 40), "off by"),
        ("rotary", norms.rotated, (1, 2, 1, 8, 8), "off by"),
        ("rotary", norms.rotated, (1, 2, 1, 8, 6), "other bits"),
    ],
)
def test_norms_are_checked(op: str, run, sizes, says: str, monkeypatch) -> None:
    """Right ones pass; results that are off by a tenth fail."""
    assert "of the elements differ" in run(CPU, "triton", torch.float16, *sizes)
    real = getattr(norms.rk, op)

    def wrong(*arguments, backend=None, **rest):
        first, *others = real(*arguments, backend=backend, **rest)
        return (first * 1.1 if backend == "triton" else first, *others)

    monkeypatch.setattr(norms.rk, op, wrong)
    with pytest.raises(checks.CheckFailed, match=says):
        run(CPU, "triton", torch.float16, *sizes)


def test_refusals_are_told_from_failures() -> None:
    def row(backend: str, case: Case, dtype: torch.dtype) -> dict[str, object]:
        check = Check(case.name, backend, dtype, checks.compare, (case,))
        return processes.outcome(check, CPU, Deadline(HUNG))

    odd = next(case for case in CASES if case.name == "odd-sizes")
    assert row("grouped_mm", odd, torch.float32)["result"] == "refused"
    assert row("triton", odd, torch.float64)["result"] == "failed"
    assert verify.is_red("grouped_mm", "its self-check gave wrong numbers: the output is off", CPU)
    late = processes.outcome(
        Check("late", "triton", torch.float32, checks.compare, (odd,)), CPU, Deadline(-1)
    )
    assert late["result"] == "skipped"
    assert "budget" in str(late["detail"])


def test_refusals_of_cuda_are_red_where_its_kernels_are(monkeypatch) -> None:
    """Absent kernels are a limit of the machine; everything else that goes wrong is red."""
    refused = BackendUnavailable("k = 33 is above 32")
    wrong = BackendUnavailable("its self-check could not be launched: no kernel image")
    assert verify.outcome_of(refused, "cuda", CPU)[0] == "failed"
    assert verify.outcome_of(wrong, "cuda", CPU)[0] == "failed"
    assert verify.outcome_of(KernelError("no kernel image"), "cuda", CPU)[0] == "failed"
    monkeypatch.setenv("REAP_CUDA_HOST", "/nowhere/_host.so")
    assert verify.outcome_of(refused, "cuda", CPU)[0] == "failed"
    monkeypatch.delenv("REAP_CUDA_HOST")
    assert verify.outcome_of(refused, "cuda", CPU)[0] == "refused"
    assert verify.outcome_of(KernelError("no kernel image"), "cuda", CPU)[0] == "failed"


def test_bounds_of_cuda_are_those_of_its_products(monkeypatch) -> None:
    """Products of grouped_mm round twice, and take more scratch."""
    inputs, experts = make_inputs(SMALL), make_experts(SMALL)
    for name in ("triton", "grouped_mm"):
        monkeypatch.setattr(cuda_backend, "stage_backends", lambda _, name=name: {"layer": name})
        assert verify.products_of("cuda", inputs.hidden, SMALL.top_k, experts) == name
    assert verify.products_of("triton", inputs.hidden, SMALL.top_k, experts) == "triton"


def made(*runs: Callable[..., str]) -> list[Check]:
    return [Check(run.__name__, "triton", torch.float32, run, ()) for run in runs]


def test_checks_run_in_processes_and_a_dead_one_is_red_alone() -> None:
    """Neither a process that dies nor a device that fails for good is met by the next check."""
    every = made(failing.dies, failing.has_a_device, failing.loses_the_device, failing.has_a_device)
    found = processes.run(CPU, every, Deadline(HUNG), workers=1)
    assert [row["check"] for row in found] == [check.name for check in every]
    assert [row["result"] for row in found] == ["failed", "pass", "failed", "pass"]
    assert found[0]["detail"] == "its process died with code -6"
    assert "an illegal memory access" in str(found[2]["detail"])


def test_checks_that_hang_are_killed_together(monkeypatch) -> None:
    """All of them so long after the deadline, not one after another."""
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    start = time.monotonic()
    every = made(failing.hangs, failing.hangs, failing.has_a_device)
    found = processes.run(CPU, every, failing.Ending(2), workers=2)
    assert [row["result"] for row in found] == ["failed", "failed", "skipped"]
    assert "it had no result 0.5 s after the deadline" in str(found[1]["detail"])
    assert time.monotonic() - start < HUNG


@pytest.mark.parametrize("result", ["pass", "refused", "skipped", "failed"])
def test_a_row_is_an_outcome_of_a_test(result: str) -> None:
    """A limit of a backend skips with its reason, as does what this machine cannot show."""
    row: dict[str, object] = {"result": result, "detail": "why"}
    if result == "pass":
        assert judge(row) is None
    else:
        kind = pytest.fail.Exception if result == "failed" else pytest.skip.Exception
        with pytest.raises(kind, match="why"):
            judge(row)


def test_checks_have_names_of_their_own() -> None:
    names = [name_of(check) for check in running.plan(smoke=False)]
    assert len(set(names)) == len(names) > 400


def test_checks_run_without_what_tests_set(monkeypatch) -> None:
    monkeypatch.setenv("REAP_CUDA_HOST", "x")
    assert os.environ["TRITON_INTERPRET"] == "1"
    with as_users_run():
        assert not {"TRITON_INTERPRET", "REAP_CUDA_HOST", "REAP_CPU_DTYPE"} & set(os.environ)
    assert os.environ["REAP_CUDA_HOST"] == "x"
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_models_on_a_device_are_checked(monkeypatch) -> None:
    """What a device gets wrong is found: here a sum that is off, and logits that are."""
    real = models.observed
    (_, run, own), *_ = models.OBSERVING
    assert "within 0.0e+00" in run(CPU, "", torch.float32, *own)
    calls = []

    def wrong(model, batches, **how):
        calls.append(model)
        stats = real(model, batches, **how)
        if len(calls) == 1:
            next(iter(stats.layers.values())).norm_sum.mul_(1.01)
        return stats

    monkeypatch.setattr(models, "observed", wrong)
    with pytest.raises(checks.CheckFailed, match=r"sums of model\.layers\.0.* are off by 1\.0e-02"):
        run(CPU, "", torch.float32, *own)
    with pytest.raises(checks.CheckFailed, match="logits is off"):
        models.near(torch.ones(3), torch.full((3,), 1.1), 1e-3, "logits")


def test_what_is_not_installed_is_told_from_what_is_wrong() -> None:
    def absent(*_: object) -> str:
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    def ours(*_: object) -> str:
        raise ModuleNotFoundError("No module named 'tests.x'", name="tests.x")

    with pytest.raises(verify.NotHere, match="install it"):
        models.imported(absent, CPU)
    with pytest.raises(ModuleNotFoundError):
        models.imported(ours, CPU)
