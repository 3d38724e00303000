"""What `bench.gpu --only choices` decides from interleaved times, and which lines it proposes."""

import math
import random
from pathlib import Path

import pytest
import torch

from bench.gpu import choices, paired
from bench.gpu.clock import Deadline
from bench.gpu.paired import Times, effect, interleaved
from reap_kernels.tuning import Table
from tests.limits import HUNG

CPU = torch.device("cpu")
FACTS = {"gpu": "a GPU", "triton": "3.9.0", "commit": "abc"}
NAMES = ("cuda cuda", "cuda triton", "triton cuda", "triton triton", choices.SAME)


def times(rounds: int = 200, spread: float = 0.01, **faster: float) -> Times:
    """Seconds with noise on each call, under a clock that falls by a fifth half way through; CUDA's
    kernels of an op are faster by a share.
    """
    rng = random.Random(4)
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for round_ in range(rounds):
        clock = 1.0 if round_ < rounds // 2 else 1.2
        for name in NAMES:
            ops = ("cuda", "cuda") if name == choices.SAME else name.split()
            share = sum(
                faster.get(op, 0.0) for op, by in zip(choices.OPS, ops, strict=True) if by == "cuda"
            )
            own = faster.get("again", 0.0) if name == choices.SAME else 0.0
            found[name].append(clock * (1 - share + own) * rng.lognormvariate(0, spread) * 1e-3)
    return Times(found, found)


def verdicts(found: Times) -> dict[str, object]:
    noise = effect(choices._control(found.device)).spread
    return {op: choices._figures(found, op, noise)["verdict"] for op in choices.OPS}


def test_equal_kernels_are_no_different() -> None:
    assert verdicts(times()) == dict.fromkeys(choices.OPS, "no difference")


def test_what_is_faster_is_found_under_a_clock_that_changes() -> None:
    assert verdicts(times(sort=0.01)) == {"sort": "cuda", "saliency": "no difference"}
    assert verdicts(times(saliency=-0.01)) == {"sort": "no difference", "saliency": "triton"}
    figures = choices._figures(times(sort=0.01), "sort", 0.0)
    assert abs(float(figures["cuda/triton"]) - 0.99) < 0.003
    assert float(figures["low"]) < float(figures["cuda/triton"]) < float(figures["high"])


def test_less_than_the_noise_is_no_difference() -> None:
    # The same kernels differ from themselves by two per cent: nothing in this run can be trusted.
    assert verdicts(times(sort=0.01, again=0.02))["sort"] == "no difference"
    assert verdicts(times(sort=0.05, again=0.02))["sort"] == "cuda"


def test_an_effect_is_the_median_ratio_and_its_interval() -> None:
    rng = random.Random(5)
    found = effect([math.log(1.5) + rng.gauss(0, 0.02) for _ in range(400)])
    assert found.low < found.ratio < found.high
    assert abs(found.ratio - 1.5) < 0.01
    assert math.isclose(found.spread, math.log(found.high))
    assert found == effect([math.log(1.5) + value for value in deviations()])


def deviations() -> list[float]:
    rng = random.Random(5)
    return [rng.gauss(0, 0.02) for _ in range(400)]


def test_rounds_have_every_variant_once_in_changing_order() -> None:
    ran: list[tuple[str, int]] = []

    def call(name: str, inputs: int):
        return lambda: ran.append((name, inputs))

    calls = {name: [call(name, 0), call(name, 1)] for name in "abc"}
    found = interleaved(calls, CPU, 7, Deadline(HUNG))
    assert found.rounds == 7
    assert all(len(own) == 7 for own in (*found.device.values(), *found.host.values()))
    warm = len(calls)  # on a CPU, one call of each
    rounds = [ran[at : at + 3] for at in range(warm, len(ran), 3)]
    assert [sorted(name for name, _ in one) for one in rounds] == [list("abc")] * 7
    assert len({tuple(name for name, _ in one) for one in rounds}) > 1
    inputs = [which for _, which in ran[warm:]]
    assert inputs == [(number + 1) % 2 for number in range(len(inputs))]


def test_compiling_makes_no_batch_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds that are queued one at a time would be timed by the host's launches."""
    now, called, batches = [0.0], set(), []

    def call(name: str):
        def run() -> None:
            now[0] += 1e-3 if name in called else 10.0
            called.add(name)

        return [run]

    def queued(calls, orders, device, turn, found: Times) -> int:
        batches.append(len(orders))
        for own in (*found.device.values(), *found.host.values()):
            own += [1.0] * len(orders)
        return turn

    monkeypatch.setattr(paired.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(paired, "_wait", lambda device: None)
    monkeypatch.setattr(paired, "_queued", queued)
    calls = {name: call(name) for name in "ab"}
    interleaved(calls, torch.device("cuda"), 200, Deadline(HUNG))
    assert sum(batches) == 200
    assert batches[0] in (99, 100)  # of 2 ms each, in 0.2 s


def test_a_deadline_ends_rounds() -> None:
    found = interleaved({"a": [lambda: None], "b": [lambda: None]}, CPU, 10**9, Deadline(0.0))
    assert 0 < found.rounds < 10**9


def row(op: str, verdict: str, tokens: int, width: int = 768, status: str = "timed") -> dict:
    sizes = {"E": 128, "k": 8, "I": width, "tokens": tokens}
    return {"op": op, "verdict": verdict, "status": status, "arch": "sm90", **sizes}


def test_lines_say_what_rows_agree_on(tmp_path: Path) -> None:
    rows = [
        row("sort", "triton", 16384),
        row("sort", "no difference", 65536),
        row("sort", "cuda", 2048),
        row("sort", "triton", 16384, 2048),
        row("sort", "cuda", 65536, 2048),
        row("saliency", "triton", 16384, status="skipped"),
        row(choices.SAME, "", 16384),
    ]
    path = choices.propose(tmp_path, FACTS, rows)
    assert path is not None
    table = Table.load(path)
    assert table.arch == "sm90"
    assert "a GPU" in table.origin
    chosen = {
        (tokens, width): next(
            line.backend
            for line in table.entries
            if line.covers("sort", "half", width, tokens / 16)
        )
        for tokens in (512, 2048, 16384)
        for width in (768, 2048)
    }
    assert chosen == {
        (512, 768): "cuda",
        (2048, 768): "cuda",
        (16384, 768): "triton",  # no difference at 65,536 tokens
        (512, 2048): "cuda",
        (2048, 2048): "cuda",
        (16384, 2048): "cuda",  # the rows disagree
    }
    assert {line.op for line in table.entries} == {"sort"}


@pytest.mark.parametrize("verdict", ["cuda", "no difference"])
def test_defaults_need_no_line(verdict: str, tmp_path: Path, capsys) -> None:
    assert choices.propose(tmp_path, FACTS, [row("sort", verdict, 16384)]) is None
    assert list(tmp_path.iterdir()) == []
    assert "no line of a launch table is supported" in capsys.readouterr().out


def test_few_rounds_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = choices.plan(False)[0]
    monkeypatch.setattr(choices, "_variants", lambda work: ({}, ""))
    monkeypatch.setattr(choices, "interleaved", lambda *_: times(rounds=choices.FEWEST - 1))

    class Work:
        machine = type("Machine", (), {"smoke": False, "device": CPU})()

    Work.case = case
    found = choices._compared(Work(), Deadline(1.0))  # type: ignore[arg-type]
    assert [one["status"] for one in found] == ["skipped"] * 3
    assert "29 rounds, of 30 that tell" in str(found[0]["note"])
