"""The queue of what only a GPU shows: equal to the page, within its budget, whatever dies."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import ROOT, command, layer, queue, queue_run, steps
from bench.gpu.clock import Deadline
from bench.gpu.queue import At, Item, Row
from reap_kernels import cuda
from tests.limits import HUNG

CPU = queue_run.Options(torch.device("cpu"), smoke=True)
ROW: Row = {
    "check": "one",
    "backend": "",
    "dtype": "",
    "result": "pass",
    "detail": "",
    "seconds": "",
}


def right(at: At) -> list[Row]:
    return [{**ROW, "detail": at.machine.facts["smoke"]}]


def wrong(at: At) -> list[Row]:
    return [ROW, {**ROW, "result": "failed", "detail": "off by 1"}]


def cut(at: At) -> list[Row]:
    return [ROW, {**ROW, "result": "skipped", "detail": at.deadline.reason}]


def raises(at: At) -> list[Row]:
    raise RuntimeError("no kernel image")


def dies(at: At) -> list[Row]:
    os.abort()


def hangs(at: At) -> list[Row]:
    time.sleep(100 * HUNG)
    return []


def item(run, seconds: float = 1.0) -> Item:
    return Item(run.__name__, (f"line of {run.__name__}",), seconds, "checks", run)


def ran(items: list[Item], budget: float) -> tuple[dict[str, Row], list[tuple[str, list[Row]]]]:
    """Outcomes by item, and what was written, in order."""
    written: list[tuple[str, list[Row]]] = []
    found = queue_run.run(
        items, budget, CPU, lambda stage, facts, own: written.append((stage, own))
    )
    return {str(row["item"]): row for row in found}, written


def test_items_and_the_page_are_equal() -> None:
    lines = queue.open_lines(queue.PAGE.read_text())
    assert len(lines) > 30
    for line in lines:
        assert line.items or line.needs
        assert set(line.needs) <= set(queue.NEEDS), line.text
        answering = {one.name for one in queue.ITEMS if line.text.startswith(one.answers)}
        assert set(line.items) == answering, line.text
    for one in queue.ITEMS:
        for begins in one.answers:
            assert sum(line.text.startswith(begins) for line in lines) == 1, (one.name, begins)
    assert len({one.name for one in queue.ITEMS}) == len(queue.ITEMS)
    assert {one.stage for one in queue.ITEMS} <= set(command.FILES)


def test_a_line_without_a_mark_is_refused() -> None:
    page = "# GPU status\n\n## Never run on a GPU\n\nText.\n\n- One\n  line. *(queue: a, b)*\n"
    assert queue.open_lines(page) == [queue.Line("One line.", ("a", "b"), ())]
    page += "\n| what | how |\n|---|---|\n| x | y *(queue: c; needs: two GPUs)* |\n"
    assert queue.open_lines(page)[1] == queue.Line("x | y", ("c",), ("two GPUs",))
    with pytest.raises(ValueError, match="ends the line 'Two'"):
        queue.open_lines(f"{page}\n- Two\n")


def test_what_the_budget_does_not_hold_is_said_and_what_fits_runs() -> None:
    found, written = ran([item(cut), item(right, 10 * HUNG), item(wrong)], 5 * HUNG)
    assert [row["result"] for row in found.values()] == ["partly", "not reached", "failed"]
    assert found["right"]["detail"].startswith(f"about {10 * HUNG:.0f} s, of which ")
    assert "off by 1" in str(found["wrong"]["detail"])
    assert [stage for stage, _ in written] == ["checks", "queue", "queue", "checks", "queue"]
    assert queue_run.rest(list(found.values())) == ["cut", "right"]


def test_an_item_that_raises_or_dies_does_not_end_the_queue(monkeypatch) -> None:
    found, written = ran([item(raises), item(dies), item(right)], 10 * HUNG)
    assert [row["result"] for row in found.values()] == ["failed", "failed", "pass"]
    assert found["raises"]["detail"] == "RuntimeError: no kernel image"
    assert "its process died with code -6" in str(found["dies"]["detail"])
    assert written[2][1] == [{**ROW, "detail": "yes"}]


def test_an_item_that_hangs_is_killed(monkeypatch) -> None:
    monkeypatch.setattr(queue_run, "_GRACE", 0.5)
    found, _ = ran([item(hangs, 0.1), item(right, HUNG)], 10 * HUNG)
    assert "it was killed" in str(found["hangs"]["detail"])
    assert found["right"]["result"] == "pass"


def test_the_plan_says_what_runs_only_if_time_is_left() -> None:
    text = queue_run.plan([item(right, 50), item(cut, 500), item(wrong, 100)], 200)
    lines = text.splitlines()
    assert lines[0] == "queue: 3 items, about 650 s; 200 s to spend"
    assert [line.endswith("(only if others take less)") for line in lines[1:]] == [
        False,
        True,
        False,
    ]


def test_the_default_holds_new_kernels_and_the_time_of_a_pass() -> None:
    text = queue_run.plan(queue.ITEMS, command.QUEUE).splitlines()[1:]
    held = [
        one.name
        for one, line in zip(queue.ITEMS, text, strict=True)
        if not line.endswith("(only if others take less)")
    ]
    new = ["product checks", "TMA checks", "FP8 checks", "norm checks", "fused", "attention"]
    assert held[: len(new) + 2] == [*new, "layers", "end to end"]


def test_judgement() -> None:
    skipped = {**ROW, "result": "skipped", "detail": "needs a CUDA device"}
    assert queue_run.judged([skipped])[0] == "skipped"
    assert queue_run.judged([skipped, ROW]) == ("pass", "1 pass, 1 skipped: needs a CUDA device")
    refused = {**ROW, "result": "refused", "detail": "reap_kernels._C is not built"}
    found = queue_run.judged([skipped, refused])
    assert found == ("skipped", "1 refused, 1 skipped: reap_kernels._C is not built")
    assert queue_run.judged([skipped, {**ROW, "result": "failed", "detail": "off"}])[0] == "failed"
    assert queue_run.judged([]) == ("failed", "no rows")
    late = {"status": "skipped", "note": f"round 2 skipped: {Deadline(0).reason}"}
    assert queue_run.judged([late, {"status": "timed", "note": ""}])[0] == "partly"
    assert queue_run.judged([{**late, "status": "timed"}])[0] == "partly"


def test_smoke_run_of_the_whole_queue(tmp_path: Path) -> None:
    """As CI runs it: every item, tiny, and the plan; no machine is too slow for its budget."""
    budget = ["--budget", str(100 * HUNG)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--queue", "--smoke", *budget, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert queue_run.plan(queue.ITEMS, 100 * HUNG) in done.stdout
    with (tmp_path / "gpu_queue.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == [one.name for one in queue.ITEMS]
    assert {row["result"] for row in rows} <= {"pass", "skipped"}
    page = (tmp_path / "gpu.md").read_text()
    assert "## Queue" in page
    assert "Smoke run" in page


def test_without_cuda_kernels_it_says_so_before_it_runs(monkeypatch, capsys, tmp_path) -> None:
    """A GPU is lent for minutes: what is missing must show before they are spent."""
    monkeypatch.setattr(command, "_device", lambda smoke: torch.device("cuda", 0))
    monkeypatch.setattr(cuda, "refusal", lambda device: "reap_kernels._C was not built; build it")
    monkeypatch.setattr(queue_run, "run", lambda *_: [])
    assert command.main(["--queue", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "without CUDA kernels, whose checks and times are skipped: reap_kernels._C was" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--queue", "--budget", "-1"], "--budget takes seconds, a number above 0; got -1"),
        (["--budget", "nan"], "--budget takes seconds, a number above 0; got nan"),
        (["--queue", "--only", "checks"], "--queue runs items, no stages"),
        (["--items", "gram time"], "takes --queue as well"),
        (["--queue", "--items", "nothing"], "got nothing"),
        (["--queue", "--items", ","], "got none"),
    ],
)
def test_options_of_the_queue_are_refused(arguments: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.options_of(arguments)
    assert says in capsys.readouterr().err
    some = command.options_of(["--queue", "--items", "streaming,gram checks"]).items
    assert [one.name for one in some] == ["gram checks", "streaming"]


def test_what_is_timed_can_be_chosen() -> None:
    words = [
        "--shapes",
        "DeepSeek-V3,Mixtral-8x7B",
        "--tokens",
        "2048",
        "--routing",
        "zipf,balanced",
    ]
    own = command.options_of([*words, "--rounds", "5", "--sequences", "64"]).selection
    assert (own.rounds, own.sequences) == (5, 64)
    found = [(case.name, case.tokens, case.skew) for case in own.cases(layer.plan(smoke=False))]
    assert found == [
        (shape, 2048, skew)
        for shape in ("DeepSeek-V3", "Mixtral-8x7B")
        for skew in ("zipf", "balanced")
    ]
    none = command.options_of([]).selection
    assert none.cases(layer.plan(smoke=False)) == layer.plan(smoke=False)
    some = command.options_of(["--tokens", "512"]).selection.cases(steps.plan(smoke=False))
    assert {case.tokens for case in some} == {512}
    assert len(some) == len(steps.plan(smoke=False)) / 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shapes", "Qwen"], "--shapes takes Qwen3-30B-A3B, DeepSeek-V3, .*; got Qwen$"),
        (["--shapes", ","], "got none$"),
        (["--routing", "zipf,even"], "--routing takes balanced, zipf; got even$"),
        (["--tokens", "2k"], "--tokens takes whole numbers of 1 or more; got 2k$"),
        (["--tokens", ""], "--tokens takes whole numbers of 1 or more; got none$"),
        (["--rounds", "0"], "--rounds takes whole numbers of 1 or more; got 0$"),
        (["--sequences", "-1"], "--sequences takes whole numbers of 1 or more; got -1$"),
    ],
)
def test_choices_are_refused_with_what_there_is(words: list[str], says: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.options_of([f"{words[0]}={words[1]}"])
    assert re.search(says, capsys.readouterr().err.strip())
