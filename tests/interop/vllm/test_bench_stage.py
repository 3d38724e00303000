"""The stage `vllm` of `bench.gpu` and the benchmark of a layer run where vLLM is installed."""

import torch

from bench import vllm_cpu, vllm_layer
from bench.gpu import machine, report, vllm_layers
from bench.gpu.clock import Deadline

HUNG = 600.0


def test_the_stage_checks_and_times_a_layer_or_says_why_not(monkeypatch) -> None:
    here = machine.survey(torch.device("cpu"), True, "abc")
    (row,) = vllm_layers.run(here, Deadline(HUNG))
    assert row["status"] == "timed", row["note"]
    assert all(float(str(row[f"{kind}_ms"])) > 0 for kind in vllm_layers.KINDS)
    assert "tiny" in report.vllm([row])
    (row,) = vllm_layers.run(here, Deadline(-1))
    assert row["status"] == "skipped"
    assert "budget" in report.vllm([row])
    monkeypatch.setattr(vllm_layer.Hooked, "enter", lambda self, kind: self.layer.install())
    (row,) = vllm_layers.run(here, Deadline(HUNG))
    assert (row["status"], row["alone_ms"]) == ("failed", "")
    assert "masked: the output is that without a mask" in str(row["note"])


def test_the_benchmark_measures_what_its_row_says() -> None:
    device = torch.device("cpu")
    with vllm_layer.world(device, 8) as config, torch.inference_mode(), vllm_layer.running(config):
        row = vllm_cpu.measure(8, 1)
    assert row["kernel"] == "CPUUnquantizedExperts"
    assert all(float(str(row[f"{kind}/alone"])) > 0 for kind in vllm_cpu.KINDS[1:])
    assert float(str(row["replace_error"])) < 1e-5
