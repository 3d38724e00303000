"""Runs that are killed or interrupted and go on: the outcome of one that never was."""

import json
import multiprocessing
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap_driver.cli.main import main
from reap_driver.observation import journal as journals
from reap_driver.observation.journal import FORMAT
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import Run, observation, write_model
from tests.driver.cli.forks import forked, killed_before
from tests.driver.streaming.passes import assert_same_bits
from tests.sealed import change_document

KILLS = 8
LAYERS = 4


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few decoder layers."""
    return write_model(
        tmp_path_factory.mktemp("deep") / "model", "qwen3_moe", num_hidden_layers=LAYERS
    )


@pytest.fixture(scope="module")
def words(deep: Path) -> list[str]:
    """An observation of two groups, 8 batches; an entry behind each. Its files are read only."""
    return observation(deep, 8, "code", "text")


@pytest.fixture(scope="module")
def whole(deep: Path, words: list[str]) -> dict[str, SaliencyStats]:
    """Statistics of runs that nobody interrupts, by --stream."""
    found = {}
    for stream in ("never", "always"):
        out = deep.with_name(stream)
        assert main([*words, "--out", str(out), "--stream", stream]) == 0
        assert not out.with_name(out.name + ".journal").exists()
        found[stream] = SaliencyStats.load(out)
    return found


@pytest.mark.parametrize("stream", ["never", "always"])
def test_killed_at_random_points(
    words: list[str], whole: dict[str, SaliencyStats], stream: str, tmp_path: Path
) -> None:
    """kill -9 before a change to files, eight times, then to the end: the bits of a run that was
    never killed.
    """
    want, mode = whole[stream], ["--stream", stream]
    counter = multiprocessing.get_context("fork").Value("i", 0)
    timed = tmp_path / "timed.safetensors"
    assert forked([*words, *mode, "--out", str(timed)], killed_before(None, counter)).code == 0
    changes = counter.value
    chance, out = random.Random(0), tmp_path / "out.safetensors"
    journal = tmp_path / "out.safetensors.journal"
    kills, resumed, complete = 0, set(), False
    while not complete:
        resume = ["--resume"] if journals.exists(journal) else []
        if resume:
            resumed.add(journals.read(journal)["position"])
        counter.value = 0
        last = chance.randint(1, changes // 4) if kills < KILLS else None
        command = [*words, *mode, *resume, "--out", str(out), "--overwrite"]
        ended = forked(command, killed_before(last, counter))
        assert ended.code in (0, -signal.SIGKILL), ended.err
        kills += ended.code != 0
        if out.exists():  # the end was reached, or nearly: the journal may be there still
            assert_same_bits(SaliencyStats.load(out), want)
            out.unlink()
        complete = kills >= KILLS and ended.code == 0
    assert len(resumed) > 2
    assert not journal.exists()


def test_one_fixed_command(
    words: list[str], whole: dict[str, SaliencyStats], tmp_path: Path
) -> None:
    """With --resume auto, the same words begin, go on after each kill -9, and find their output
    complete, also where they were killed between writing it and deleting the journal.
    """
    out, counter = tmp_path / "out.safetensors", multiprocessing.get_context("fork").Value("i", 0)
    command = [word for word in words if word != "--quiet"]
    command += ["--stream", "never", "--out", str(out), "--resume", "auto"]
    assert forked(command, killed_before(None, counter)).code == 0
    changes = counter.value
    out.unlink()
    chance, kills = random.Random(1), 0
    for last in [*(chance.randint(1, changes // 3) for _ in range(4)), changes - 3]:
        counter.value = 0
        kills += forked(command, killed_before(last, counter)).code == -signal.SIGKILL
    assert kills > 3
    ended = forked(command)
    assert ended.code == 0, ended.err
    assert_same_bits(SaliencyStats.load(out), whole["never"])
    before = out.stat()
    ended = forked(command)
    assert (ended.code, ended.out.splitlines()) == (
        0,
        [f"{out} is complete, made by this command; nothing to do"],
    )
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_complete_output_and_its_journal(
    run: Run, words: list[str], left: Path, tmp_path: Path
) -> None:
    """A journal that was not deleted any more is deleted; one of another command is refused."""
    out = tmp_path / "out"
    auto = [*words, "--out", out, "--resume", "auto"]
    kept = shutil.copytree(left, tmp_path / "kept")
    assert run(*auto).code == 0
    shutil.copytree(kept, left)
    refused = run(*auto, "--overwrite", "--seed", 3)
    assert (refused.code, "seed was 0, now it is 3" in refused.error) == (3, True)
    assert left.exists()
    assert run(*auto, "--json").json == {"command": "observe", "out": str(out), "complete": True}
    assert not left.exists()
    refused = run(*auto, "--seed", 3)
    assert refused.code == 3
    assert f"{out}: exists, and was made by another command: seed was 0, now" in refused.error
    assert run(*auto, "--seed", 3, "--overwrite").code == 0
    facts = SaliencyStats.load(out).provenance
    assert facts["run"]["seed"] == facts["observed"]["seed"] == 3
    assert facts["observed"]["seconds"] > 0
    assert facts["observed"]["device"]
    stats = SaliencyStats.load(out)
    assert "run" not in stats.merge(stats).provenance  # no command made that
    del stats.provenance["run"]
    stats.save(out)
    assert f"{out}: exists, and does not record what made it;" in run(*auto).error


@pytest.mark.parametrize("offload", ["device", "file"])
@pytest.mark.parametrize("layer", [0, 2, LAYERS - 1])
def test_every_place_of_states_resumes(
    words: list[str],
    whole: dict[str, SaliencyStats],
    layer: int,
    offload: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that fails right behind a layer goes on from it; layers before are not read again."""
    from reap_driver.load.streamed_model import StreamedModel
    from reap_driver.memory import decision

    places = decision._places
    monkeypatch.setattr(
        decision,
        "_places",
        lambda machine: [(offload, *rest) for _, *rest in places(machine)],
    )
    mode = ["--stream", "always", "--out", str(tmp_path / "out")]
    release, loaded = StreamedModel.release, []

    def fail(self: StreamedModel, number: int) -> None:
        release(self, number)
        if number == min(layer + 1, LAYERS - 1):
            raise RuntimeError("a power cut")

    monkeypatch.setattr(StreamedModel, "release", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        main([*words, *mode])
    position = journals.read(tmp_path / "out.journal")["position"]
    assert position == min(layer + 1, LAYERS - 1)
    monkeypatch.setattr(StreamedModel, "release", release)
    load = StreamedModel._load

    def count(self: StreamedModel, number: int) -> None:
        loaded.append(number)
        load(self, number)

    monkeypatch.setattr(StreamedModel, "_load", count)
    assert main([*words, *mode, "--resume"]) == 0
    assert loaded == list(range(position, LAYERS))
    assert_same_bits(SaliencyStats.load(tmp_path / "out"), whole["always"])
    assert not (tmp_path / "out.journal").exists()


@pytest.fixture(scope="module")
def failed(deep: Path, words: list[str]) -> Path:
    """The journal of a resident run that failed behind its fifth batch; never changed."""
    from reap_driver.observation.observer import Observer

    calls, call = [0], Observer.__call__

    def fail(self: Observer, **batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("a power cut")
        return call(self, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "__call__", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            main([*words, "--out", str(deep.with_name("failed"))])
    return deep.with_name("failed.journal")


@pytest.fixture
def left(failed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(failed, tmp_path / "out.journal"))


def test_a_journal_is_not_overlooked(
    run: Run, words: list[str], left: Path, tmp_path: Path
) -> None:
    """Without --resume the run is refused, unless it is to replace what is there."""
    kept = shutil.copytree(left, tmp_path / "kept")
    refused = run(*words, "--out", tmp_path / "out")
    assert refused.code == 3
    assert f"{left}: the journal of a run that was interrupted; give --resume" in refused.error
    assert run(*words, "--out", tmp_path / "out", "--overwrite").code == 0
    assert not left.exists()
    shutil.copytree(kept, left)
    loud = [word for word in words if word != "--quiet"]
    again = run(*loud, "--out", tmp_path / "out", "--overwrite", "--resume")
    assert f"note: continuing from {left}, written after batch " in again.err
    missing = run(*words, "--out", tmp_path / "out", "--resume", "--overwrite")
    assert missing.code == 3
    assert (
        "there is no journal, so nothing to resume; run without --resume, or with --resume auto"
        in missing.error
    )


Change = Callable[[list[str], Path], list[str]]


def _other_weights(words: list[str], folder: Path) -> list[str]:
    """Another training of the same architecture."""
    other = write_model(folder / "other", "qwen3_moe", num_hidden_layers=LAYERS, seed=1)
    return [words[0], str(other), *words[2:]]


def _other_model(words: list[str], folder: Path) -> list[str]:
    other = write_model(folder / "other", "qwen3_moe", num_hidden_layers=3)
    return [words[0], str(other), *words[2:]]


def _other_data(words: list[str], folder: Path) -> list[str]:
    """A token of the second group differs."""
    at = _last_data(words)
    content = json.loads(Path(words[at + 1]).read_text())
    content["input_ids"][100] += 1
    path = folder / "text.jsonl"
    path.write_text(json.dumps(content))
    return [*words[: at + 1], str(path), *words[at + 2 :]]


def _last_data(words: list[str]) -> int:
    return len(words) - 1 - words[::-1].index("--data")


def _less_data(words: list[str], _: Path) -> list[str]:
    at = _last_data(words)
    return [*words[:at], *words[at + 2 :]]


def _chosen(words: list[str]) -> list[str]:
    """With batch sizes as the journal has them, one for each of its sources."""
    at = words.index("--batch-size")
    return [*words[:at], *words[at + 2 :]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_other_model, "model was"),
        (_other_weights, "weights was"),
        (_other_data, "data 2 was"),
        (_less_data, "data 2 was"),
        (lambda words, _: [*words, "--seed", "3"], "seed was 0, now it is 3"),
        (lambda words, _: [*words, "--batch-size", "3"], r"batch sizes was \[2, 2\], now it is"),
        (lambda words, _: [*words, "--seq-len", "8"], "seq_len was 16, now it is 8"),
        (lambda words, _: [*words, "--backend", "reference"], "backend was None, now it is 'ref"),
        (lambda words, _: [*words, "--dtype", "bfloat16"], "dtype was 'auto', now it is 'bfl"),
        (lambda words, _: [*words, "--stream", "always"], "streamed was False, now it is True"),
        (lambda words, _: _chosen(_less_data(words, _)), "data 2 was"),
    ],
)
def test_a_journal_of_another_run_is_refused(
    run: Run, words: list[str], left: Path, change: Change, field: str, tmp_path: Path
) -> None:
    """The field that differs is named; the journal stays as it is."""
    before = {path.name: path.read_bytes() for path in left.iterdir()}
    changed = change(words, tmp_path)
    for resume in (["--resume"], ["--resume", "auto"]):
        outcome = run(*changed, "--out", tmp_path / "out", *resume)
        assert outcome.code == 3
        assert f"{left}: the journal is of another run: " in outcome.error
        assert re.search(field, outcome.error), outcome.error
    assert {path.name: path.read_bytes() for path in left.iterdir()} == before


def test_a_journal_of_another_version_is_refused(
    run: Run, words: list[str], left: Path, tmp_path: Path
) -> None:
    before = json.loads((left / "journal.json").read_text())["run"]
    change_document(left / "journal.json", FORMAT, {"run": {**before, "torch": "2.10.0"}})
    outcome = run(*words, "--out", tmp_path / "out", "--resume")
    assert "torch was '2.10.0', now it is" in outcome.error


def test_prune_goes_on_behind_an_observation(
    run: Run, deep: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails while the checkpoint is written costs no observation."""
    import reap_driver.workflow.prune as job
    from reap_driver.observation.observer import Observer

    apply_plan = job.apply_plan

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", "pruned")

    monkeypatch.setattr(job, "apply_plan", fail)
    pruned = ["prune", *words[1:], "--out", tmp_path / "pruned"]
    outcome = run(*pruned)
    assert outcome.code == 4
    assert (tmp_path / "pruned.journal" / "journal.json").is_file()
    monkeypatch.setattr(job, "apply_plan", apply_plan)
    monkeypatch.setattr(Observer, "__call__", fail)
    assert run(*pruned, "--resume").code == 0
    assert (tmp_path / "pruned" / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_prune_by_one_fixed_command(
    run: Run, deep: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on where the statistics were saved and the checkpoint was not, and ends with success
    once both are there; what another command made is refused by what differs.
    """
    import reap_driver.workflow.prune as job

    out, stats = tmp_path / "pruned", tmp_path / "stats"
    own = ["--protect", "super", "--stats", stats, "--resume", "auto"]
    command = ["prune", *words[1:-1], "--out", out, *own]
    apply_plan = job.apply_plan

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", "pruned")

    monkeypatch.setattr(job, "apply_plan", fail)
    assert run(*command).code == 4
    assert stats.exists()
    monkeypatch.setattr(job, "apply_plan", apply_plan)
    assert run(*command).code == 0
    made = (out / "config.json").stat().st_mtime_ns
    again = run(*command)
    assert again.out == f"{out} is complete, made by this command; nothing to do\n"
    assert (out / "config.json").stat().st_mtime_ns == made
    stats.rename(tmp_path / "kept")
    again = run(*command)
    assert (again.code, f"{stats}: was missing, and is written again" in again.err) == (0, True)
    assert stats.read_bytes() == (tmp_path / "kept").read_bytes()
    (out / "model.safetensors.index.json").rename(tmp_path / "index")
    assert run(*command).code == 3, "a checkpoint that lost a file is not complete"
    (tmp_path / "index").rename(out / "model.safetensors.index.json")
    for more, says in {
        ("--ratio", "0.25"): "ratio was 0.5, now it is 0.25",
        ("--protect", "1:0"): "settings was ",
        ("--seed", "5"): "seed was 0, now it is 5",
        ("--shard-size", "1GB"): "shard_size was None, now it is 1000000000",
    }.items():
        assert (
            f"{out}: exists, and was made by another command: {says}" in run(*command, *more).error
        )
    assert run(*command, "--ratio", 0.25, "--overwrite").code == 0
    assert json.loads((out / "reap" / "plan.json").read_text())["run"]["ratio"] == 0.25


def test_statistics_of_another_command_stay(
    run: Run, words: list[str], left: Path, tmp_path: Path
) -> None:
    """A run that goes on may replace only what it wrote itself."""
    stats = tmp_path / "stats"
    assert run(*words, "--seed", 3, "--out", stats).code == 0
    before = stats.read_bytes()
    command = ["prune", *words[1:], "--out", tmp_path / "out", "--stats", stats, "--resume"]
    refused = run(*command)
    assert f"{stats}: exists, and was made by another command: seed was 3, now" in refused.error
    assert stats.read_bytes() == before
    assert run(*command, "--overwrite").code == 0
    assert not left.exists()
