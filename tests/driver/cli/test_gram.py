"""`observe --gram`: one folder whatever way the model is held, interrupted and shared."""

import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch

from reap_driver.cli.main import main
from reap_driver.files.gram_folder import GramFolder
from reap_driver.observation import journal as journals
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import Run, observation
from tests.driver.cli.forks import forked, killed_before
from tests.driver.distributed.launch import ranked
from tests.driver.streaming.passes import assert_same_bits
from tests.forks import Ended

LAYERS = 3  # of `three_deep`


@pytest.fixture(scope="module")
def words(three_deep: Path) -> list[str]:
    """An observation of two groups, 6 batches; an entry of the journal behind each."""
    return observation(three_deep, 6, "code", "text")


@pytest.fixture(scope="module")
def whole(three_deep: Path, words: list[str]) -> GramFolder:
    """The folder of a streamed run that nobody interrupts."""
    out, gram = three_deep.with_name("stats"), three_deep.with_name("sums")
    command = [*words, "--stream", "always", "--out", str(out), "--gram", str(gram)]
    assert main(command) == 0
    plain = three_deep.with_name("plain")
    assert main([*words, "--out", str(plain)]) == 0
    assert_same_bits(SaliencyStats.load(out), SaliencyStats.load(plain))
    return GramFolder.open(gram)


def assert_same_sums(mine: GramFolder, theirs: GramFolder, bound: float = 0) -> None:
    """Equal in every number, or within `bound` of the largest."""
    assert list(mine.layers) == list(theirs.layers)
    for name in theirs.layers:
        for left, right in zip(mine.get(name).packed(), theirs.get(name).packed(), strict=True):
            left, right = (x.tril() if x.ndim == 3 else x for x in (left, right))
            assert float((left - right).abs().max()) <= bound * float(right.abs().max())


def test_the_folder_says_what_it_is_of(whole: GramFolder, words: list[str]) -> None:
    stats = SaliencyStats.load(whole.folder.with_name("stats"))
    assert whole.provenance == stats.provenance
    assert list(whole.layers) == list(stats.layers)
    for name, layer in stats.layers.items():
        assert torch.equal(whole.get(name).count, layer.total().count[0])
    assert sorted(p.name for p in whole.folder.parent.glob("sums*")) == ["sums"]


@pytest.mark.parametrize("stream", ["never", "always"])
def test_killed_at_random_points(
    words: list[str], whole: GramFolder, stream: str, tmp_path: Path
) -> None:
    """kill -9 before a change to files, up to five times, with one fixed command."""
    out, gram = tmp_path / "out", tmp_path / "sums"
    counter = multiprocessing.get_context("fork").Value("i", 0)

    def started(out: Path, gram: Path, last: int | None) -> Ended:
        counter.value = 0
        places = ["--out", str(out), "--gram", str(gram)]
        command = [*words, "--stream", stream, *places, "--resume", "auto"]
        ended = forked(command, killed_before(last, counter))
        assert ended.code in (0, -signal.SIGKILL), ended.err
        return ended

    assert started(tmp_path / "a", tmp_path / "b", None).code == 0
    changes, chance, positions, kills = counter.value, random.Random(0), set(), 0
    for _ in range(5):
        if started(out, gram, chance.randint(changes // 4, changes // 2)).code == 0:
            break
        kills += 1
        if journals.exists(tmp_path / "out.journal"):
            positions.add(journals.read(tmp_path / "out.journal")["position"])
    assert kills > 1
    assert positions
    assert started(out, gram, None).code == 0
    assert_same_sums(GramFolder.open(gram), whole)
    assert_same_bits(SaliencyStats.load(out), SaliencyStats.load(whole.folder.with_name("stats")))
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(("out", "sums"))}
    assert left <= {"out", "out.journal.lock", "sums"}


@pytest.mark.parametrize("stream", ["never", "always"])
def test_ranks_add_up(words: list[str], whole: GramFolder, stream: str, tmp_path: Path) -> None:
    """Four ranks, of which one has no batch of three, give the sums of one process; twice the same
    bits.
    """
    found = []
    for number in range(2):
        gram = tmp_path / f"sums-{number}"
        command = [*words, "--out", str(tmp_path / f"out-{number}"), "--gram", str(gram)]
        ended = ranked(4, lambda command=command: main([*command, "--stream", stream]))
        assert ended.code == 0, ended.err
        found.append(GramFolder.open(gram))
    assert_same_sums(found[0], found[1])
    assert_same_sums(found[0], whole, 1e-6)
    assert not list(tmp_path.glob("*partial*"))


def test_a_complete_pair_is_left_alone(run: Run, words: list[str], tmp_path: Path) -> None:
    """A folder that is gone is made again, with the statistics."""
    out, gram = tmp_path / "out", tmp_path / "sums"
    command = [*words, "--out", out, "--gram", gram, "--resume", "auto"]
    assert run(*command).code == 0
    before = (gram / "gram.json").stat().st_mtime_ns
    again = run(*command)
    assert again.code == 0
    assert (gram / "gram.json").stat().st_mtime_ns == before
    for path in gram.iterdir():
        path.unlink()
    gram.rmdir()
    assert run(*command).code == 0
    assert list(GramFolder.open(gram).layers)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: p.write_text("mine"), "exists and is no folder of Gram matrices; choose"),
        (lambda p: p.mkdir(), "exists and is no folder of Gram matrices; choose"),
        (
            lambda p: (p.mkdir(), (p / "gram.json").write_text("{}")),
            "exists; choose another name, or pass --overwrite",
        ),
        (
            lambda p: (p.parent / "sums.partial").mkdir() or (p.parent / "sums.partial/x").touch(),
            "is where Gram matrices go until they are complete, and holds 'x'",
        ),
    ],
)
def test_other_folders_are_kept(run: Run, words: list[str], tmp_path: Path, make, text) -> None:
    make(tmp_path / "sums")
    before = sorted(tmp_path.rglob("*"))
    ended = run(*words, "--out", tmp_path / "out", "--gram", tmp_path / "sums")
    assert ended.code == 3
    assert text in ended.error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lost_file_is_named(words: list[str], tmp_path: Path) -> None:
    """A streamed run whose files of complete layers are gone cannot go on."""
    gram = tmp_path / "sums"
    command = [*words, "--stream", "always", "--out", str(tmp_path / "out"), "--gram", str(gram)]
    counter = multiprocessing.get_context("fork").Value("i", 0)
    journal, last = tmp_path / "out.journal", 30
    while not (journals.exists(journal) and journals.read(journal)["position"] == 2):
        counter.value = 0
        resume = ["--resume"] if journals.exists(journal) else []
        assert forked([*command, *resume], killed_before(last, counter)).code == -signal.SIGKILL
        last += 5
    (tmp_path / "sums.partial" / "gram-0000.safetensors").unlink()
    ended = forked([*command, "--resume"])
    assert ended.code == 3
    assert "sums.partial: lacks the Gram matrices of model.layers.0.mlp.experts" in ended.err


def test_dry_run_states_memory_and_disk(run: Run, three_deep: Path) -> None:
    words = ["observe", three_deep, "--dry-run", "--tokens", "1000", "--json"]
    plain, ended = run(*words), run(*words, "--gram", "sums")
    sizes = ended.json["gram"]
    experts, width = 8, 24
    assert sizes["layer_bytes"] == experts * (4 * width**2 + 8 * width + 16)
    assert sizes["bytes"] == LAYERS * sizes["layer_bytes"]
    triangle = experts * (2 * width * (width + 1) + 8 * width + 16)
    assert sizes["disk_bytes"] == LAYERS * triangle
    assert "gram" not in plain.json
    parts = ended.json["decision"]["host_parts"]
    assert parts["Gram matrices"] == sizes["bytes"]
    assert plain.json["decision"]["host_parts"].keys() < parts.keys()
