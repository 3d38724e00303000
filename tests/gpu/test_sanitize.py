"""What compute-sanitizer would run, run on the CPU; and what is made of each tool's last lines."""

import os
import select
import sys
from pathlib import Path

import pytest
import torch

from reap_kernels import cuda, env
from reap_kernels.experts import kernel_cuda
from reap_kernels.saliency import kernel_cuda as saliency
from tests.gpu import sanitize, variants
from tests.limits import HUNG

CLEAN = "========= ERROR SUMMARY: 0 errors"
NO_HAZARDS = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"


@pytest.mark.parametrize("words", [["cpu"], ["cpu", "small"]], ids=["all", "small"])
def test_every_launcher_runs_and_is_right(monkeypatch, capsys, words: list[str]) -> None:
    """A launcher that the module has and no variant calls would go unchecked; `Variant.small` marks
    one for each.
    """
    module = cuda.host_module(env.cuda_host())
    helpers = {"error", "set_order", "describe_experts", "table_bytes", "layer_bytes"}
    launchers = {name for name in dir(module) if callable(getattr(module, name))} - helpers
    launchers = {name for name in launchers if not name.startswith("_")}
    called = set()
    launch = cuda.Kernel.__call__

    def recorded(self, *arguments, **rest):
        called.add(self.name)
        return launch(self, *arguments, **rest)

    monkeypatch.setattr(cuda.Kernel, "__call__", recorded)
    assert variants.main(words) == 0
    assert "variants on cpu, 0 wrong" in capsys.readouterr().out
    assert called == launchers


def test_a_wrong_variant_is_named(monkeypatch, capsys) -> None:
    combine = saliency.combine

    def broken(y, router_weights, rows, out, measures):
        combine(y, router_weights, rows, out, measures)
        if out is not None and y.dtype == torch.float16 and out.numel():
            out[0, 0] += 100

    some = list(variants.every())
    some = [v for v in some if v.name.startswith(("layer of k=2 H=33", "norms of 8"))]
    monkeypatch.setattr(variants, "every", lambda: iter(some))
    monkeypatch.setattr(saliency, "combine", broken)
    assert variants.main(["cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrong: layer of k=2 H=33 torch.float16: the output is off by")
    assert lines[1] == f"{len(some)} variants on cpu, 1 wrong"


def test_products_that_are_nan_are_wrong_numbers(monkeypatch, capsys) -> None:
    product = kernel_cuda.product

    def broken(*arguments, gather=False, **rest):
        out = product(*arguments, gather=gather, **rest)
        return out if gather else out.fill_(float("nan"))

    some = [v for v in variants.every() if v.name == "products of ungated relu2 torch.bfloat16"]
    monkeypatch.setattr(variants, "every", lambda: iter(some))
    monkeypatch.setattr(kernel_cuda, "product", broken)
    assert variants.main(["cpu"]) == 1
    assert "relu2 torch.bfloat16: h and y are off by (0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "code", "clean", "text"),
    [
        (CLEAN, 0, True, "nothing found"),
        (NO_HAZARDS, 0, True, "nothing found"),
        (CLEAN.replace("0", "12"), 1, False, "12 found"),
        (NO_HAZARDS.replace("0 hazards", "3 hazards"), 0, False, "3 found"),
        (f"{CLEAN}\n{CLEAN.replace('0', '2')}", 0, False, "2 found"),
        (CLEAN, 1, False, "results are wrong or it failed: code 1"),
        ("========= Error: Target application terminated", 255, False, "code 255 and no summary"),
        ("", 0, False, "code 0 and no summary"),
    ],
)
def test_summaries(output: str, code: int, clean: bool, text: str) -> None:
    found = sanitize.verdict(output, code)
    assert found[0] is clean
    assert text in found[1]


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path: Path) -> Path:
    """As if there were a GPU with kernels; the folder where compute-sanitizer is looked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "refusal", lambda where: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sys, "path", [])
    return tmp_path


def install(folder: Path) -> None:
    """A compute-sanitizer that finds hazards and nothing else, and shows how it was called."""
    script = f"""#!{sys.executable}
import os, sys
hazards = int(sys.argv[2] == "racecheck")
print(*sys.argv[1:], os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"])
print(f"========= RACECHECK SUMMARY: {{hazards}} hazards displayed" if hazards else {CLEAN!r})
"""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compute-sanitizer").write_text(script)
    (folder / "compute-sanitizer").chmod(0o755)


def test_one_line_a_tool_and_red_where_one_finds_something(on_a_gpu: Path, capsys) -> None:
    install(on_a_gpu)
    assert sanitize.main([]) == sanitize.RED
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["memcheck", "nothing", "found"]
    assert lines[1].split() == ["racecheck", "1", "found"]
    assert "--tool racecheck" in lines[2]
    assert lines[2].endswith("-m tests.gpu.variants cuda 1")
    assert [line.split()[0] for line in lines[4:]] == ["synccheck", "initcheck"]
    assert sanitize.main(["--tools", "memcheck", "initcheck"]) == 0


def test_a_tool_that_does_not_end_is_killed_with_its_program(on_a_gpu: Path) -> None:
    install(on_a_gpu)
    program = on_a_gpu / "compute-sanitizer"
    alive = on_a_gpu / "alive"
    os.mkfifo(alive)
    # As a tool does, it begins a program of its own; that one has the pipe's only writing end.
    program.write_text(f"#!/bin/sh\n/bin/sleep 1000 > {alive} &\nwait\n")
    held = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    found = sanitize.checked("racecheck", small=True, seconds=2)
    assert found == (False, "did not end within 2 s", "")
    assert select.select([held], [], [], HUNG)[0]  # nobody can write: the program has ended
    assert os.read(held, 1) == b""
    os.close(held)
    install(on_a_gpu)
    clean, text, output = sanitize.checked("synccheck", small=True)
    assert (clean, text) == (True, "nothing found")
    assert "-m tests.gpu.variants cuda small 1" in output


def test_where_compute_sanitizer_is_looked_for(on_a_gpu: Path, monkeypatch) -> None:
    assert sanitize.program() is None
    install(on_a_gpu / "site-packages/nvidia/cu13/bin")
    monkeypatch.setattr(sys, "path", [str(on_a_gpu / "site-packages")])
    assert str(sanitize.program()).endswith("nvidia/cu13/bin/compute-sanitizer")
    install(on_a_gpu / "toolkit/bin")
    monkeypatch.setenv("CUDA_HOME", str(on_a_gpu / "toolkit"))
    assert str(sanitize.program()).endswith("toolkit/bin/compute-sanitizer")


def test_what_is_absent_is_said_with_the_remedy(on_a_gpu: Path, monkeypatch, capsys) -> None:
    assert sanitize.main([]) == sanitize.ABSENT
    assert "pip install nvidia-cuda-sanitizer-api" in capsys.readouterr().err
    monkeypatch.setattr(cuda, "refusal", lambda where: "reap_kernels._C was not built")
    assert sanitize.main([]) == sanitize.ABSENT
    assert "reap_kernels._C was not built" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sanitize.main([]) == sanitize.ABSENT
    assert "sees no CUDA device; run this on a GPU" in capsys.readouterr().err
