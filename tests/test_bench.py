"""The GPU benchmark, where there is no GPU: its smoke mode, its refusal, and red before numbers."""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bench import llm_compressor_cpu, rows, table_parts, tables
from bench.gpu import (
    command,
    grams,
    kernels,
    layer,
    machine,
    parts,
    projected,
    report,
    streamed_files,
    streaming,
)
from bench.gpu.clock import Deadline
from bench.gpu.providers import PROVIDERS, Prepared, Work
from reap_kernels.testing import CASES, Case
from tests.gpu import checks, processes, running
from tests.gpu.checks import Check
from tests.gpu.masks import TORCH
from tests.gpu.models import DRIVER
from tests.gpu.products import NAME as WGMMA
from tests.limits import HUNG

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
SMALL = replace(CASES[-1], tokens=16, experts=4, top_k=2, groups=2)


def bench_gpu(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python -m bench.gpu` as a user runs it from a checkout."""
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def here() -> machine.Machine:
    return machine.survey(CPU, True, "abc")


@dataclass(frozen=True)
class Smoke:
    """A run of every stage in smoke mode; never changed.

    Attributes:
        out: folder of its rows.
        disk: folder in which streaming wrote.
        kept: whether bench/results is as before.
    """

    out: Path
    disk: Path
    kept: bool


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    """In this process, where kernels have passed their self-checks already."""
    out, disk = tmp_path_factory.mktemp("smoke"), tmp_path_factory.mktemp("disk")
    before = {path.name: path.stat().st_mtime_ns for path in rows.RESULTS.iterdir()}
    options = ["--only", ",".join(command.STAGES), "--budget", str(100 * HUNG)]
    options += ["--folder", str(disk), "--out", str(out)]
    assert command.main(["--smoke", *options]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in rows.RESULTS.iterdir()}
    return Smoke(out, disk, before == after)


def test_smoke_mode_runs_every_stage(smoke: Smoke) -> None:
    found = {path.name for path in smoke.out.iterdir()}
    assert found == {f"{name}.csv" for name in command.FILES.values()} | {"gpu.md"}
    for name in command.FILES.values():
        assert {row["smoke"] for row in read(smoke.out / f"{name}.csv")} == {"yes"}
    ran = read(smoke.out / "gpu_checks.csv")
    passed = {row["backend"] for row in ran if row["result"] == "pass"}
    assert passed == {*checks.BACKENDS, TORCH, DRIVER, WGMMA}
    skipped = {row["detail"] for row in ran if row["result"] != "pass"}
    assert skipped == {"needs a CUDA device", "needs a GPU of compute capability 9.0 with cuDNN"}
    single = read(smoke.out / "gpu_kernels.csv")
    assert {row["status"] for row in single} == {"timed"}
    assert {row["variant"] for row in single} == {"triton", "cuda", "reference", "torch"}
    assert all(float(row["us"]) > 0 and float(row["error"]) < 4e-3 for row in single)
    timed = [row for row in read(smoke.out / "gpu_layer.csv") if row["status"] == "timed"]
    keys = [(row["provider"], row["variant"], row["observed"]) for row in timed]
    assert keys == [(p.name, p.variant, "yes" if p.observed else "no") for p in PROVIDERS]
    assert all(float(row["ms"]) > 0 and float(row["error"]) < 2e-2 for row in timed)
    sums = read(smoke.out / "gpu_gram.csv")
    assert {row["status"] for row in sums} == {"timed"}
    ratios = {row["variant"]: row[grams.RATIO] for row in sums if row["provider"] == grams.WITH}
    assert list(ratios) == list(grams.BACKENDS)
    assert all(float(ratio) > 0 for ratio in ratios.values())
    whole = read(smoke.out / "gpu_end_to_end.csv")
    assert {row["provider"] for row in whole} == {"reap", "transformers", "all-experts"}
    streamed = read(smoke.out / "gpu_streaming.csv")
    kinds = [("timed", "layer 0"), ("timed", "layer 1")] * 2 + [("projected", "projected")] * 2
    assert [(row["status"], row["what"]) for row in streamed] == kinds
    assert {row["vllm"] for row in read(smoke.out / "gpu_vllm.csv")} == {"absent"}
    page = (smoke.out / "gpu.md").read_text()
    assert "Smoke run" in page
    assert all(f"{p.name}: {p.variant}" in page for p in PROVIDERS)
    assert smoke.kept


def test_without_a_gpu_it_says_so() -> None:
    done = bench_gpu()
    assert done.returncode == command.NO_GPU
    assert "needs a CUDA device" in done.stderr
    assert "--smoke" in done.stderr


def test_without_transformers_the_rest_runs(tmp_path: Path) -> None:
    """Only what needs it is skipped, and says why."""
    (tmp_path / "transformers.py").write_text('raise ImportError("not on this machine")\n')
    out = tmp_path / "out"
    arguments = ("--smoke", "--only", "end2end", "--out", str(out))
    done = bench_gpu(*arguments, TRITON_INTERPRET="1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = read(out / "gpu_end_to_end.csv")
    assert row["status"] == "skipped"
    assert "not on this machine" in row["note"]


def test_smoke_rows_go_to_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(command, "_stage", lambda *_: [{"status": "timed"}])
    written = []
    monkeypatch.setattr(command.Found, "add", lambda found, *_: written.append(found.folder))
    assert command.main(["--smoke", "--only", "layer"]) == 0
    [folder] = tmp_path.iterdir()
    assert written == [folder]
    assert f"--smoke: rows go to {folder}, not to" in capsys.readouterr().out


def test_unknown_stages_are_refused() -> None:
    with pytest.raises(SystemExit):
        command.options_of(["--only", "layers"])


def test_a_wrong_result_ends_the_run_before_timings(tmp_path, monkeypatch, capsys) -> None:
    real = checks.rk.observe_layer

    def broken(*arguments, backend=None, **rest):
        out = real(*arguments, backend=backend, **rest)
        return out * 1.01 if backend == "grouped_mm" else out

    only = [Check(SMALL.name, "grouped_mm", torch.float32, checks.compare, (SMALL,))]
    monkeypatch.setattr(checks.rk, "observe_layer", broken)
    monkeypatch.setattr(running, "plan", lambda smoke: only)
    monkeypatch.setattr(layer, "run", lambda *_: pytest.fail("timed on red"))
    assert command.main(["--smoke", "--out", str(tmp_path)]) == command.RED
    assert "the output is off by" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_checks.csv", "gpu.md"}
    assert "1 failed" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "int4_group"])
def test_dequantization_is_checked(format: str, monkeypatch) -> None:
    assert "reference's bits" in checks.dequantized(CPU, "cuda", torch.bfloat16, format)
    with pytest.raises(checks.CheckFailed, match="other bits"):  # it writes every expert
        checks.dequantized(CPU, "reference", torch.bfloat16, format)


def test_without_cuda_kernels_their_rows_are_refused(monkeypatch) -> None:
    monkeypatch.delenv("REAP_CUDA_HOST")
    bed = parts.Bed(here(), kernels.plan(smoke=True)[0])
    some = parts.of_layer(bed, ("cuda",))
    some += parts.of_formats(bed.machine, kernels.quantized(smoke=True), ("cuda",))
    found = kernels.measure(some, bed.machine, Deadline(HUNG))
    monkeypatch.setattr(layer, "PROVIDERS", [p for p in PROVIDERS if p.variant == "cuda"])
    found += layer.run(bed.machine, layer.plan(smoke=True), Deadline(HUNG))
    planned = [check for check in checks.plan(smoke=True) if check.backend == "cuda"]
    checked = processes.run(CPU, planned, Deadline(HUNG))
    assert len(found) == len(some) + 2
    assert len(checked) == 7
    assert {row["status"] for row in found} == {row["result"] for row in checked} == {"refused"}
    reasons = {str(row.get("note", row.get("detail"))) for row in (*found, *checked)}
    assert all("inputs are on the CPU" in reason for reason in reasons)
    assert "refused" in report.kernels(found[: len(some)])


def broken_schedule(sort):
    def broken(*arguments):
        found = sort(*arguments)

        def schedule(*sizes):
            tiles = found.schedule(*sizes)
            tiles.rows[0] += 1
            return tiles

        return replace(found, schedule=schedule)

    return broken


def broken_sort(sort):
    def broken(*arguments):
        found = sort(*arguments)
        return replace(found, gather_index=found.gather_index.flip(0))

    return broken


def broken_combine(combine):
    def broken(*arguments):
        combine(*arguments)
        if arguments[-1] is not None:
            arguments[-1].norm.mul_(1.001)

    return broken


def broken_output(combine):
    def broken(*arguments):
        combine(*arguments)
        if arguments[-2] is not None:
            arguments[-2].mul_(1.01)

    return broken


def broken_reduce(reduce):
    def broken(*arguments):
        reduce(*arguments)
        arguments[3].counts[0, 0, 0] += 1

    return broken


@pytest.mark.parametrize(
    ("stage", "wrap", "message", "wrong"),
    [
        ("sort", broken_sort, "slots are not sorted stably", {"sort"}),
        ("sort", broken_schedule, "the tile list differs", {"tile list"}),
        ("combine", broken_combine, "norms are off by 1.0e-03", {"combine observed"}),
        ("combine", broken_output, "the output is off", {"combine observed", "combine unobserved"}),
        ("reduce", broken_reduce, "count differs", {"reduce", "sort + saliency", "accumulate"}),
    ],
)
def test_a_kernel_that_is_wrong_is_not_timed(stage, wrap, message, wrong, monkeypatch) -> None:
    real = parts.stage_kernels

    def stage_kernels(*names):
        around = real(*names)
        return replace(around, **{stage: wrap(getattr(around, stage))})

    monkeypatch.setattr(parts, "stage_kernels", stage_kernels)
    bed = parts.Bed(here(), kernels.plan(smoke=True)[0])
    found = kernels.measure(parts.of_layer(bed, ("cuda",)), bed.machine, Deadline(HUNG))
    failed = {row["kernel"]: row for row in found if row["status"] == "failed"}
    assert wrong <= set(failed)
    assert all(message in str(failed[name]["note"]) and not failed[name]["us"] for name in wrong)
    assert len(failed) < len(found), "what is right is timed"


def test_dequantization_that_is_wrong_is_not_timed(monkeypatch) -> None:
    real = parts.rk.dequantize

    def broken(matrices, *, out, backend):
        real(matrices, out=out, backend=backend)
        out[-1, -1, -1] = 5

    shape = kernels.quantized(smoke=True)[0]
    some = parts.of_formats(here(), [shape], ("cuda",))
    monkeypatch.setattr(parts.rk, "dequantize", broken)
    (row,) = kernels.measure(some, here(), Deadline(HUNG))
    assert row["status"] == "failed"
    assert "expert 1 has other bits" in str(row["note"])


def test_kernels_count_compulsory_bytes_and_rotate_past_the_cache() -> None:
    """By hand: y read, out written, order and gates read, 3 measures."""
    bed = parts.Bed(here(), Case("hand", "", 16, 4, 2, 64, 32))
    own = {part.name: part.prepare() for part in parts.of_layer(bed, ("cuda",))}
    plain = 32 * 64 * 2 + 16 * 64 * 2 + 32 * 8 + 32 * 2
    assert own["combine unobserved"].moved == plain
    assert own["combine observed"].moved == plain + 32 * 12
    assert own["sort"].moved == 32 * (8 + 2) + 32 * 16 + 5 * 8
    large = replace(bed.machine, smoke=False)
    assert parts.Bed(large, bed.case).calls(1000) == 25  # 1.5 times 16 KiB
    assert parts.Bed(large, bed.case).calls(1 << 20) == 1
    assert parts.Bed(large, bed.case).calls(1) == 256


def test_a_provider_that_is_wrong_is_not_timed(monkeypatch) -> None:
    def prepare(work: Work) -> Prepared:
        wrong = torch.ones(len(work.sample), work.case.hidden)
        return Prepared([lambda: pytest.fail("timed")], lambda: (wrong, None))

    own = replace(PROVIDERS[0], prepare=prepare)
    peer = replace(PROVIDERS[-2], prepare=prepare)
    monkeypatch.setattr(layer, "PROVIDERS", (own, peer))
    found = layer.run(here(), layer.plan(smoke=True), Deadline(HUNG))
    assert [row["status"] for row in found] == ["failed", "wrong"]
    assert {row["ms"] for row in found} == {""}


def test_wrong_gram_matrices_are_not_timed(monkeypatch) -> None:
    """Sums that are off, and sums that change what the call gives otherwise."""
    real = grams.rk.observe_layer

    def off(*arguments, gram=None, backend=None, **rest):
        out = real(*arguments, gram=gram, backend=backend, **rest)
        if gram is not None and backend == "triton":
            gram.gram.mul_(1.02)
        return out + 1 if gram is not None and backend == "grouped_mm" else out

    monkeypatch.setattr(grams.rk, "observe_layer", off)
    found = layer.run(here(), grams.plan(smoke=True), Deadline(HUNG), grams.providers()[1:4:2])
    assert [row["status"] for row in found] == ["failed", "failed"]
    assert "gram is off by 1.9e-02, 1e-02 is allowed" in str(found[0]["note"])
    assert "change the output" in str(found[1]["note"])


def test_what_the_budget_cuts_off_is_said() -> None:
    found = layer.run(here(), layer.plan(smoke=False), Deadline(-1))
    assert len(found) == len(layer.plan(smoke=False)) * len(PROVIDERS)
    assert {row["status"] for row in found} == {"skipped"}
    assert "budget" in report.layer(found)
    found = grams.run(replace(here(), smoke=False), Deadline(-1))
    assert len(found) == len(grams.plan(smoke=False)) * len(grams.providers())
    assert {(row["status"], row[grams.RATIO]) for row in found} == {("skipped", "")}
    assert "budget" in report.grams(found)
    bed = parts.Bed(here(), kernels.plan(smoke=True)[0])
    some = parts.of_layer(bed, kernels.BACKENDS)
    single = kernels.measure(some, bed.machine, Deadline(-1))
    assert {row["status"] for row in single} == {"skipped"}
    assert "budget" in report.kernels(single)


def test_readme_tables_are_made_from_rows(tmp_path, monkeypatch) -> None:
    facts = {**here().facts, "gpu": "A GPU", "smoke": "no"}
    case = replace(layer.SHAPES[0], tokens=16384, skew="balanced")
    found = [{**layer._row(case, provider, "timed"), "ms": "8"} for provider in PROVIDERS]
    ours = {"ms": "1.5", "pct_peak": "58.4", "observed/unobserved": "1.004"}
    for row, provider in zip(found, PROVIDERS, strict=True):
        if (provider.name, provider.variant, provider.observed) == ("reap", "automatic", True):
            row |= {**ours, "transformers/observed": "5.333"}
    rows.write("gpu_layer", found, folder=tmp_path, facts=facts, echo=False)
    monkeypatch.setattr(table_parts, "RESULTS", tmp_path)
    text = tables.TABLES["gpu_layer"]()
    assert "| 16384 | 1.5 ms | 58 % | 1.004 | 8 ms | **5.33x** | 16 ms |" in text
    assert "A GPU" in text


def streamed_rows(folder: Path, seconds: float = HUNG) -> list[dict[str, object]]:
    return streaming.run(here(), Deadline(seconds), folder)


def test_streaming_times_every_layer_and_leaves_no_file(smoke: Smoke) -> None:
    found = read(smoke.out / "gpu_streaming.csv")
    assert not list(smoke.disk.iterdir())
    layers, totals = found[:4], found[4:]
    assert [(row["format"], row["what"]) for row in layers] == [
        (format, f"layer {number}") for format in streamed_files.FORMATS for number in range(2)
    ]
    assert all(float(str(row["load_s"])) > 0 and float(str(row["compute_s"])) > 0 for row in layers)
    assert [bool(row["overlapped_s"]) for row in layers] == [True, False] * 2
    for format, first in (("fp8", layers[0]), ("bf16", layers[2])):
        own = sum(
            torch.Size(size).numel() * dtype.itemsize
            for key, size, dtype in streamed_files.tensors(streamed_files.TINY, format)
            if key.startswith("model.layers.0.")
        )
        assert float(str(first["gb"])) * 1e9 == pytest.approx(own, rel=1e-3)
    assert [row["model"] for row in totals] == ["Kimi-K2", "DeepSeek-V3.2"]
    page = report.streaming(found)
    assert page in (smoke.out / "gpu.md").read_text()
    assert "Not timed" not in page
    assert "| Kimi-K2 | 1360 | 61 |" in page


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (range(1), "fp8, hidden states on the device: .* has other bits than in a resident run"),
        (range(4, 5), "has other bits when layers load while others compute"),
    ],
)
def test_streaming_that_is_wrong_gives_no_figure(wrong, message, tmp_path, monkeypatch) -> None:
    """The gate opens the files three times, then come the pass in turn and the overlapped one."""
    from reap_driver.load import streamed_model

    real, opened = streamed_model.open_streamed, iter(range(100))

    @contextmanager
    def broken(*arguments, **rest):
        with real(*arguments, **rest) as streamed:
            if next(opened) in wrong:
                streamed.model.get_input_embeddings().weight.data.mul_(1.1).add_(0.5)
            yield streamed

    monkeypatch.setattr(streamed_model, "open_streamed", broken)
    (row,) = streamed_rows(tmp_path)
    assert row["status"] == "failed"
    assert re.search(message, str(row["note"]))
    assert not row["load_s"]
    assert not row["total_s"]


def test_streaming_takes_what_the_disk_holds(tmp_path, monkeypatch) -> None:
    def free(nbytes: int) -> None:
        usage = type("Usage", (), {"free": nbytes})
        monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage)

    sizes = streaming.TRUE_RUN
    for gigabytes, format, layers in ((64, "fp8", 3), (64, "bf16", 2), (71, "bf16", 3)):
        free(gigabytes * 10**9)
        fitting = streaming._fitting(sizes, format, tmp_path)
        assert fitting.shape.num_hidden_layers == layers
    free(10**9)
    found = streamed_rows(tmp_path)
    assert {row["status"] for row in found} == {"skipped"}
    assert "GB of disk" in str(found[0]["note"])
    assert "not timed" in str(found[-1]["note"])
    assert "--folder" in report.streaming(found)


def test_streaming_ends_with_its_budget(tmp_path, monkeypatch) -> None:
    assert {row["status"] for row in streamed_rows(tmp_path, -1)} == {"skipped"}
    monkeypatch.setattr(streaming.Bench, "_need", lambda *_: None)
    monkeypatch.setattr(streaming, "verify", lambda *_: "")
    real = streaming.Bench.measure

    def late(self: streaming.Bench, checked: str) -> object:
        self.deadline.end = 0
        return real(self, checked)

    monkeypatch.setattr(streaming.Bench, "measure", late)
    found = streamed_rows(tmp_path)
    assert {row["status"] for row in found} == {"skipped"}
    assert "budget" in str(found[0]["note"])


def test_totals_are_bytes_and_operations_over_rates() -> None:
    """By hand: 61 layers of which each is bound by loading, and the first one's load."""
    measured = projected.Measured(load_rate=1e9, flop_rate=1e15, factor=1.1, format="fp8")
    for target in projected.TARGETS:
        row = projected.total(target, measured, CPU)
        load = float(str(row["gb"]))
        assert float(str(row["load_s"])) == load > float(str(row["compute_s"]))
        assert float(str(row["overlapped_s"])) == pytest.approx(1.1 * load, rel=1e-3)
        assert float(str(row["total_s"])) == pytest.approx((61 * 1.1 + 1) * load, rel=1e-3)
        assert float(str(row["total_gb"])) == pytest.approx(61 * load, rel=1e-3)


def test_sizes_are_the_published_ones() -> None:
    configs = ROOT / "tests" / "driver" / "published" / "configs"
    names = ("kimi-k2", "deepseek-v3.2")
    for target, name in zip(projected.TARGETS, names, strict=True):
        published = json.loads((configs / f"{name}.json").read_text())
        own = {**target.config, "quantization_config": published["quantization_config"]}
        assert own == {key: published[key] for key in own}
    published = json.loads((configs / "deepseek-v3.2.json").read_text())  # V3's, and an indexer
    sizes = {**vars(streamed_files.TRUE), "num_hidden_layers": 61, "vocab_size": 129280}
    del sizes["name"]
    assert sizes == {key: published[key] for key in sizes}


def test_streaming_comes_on_top_of_the_budget() -> None:
    def left(*only: str, budget: float | None = None) -> dict[str, int]:
        return {key: round(end.left()) for key, end in command.deadlines(only, budget).items()}

    assert command.options_of([]).only == list(command.DEFAULT)
    assert left(*command.DEFAULT)["end2end"] == round(0.97 * 440)
    assert left("streaming")["streaming"] == round(0.97 * 240)
    both = left("end2end", "streaming")
    assert (both["end2end"], both["streaming"]) == (round(0.97 * 440), round(0.97 * 680))
    assert left("checks", budget=100)["checks"] == 97
    assert "GB free are needed" in streaming.help_text()


def test_the_bench_of_llm_compressor_says_what_to_install() -> None:
    with pytest.raises(SystemExit, match="make test-interop ENVS=llmcompressor"):
        llm_compressor_cpu.main([])
