"""Self-checks: run once, kept on disk, and a backend whose numbers are wrong is refused."""

import json
import os

import pytest
import torch

import reap_kernels as rk
from reap_kernels import doctor, selfcheck
from reap_kernels.dispatch import Request, Sizes
from reap_kernels.errors import BackendUnavailable, KernelError
from reap_kernels.experts.triton_backend import check_layer, launches
from reap_kernels.saliency import gpu as saliency
from reap_kernels.testing import CASES, make_experts, make_inputs
from tests.sealed import change_document

CPU = torch.device("cpu")
CASE = CASES[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path))
    selfcheck.forget()
    yield
    selfcheck.forget()


def observe(backend: str | None = "triton") -> torch.Tensor:
    inputs = make_inputs(CASE)
    call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, make_experts(CASE))
    return rk.observe_layer(*call, rk.LayerStats(CASE.experts), backend=backend)


def test_runs_once_and_is_kept() -> None:
    runs = []
    for _ in range(2):
        assert selfcheck.verdict("op", CPU, {"a": 1}, lambda: runs.append(1)) is None
    selfcheck.forget()  # as a new process would
    assert selfcheck.verdict("op", CPU, {"a": 1}, lambda: runs.append(1)) is None
    assert len(runs) == 1
    assert selfcheck.verdict("op", CPU, {"a": 2}, lambda: runs.append(1)) is None
    assert len(runs) == 2
    assert list(selfcheck.saved().values()) == [None, None]


def test_inputs_are_made_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert (
            selfcheck.verdict("op", CPU, {}, lambda: None if torch.ones(1).item() else "") is None
        )


def test_wrong_numbers_refuse_the_backend(monkeypatch) -> None:
    """A kernel that drops the gate, as a miscompiled one might, never serves."""
    combine = saliency.combine
    monkeypatch.setattr(
        saliency,
        "combine",
        lambda y, router_weights, *rest: combine(y, torch.ones_like(router_weights), *rest),
    )
    with pytest.raises(
        BackendUnavailable, match=r"self-check gave wrong numbers: the output is off"
    ):
        observe()
    torch.testing.assert_close(observe(None), observe("reference"))
    assert any("wrong numbers" in (reason or "") for reason in json_on_disk().values())


def json_on_disk() -> dict:
    path = selfcheck.path()
    return json.loads(path.read_text())["verdicts"] if path.exists() else {}


def test_wrong_statistics_refuse_the_backend(monkeypatch) -> None:
    reduce = saliency.reduce_slots
    monkeypatch.setattr(
        saliency,
        "reduce_slots",
        lambda m, g, rows, stats, mask, *rest: reduce(m, g, rows, stats, None, *rest),
    )
    with pytest.raises(BackendUnavailable, match=r"count differs from the reference's"):
        observe()


def test_a_kernel_that_does_not_compile_is_refused_with_its_error(monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("ptxas exited with 255")

    monkeypatch.setattr(saliency, "combine", fails)
    with pytest.raises(BackendUnavailable, match=r"self-check failed: RuntimeError: ptxas exited"):
        observe()
    assert json_on_disk() == {}, "an error may pass; only numbers are a verdict to keep"


def test_a_launch_that_cuda_refuses_refuses_the_backend() -> None:
    def refused() -> str | None:
        raise KernelError("CUDA kernel route could not be launched: cudaErrorNoKernelImage (209)")

    for _ in range(2):  # for as long as the process lives
        reason = selfcheck.verdict("op", CPU, {"a": 3}, refused)
        assert reason is not None
        assert "self-check could not be launched: CUDA kernel route" in reason
    assert json_on_disk() == {}


def test_a_wrong_setting_is_no_verdict(monkeypatch) -> None:
    monkeypatch.setenv("REAP_SCRATCH_BYTES", "4GB")
    with pytest.raises(BackendUnavailable, match=r"^REAP_SCRATCH_BYTES='4GB' is not a number"):
        observe()
    monkeypatch.delenv("REAP_SCRATCH_BYTES")
    torch.testing.assert_close(observe(), observe("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flipped", "nested", "type", "pipe"])
def test_damaged_file_is_no_verdict(damage: str) -> None:
    runs, path = [], selfcheck.path()
    selfcheck.verdict("op", CPU, {}, lambda: "off by 3")
    match damage:
        case "cut":
            path.write_text("{")
        case "flipped":
            path.write_text(path.read_text().replace("off by 3", "off by 1"))
        case "nested":
            path.write_text("[" * 100_000)
        case "type":
            change_document(path, selfcheck.FORMAT, {"verdicts": dict.fromkeys(json_on_disk(), 5)})
        case "pipe":
            path.unlink()
            os.mkfifo(path)
    selfcheck.forget()
    assert selfcheck.verdict("op", CPU, {}, lambda: runs.append(1)) is None
    assert len(runs) == 1
    assert list(json_on_disk().values()) == [None]


def test_cache_that_cannot_be_written_warns(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set REAP_CACHE_DIR"):
        assert selfcheck.verdict("op", CPU, {}, lambda: None) is None


def test_doctor_shows_verdicts(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    selfcheck.verdict("layer.triton", CPU, {"dtype": "x"}, lambda: "off by 3")
    other = {"op=layer triton=3.3.0 dtype=x": "of another version", **selfcheck.saved()}
    change_document(selfcheck.path(), selfcheck.FORMAT, {"verdicts": other})
    shown = doctor.report()["selfcheck"]
    assert shown["file"] == str(selfcheck.path())
    reasons = [reason for what, reason in shown["verdicts"].items() if "dtype=x" in what]
    assert reasons == ["its self-check gave wrong numbers: off by 3"]


@pytest.mark.parametrize("hidden", [2048, 2040, 2880, 2047])
def test_checks_the_code_that_would_run(hidden: int) -> None:
    """A small layer leaves over of every tile what the real one does, so it compiles the same."""
    sizes = Sizes(hidden=hidden, intermediate=776)
    request = Request("layer", CPU, torch.float16, "silu", sizes)
    case, experts = check_layer(request)
    chosen = launches(request)
    for block in (chosen.up.block_k, chosen.down.block_n, 16):
        assert case.hidden % block == hidden % block
        assert case.hidden >= 2 * block
    for block in (chosen.up.block_n, chosen.down.block_k, 8):
        assert case.intermediate % block == 776 % block
    small = Sizes(case.tokens, case.top_k, case.experts, case.hidden, case.intermediate)
    assert launches(request._replace(sizes=small)) == chosen
    assert (experts.hidden_size, experts.intermediate_size) == (case.hidden, case.intermediate)
