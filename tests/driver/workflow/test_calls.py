"""The jobs from Python: the same files, facts and errors as the command line, and no printing."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.workflow.listener import Collector
from reap_kernels.errors import CheckpointError
from tests.driver.cli.conftest import Run, data, model, originals, run  # noqa: F401
from tests.driver.writer import saved

RUN: dict[str, Any] = {"seq_len": 16, "device": "cpu"}
FLAGS = ("--seq-len", 16, "--device", "cpu")
# What differs from run to run.
MOVING = {"observe_seconds", "apply_seconds", "bytes_written", "out", "command"}


def steady(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts that are the same whenever a job runs, as JSON has them."""
    kept = {name: value for name, value in facts.items() if name not in MOVING}
    found: dict[str, Any] = json.loads(json.dumps(kept))
    return found


def test_prune_does_what_the_command_line_does(
    run: Run,  # noqa: F811
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = run(
        "prune", model, "--data", data, "--ratio", 0.5, "--out", tmp_path / "cli", *FLAGS, "--json"
    )
    assert outcome.code == 0, outcome.err
    steps: list[rd.Progress] = []
    pruned = rd.prune(model, data, ratio=0.5, out=tmp_path / "python", progress=steps.append, **RUN)
    assert capsys.readouterr() == ("", "")
    assert pruned is not None
    assert steady(pruned.facts()) == steady(outcome.json)
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "cli" / name).read_bytes()
    for shard in sorted((tmp_path / "cli").glob("*.safetensors")):
        assert (tmp_path / "python" / shard.name).read_bytes() == shard.read_bytes()
    assert {step.step for step in steps} == {"reading data", "observing", "writing"}
    assert steps[-1].done == steps[-1].total
    assert pruned.observed.stats.groups == ["code"]
    assert "keeps 4 of 8 experts" in repr(pruned)
    assert "keeps 4 of 8 experts" in pruned._repr_html_()


def test_results_keep_the_notes_of_their_time() -> None:
    heard = Collector(None)
    heard.note("of observing")
    observed = heard.notes
    heard.note("of planning")
    assert (observed, heard.notes) == (("of observing",), ("of observing", "of planning"))


def test_each_step_of_a_pruning_keeps_its_notes(
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Planning and writing layers of different sizes add notes that observing does not have."""
    uneven: dict[str, Any] = {"allocation": "global", "non_uniform": True, **RUN}
    pruned = rd.prune(model, data, ratio=0.5, out=tmp_path / "uneven", **uneven)
    assert pruned is not None
    observed, planned, written = (
        step.notes for step in (pruned.observed, pruned.planned, pruned.applied)
    )
    assert len(observed) < len(planned) < len(written)
    assert written[: len(planned)] == planned
    assert planned[: len(observed)] == observed
    assert pruned.notes == written


def test_the_steps_one_by_one(model: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    before = saved.snapshot(tmp_path)
    observed = rd.observe_data(model, [data], **RUN)
    assert observed is not None
    planned = rd.plan(observed.stats, 0.25, protect={"0": [1]})
    estimated = rd.estimate(model, tokens=1000, **RUN)
    compared = rd.compare(model, planned, data, **RUN)
    found = rd.search(model, observed.stats, data, evaluations=6, population=4, elites=2, **RUN)
    assert saved.snapshot(tmp_path) == before  # without `out` nothing is written
    assert 1 in planned.plan.kept["model.layers.0.mlp.experts"]
    assert estimated.facts()["data"]["tokens"] == 1000
    assert compared.comparison is not None
    assert compared.facts()["overall"]["predictions"] > 0
    assert found.plan.allocation == "searched"
    written = rd.apply(model, planned, out=tmp_path / "half")
    assert isinstance(written, rd.Applied)
    masks = rd.apply(model, planned, as_masks=tmp_path / "masks.safetensors")
    assert isinstance(masks, rd.Masked)
    assert masks.facts()["kept"] == sum(map(len, planned.plan.kept.values()))
    report = rd.report(observed.stats, planned, out=tmp_path / "report", compare=compared)
    assert report.files[0].is_file()
    for result in (observed, planned, estimated, compared, found, written, masks, report):
        assert repr(result).startswith(type(result).__name__)
        assert html.escape(result.describe()) in result._repr_html_()
        json.dumps(result.facts())


def test_batches_of_a_loop_of_ones_own(model: Path, data: Path) -> None:  # noqa: F811
    """The same statistics, bit for bit, as the job's."""
    batches = rd.calibration(model, data, batch_size=2, seq_len=16)
    loaded = rd.load_model(str(model), device="cpu")
    with rd.observe(loaded) as obs:
        for group, inputs in batches:
            with obs.group(group):
                obs(**inputs)
    whole = rd.observe_data(model, data, batch_size=2, folds=1, **RUN)
    assert whole is not None
    assert len(batches) == -(-batches.sources[0]["sequences"] // 2)
    for name, layer in whole.stats.layers.items():
        assert torch.equal(layer.sums, obs.stats.layers[name].sums)
        assert torch.equal(layer.counts, obs.stats.layers[name].counts)


def test_errors_are_those_of_the_command_line(
    run: Run,  # noqa: F811
    model: Path,  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    outcome = run("prune", model, "--data", data, "--out", tmp_path / "there", *FLAGS)
    with pytest.raises(CheckpointError) as caught:
        rd.prune(model, data, out=tmp_path / "there", **RUN)
    assert "`overwrite=True`" in str(caught.value)
    assert str(caught.value).replace("`overwrite=True`", "--overwrite") in outcome.error


def test_hostile_names_stay_text_in_a_notebook() -> None:
    from reap_driver.workflow.apply import Masked

    plan = rd.Plan.__new__(rd.Plan)
    object.__setattr__(plan, "layers", {})
    found = Masked(["<script>"], Path("<b>"), plan)
    assert "<script>" not in found._repr_html_()
    assert "&lt;b&gt;" in found._repr_html_()


def test_progress_is_nobody_s_a_console_s_or_a_function_s() -> None:
    from reap_driver.workflow.calls import listener_of
    from reap_driver.workflow.console import Console

    assert type(listener_of(None)) is rd.Listener
    assert isinstance(listener_of(True), Console)
    with pytest.raises(rd.OptionError, match="progress is a int"):
        listener_of(3)  # type: ignore[arg-type]
