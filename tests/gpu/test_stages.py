"""Stages that look for time, where there is no GPU: what they check, and what they divide."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench.gpu import end_to_end, layer, products, short, steps
from bench.gpu.clock import Deadline
from bench.gpu.machine import survey
from bench.gpu.providers import Prepared, Provider, Work
from bench.gpu.verify import CheckFailed
from reap_kernels.layer import gpu
from tests.limits import HUNG

(CASE,) = layer.plan(smoke=True)


@pytest.fixture(scope="module")
def work() -> Work:
    machine = survey(torch.device("cpu"), True, "abc")
    return Work(machine, CASE, layer.weights(CASE, machine.device))


def test_steps_are_those_of_the_layer(work: Work, monkeypatch) -> None:
    timer = steps.Timer(work, "triton")
    timer.round()
    found = timer.figures()
    assert [name for name, *_ in found] == list(steps.STEPS)
    shares = [float(str(figures["share"])) for *_, figures in found]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    whole = sum(float(str(figures["ms"])) for *_, figures in found)
    assert whole == pytest.approx(float(str(found[0][3]["sum_ms"])), rel=1e-2)

    monkeypatch.setattr(steps, "_marked", lambda kernels, mark: kernels)
    with pytest.raises(CheckFailed, match="the layer has 1 steps, not sort, gate_up"):
        steps.Timer(work, "triton")


def test_a_wrong_layer_is_not_divided(work: Work, monkeypatch) -> None:
    real = gpu.observe_layer
    monkeypatch.setattr(gpu, "observe_layer", lambda *own: 1.1 * real(*own))
    with pytest.raises(CheckFailed, match=r"the output is off by 9\.9e-02, 5e-03 is allowed"):
        steps.Timer(work, "triton")


def test_products_are_compared_by_round(work: Work, monkeypatch) -> None:
    bed = products.Bed.of(work)

    def off(bed: products.Bed, product: str) -> tuple[Callable[[], Tensor], str]:
        call, note = products._pointer(bed, product)
        return lambda: 1.1 * call(), note

    kept = {"pointer": products._pointer, "again": products._grouped_mm, "off": off}
    monkeypatch.setattr(products, "PROVIDERS", kept)
    for product in products.PRODUCTS:
        first, again, wrong = products.measure(bed, product, 3)
        assert (first["status"], again["status"], wrong["status"]) == ("timed", "timed", "wrong")
        assert "rows are off by 1.0e-01" in str(wrong["note"])
        assert (first[products.RATIO], first["calls"]) == ("1.0000", 3)
        assert float(str(again[products.RATIO])) > 0
    for ours in products.OURS:
        monkeypatch.setattr(products, "PROVIDERS", {ours: off})
        assert products.measure(bed, "down", 1)[0]["status"] == "failed"


def test_what_is_absent_is_a_row(work: Work) -> None:
    rows = {str(row["provider"]): row for row in products.measure(products.Bed.of(work), "down", 1)}
    assert list(rows) == list(products.PROVIDERS)
    assert rows["DeepGEMM"]["note"] == "deep_gemm is not installed"


def test_a_short_call_that_is_wrong_is_not_timed(work: Work) -> None:
    def prepare(own: Work) -> Prepared:
        out = torch.ones(len(own.sample), CASE.hidden)
        return Prepared([lambda: out], lambda: (out, None))

    asked = [*short.providers(smoke=True), Provider("reap", "off", False, prepare)]
    *timed, wrong = short._measured(work, asked, 1)
    assert [row["status"] for row in timed] == ["timed", "timed"]
    assert (wrong["status"], wrong["host_ms"]) == ("failed", "")
    theirs = next(row for row in timed if row["provider"] == "transformers")
    assert theirs[short.RATIO] == "1.000"


def test_steps_are_timed_behind_other_work(work: Work, monkeypatch) -> None:
    """Else events of short calls would tell when the host launched, not what the device took."""
    timer, order = steps.Timer(work, "triton"), []
    begin = steps.Marks.begin
    monkeypatch.setattr(steps, "busy", lambda device: order.append("busy"))
    monkeypatch.setattr(steps.Marks, "begin", lambda own: (order.append("call"), begin(own)))
    timer.round()
    assert order == ["busy", "call"]


def test_a_variant_that_fails_does_not_end_the_others(work: Work, monkeypatch) -> None:
    """A new kernel that cannot run must not cost the figures of those that can."""

    def fails(batches: list[Tensor]) -> None:
        raise RuntimeError("no kernel image")

    known = (end_to_end._OBSERVED, end_to_end._UNOBSERVED, ("transformers", "eager", "no"))
    variants = {**dict.fromkeys(known, len), ("reap", "fused", "yes"): fails}
    parts = {"machine": work.machine, "batches": [torch.zeros(2, 4)] * 2, "note": "", "length": 4}
    bench = SimpleNamespace(variants=lambda: dict(variants), layers=1, batch=2, **parts)
    monkeypatch.setattr(end_to_end, "all_experts_seconds", lambda bench: 1.0)
    monkeypatch.setattr(end_to_end, "_contexts", lambda *_: [])
    rows = end_to_end._measure(bench, Deadline(HUNG), "checked", 2)  # type: ignore[arg-type]
    found = {(row["provider"], row["variant"], row["observed"]): row for row in rows}
    assert [found[key]["status"] for key in known] == ["timed"] * 3
    assert all("sequences" not in str(found[key]["note"]) for key in known)
    wrong = found["reap", "fused", "yes"]
    assert (wrong["status"], wrong["note"]) == ("failed", "RuntimeError: no kernel image")
    rows = end_to_end._measure(bench, Deadline(0.0), "checked", 2)  # type: ignore[arg-type]
    note = f"2 of 4 sequences: {Deadline(0).reason}"
    assert all(note in str(row["note"]) for row in rows if row["status"] == "timed")
    for key in known:
        variants[key] = fails
        with pytest.raises(RuntimeError, match="no kernel image"):
            end_to_end._measure(bench, Deadline(HUNG), "", 2)  # type: ignore[arg-type]
