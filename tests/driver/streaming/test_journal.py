"""The journal: what was written is read; other runs' and damaged journals are refused."""

import errno
import fcntl
import json
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.journal import FORMAT, Journal, exists, locked, read
from reap_driver.observation.observer import observe
from reap_driver.observation.run import ObserverJournal, Run, run_streamed
from reap_driver.observation.state_store import StateStore, write_state
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import CheckpointError, DataError, ResourceError
from tests.driver.streaming import passes
from tests.driver.writer import saved
from tests.forks import Fork
from tests.sealed import GONE, change_document

RUN = {
    "model": "sha256:1",
    "weights": "sha256:2",
    "data 1": "code: 30 tokens sha256:3",
    "seq_len": 16,
    "batch sizes": (2, 1),
    "dtype": "auto",
    "backend": None,
    "environment": {"REAP_X": "1"},
}


def stats(tokens: int) -> SaliencyStats:
    """Statistics that differ between entries."""
    layer = LayerStats(3)
    layer.tokens.fill_(tokens)
    layer.count.fill_(tokens)
    layer.sums.fill_(tokens / 7)
    layer.extrema.fill_(tokens)
    return SaliencyStats(
        {"layers.0.mlp": layer}, ["default"], {"served": {"layers.0.mlp": ["cpu"]}}
    )


def states(value: float) -> Callable[[Path], None]:
    """Writes the states of one batch."""

    def write(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_state(folder / "000000.safetensors", BatchState.of(0, torch.tensor(value), {}))

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.journal"


def test_round_trip(folder: Path) -> None:
    Journal(folder, RUN).write(4, stats(40), states(4.5), seconds=12.3456)
    assert exists(folder)
    assert read(folder)["position"] == 4
    again = Journal(folder, RUN)
    entry = again.resume()
    assert (entry.position, again.position, entry.seconds) == (4, 4, 12.346)
    passes.assert_same_bits(entry.snapshot, stats(40))
    store = StateStore("device", passes.CPU)
    assert entry.states is not None
    store.load(entry.states)
    state = store.get(0, None)
    assert state is not None
    assert state.output().item() == 4.5


def test_entry_without_states(folder: Path) -> None:
    Journal(folder, RUN).write(4, stats(40))
    assert Journal(folder, RUN).resume().states is None


def test_each_entry_takes_the_place_of_the_one_before(folder: Path) -> None:
    """With and without states, and twice at one position."""
    journal = Journal(folder, RUN)
    journal.write(1, stats(1), states(1))
    assert names(folder) == ["journal.json", "states-00001", "stats-000001.safetensors"]
    journal.write(2, stats(2), states(2))
    assert names(folder) == ["journal.json", "states-00002", "stats-000002.safetensors"]
    journal.write(2, stats(3))
    assert names(folder) == ["journal.json", "stats-000002.safetensors"]
    assert int(Journal(folder, RUN).resume().snapshot.layers["layers.0.mlp"].tokens) == 3


def test_left_overs_of_a_killed_run_are_deleted_and_nothing_else(folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1), states(1))
    own = names(folder)
    for left in ("stats-000002.safetensors", ".journal.json.1234", "mine.txt"):
        (folder / left).write_text("half")
    (folder / "states-00002").mkdir()
    (folder / "states-00002" / "000000.safetensors").write_text("half")
    Journal(folder, RUN).resume()
    assert names(folder) == sorted([*own, "mine.txt"])


def test_removed(folder: Path) -> None:
    journal = Journal(folder, RUN)
    journal.remove()
    journal.write(1, stats(1), states(1))
    journal.remove()
    assert not folder.exists()
    assert not exists(folder)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("field", RUN)
def test_every_field_that_differs_is_named_with_both_values(field: str, folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1))
    now = {**RUN, field: "another"}
    recorded = json.loads(json.dumps(RUN[field]))
    with pytest.raises(DataError) as caught:
        Journal(folder, now).resume()
    assert f"{field} was {recorded!r}, now it is 'another'" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert Journal(folder, RUN).resume().position == 1  # and it is still there


def test_fields_that_are_new_or_gone_are_named(folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1))
    with pytest.raises(DataError, match="data 2 was None, now it is 'text'"):
        Journal(folder, {**RUN, "data 2": "text"}).resume()
    with pytest.raises(DataError, match="seq_len was 16, now it is None"):
        Journal(folder, {k: v for k, v in RUN.items() if k != "seq_len"}).resume()


@pytest.mark.parametrize("there", [True, False])
def test_no_journal(there: bool, folder: Path) -> None:
    if there:
        folder.mkdir()
    assert not exists(folder)
    with pytest.raises(DataError, match=f"{folder}: there is no journal.*without `resume=True`"):
        Journal(folder, RUN).resume()


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", '"format"', "{}", "\udcff"),
        *('{"format": "other"}', '{"format": "reap-journal"}', '{"format": "other", "version": 2}'),
    ],
)
def test_foreign_file(content: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "journal.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=f"journal {folder}/journal.json.*delete its folder"):
        read(folder)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_version(version: object, folder: Path) -> None:
    folder.mkdir()
    (folder / "journal.json").write_text(json.dumps({"format": "reap-journal", "version": version}))
    with pytest.raises(
        DataError, match=f"version {version!r}, this .* reads 2; .*resume with the ver"
    ):
        read(folder)


FIELDS = ("run", "position", "seconds", "stats", "states", "files")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    "value",
    [GONE, [1], -1, 1e30, {"a": {}}, "../../x"],
    ids=lambda value: "gone" if value is GONE else str(value),
)
def test_damaged_content(field: str, value: object, folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1))
    change_document(folder / "journal.json", FORMAT, {field: value})
    with pytest.raises(DataError, match=rf"{folder}.*(without `resume=True`|of another run)"):
        Journal(folder, RUN).resume()


@pytest.mark.parametrize(
    "run", [{"batch sizes": ["2"]}, {"batch sizes": 2}, {"streamed": 1}, {"offload": "moon"}]
)
def test_what_is_read_of_a_run_is_checked(run: dict[str, object], folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1))
    change_document(folder / "journal.json", FORMAT, {"run": run})
    with pytest.raises(DataError, match=f"field 'run.{next(iter(run))}.*' is "):
        read(folder)


def test_a_digit_that_changed_is_noticed(folder: Path) -> None:
    path = folder / "journal.json"
    Journal(folder, RUN).write(1, stats(1))
    path.write_text(path.read_text().replace('"seconds": 0.0', '"seconds": 1.0'))
    with pytest.raises(DataError, match=f"{path} is damaged"):
        read(folder)


@pytest.mark.parametrize("name", ["stats-000001.safetensors", "states-00001/000000.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "cut", "bit", "another"])
def test_missing_and_damaged_files(name: str, damage: str, folder: Path) -> None:
    """An intact file, but of another position."""
    Journal(folder, RUN).write(1, stats(1), states(1))
    path = folder / name
    good = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(good[:-1])
        case "bit":
            path.write_bytes(good[:-1] + bytes([good[-1] ^ 16]))
        case "another" if "stats" in name:
            stats(2).save(path)
        case "another":
            states(2)(path.parent)
    with pytest.raises(
        DataError, match=rf"journal {path} (is|cannot be read).*without `resume=True`"
    ):
        Journal(folder, RUN).resume()


def test_files_that_are_too_many_are_named(folder: Path) -> None:
    Journal(folder, RUN).write(1, stats(1), states(1))
    (folder / "states-00001/000001.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"000001\.safetensors is damaged, or of another run"):
        Journal(folder, RUN).resume()


# -- writing that fails ----------------------------------------------------------------------------


def _raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("where", ["statistics", "states", "content", "rename"])
@pytest.mark.parametrize(
    ("number", "kind", "remedy"),
    [
        (errno.ENOSPC, ResourceError, "free some space"),
        (errno.EDQUOT, ResourceError, "free some space"),
        (errno.EIO, CheckpointError, "check the folder's rights"),
        (None, KeyboardInterrupt, ""),
    ],
)
def test_write_that_fails_leaves_the_entry_before(
    where: str,
    number: int | None,
    kind: type[BaseException],
    remedy: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    journal = Journal(folder, RUN)
    journal.write(1, stats(1), states(1))
    before = names(folder)
    error = KeyboardInterrupt() if number is None else OSError(number, os.strerror(number))
    with monkeypatch.context() as patch:
        write = states(2)
        match where:
            case "statistics":
                patch.setattr(SaliencyStats, "save", _raising(error))
            case "states":
                write = _raising(error)
            case "content":
                patch.setattr(Path, "write_text", _raising(error))
            case "rename":
                own = Path.replace

                def replace(self: Path, target: Path) -> Path:
                    if target.name == "journal.json":
                        raise error
                    return own(self, target)

                patch.setattr(Path, "replace", replace)
        with pytest.raises(kind) as caught:
            journal.write(2, stats(2), write)
    if number is not None:
        assert str(folder) in str(caught.value)
        assert os.strerror(number) in str(caught.value)
        assert remedy in str(caught.value)
        assert "`journal=False`" in str(caught.value)
    assert journal.position == 1
    entry = Journal(folder, RUN).resume()
    assert entry.position == int(entry.snapshot.layers["layers.0.mlp"].tokens) == 1
    assert entry.states is not None
    assert names(entry.states) == ["000000.safetensors"]
    assert names(folder) == before


def test_disk_that_is_full_while_tensors_are_written(folder: Path) -> None:
    """The real error of the library that writes them."""
    journal = Journal(folder, RUN)
    journal.write(1, stats(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"File too large.*free some space"):
            journal.write(2, stats(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Journal(folder, RUN).resume().position == 1


# -- two at once -----------------------------------------------------------------------------------


def test_two_processes_at_once(folder: Path) -> None:
    """The second is refused; a lock ends with its process, however that ends."""

    def hold(pipe: Connection) -> None:
        with locked(folder):
            pipe.send("held")
            pipe.recv()  # what nobody sends

    with Fork(hold) as process:
        assert process.receive() == "held"
        with pytest.raises(CheckpointError, match=f"{folder}: another process"), locked(folder):
            pass
    with locked(folder):
        assert not folder.exists()
    assert names(folder.parent) == []


def test_lock_on_a_file_that_was_deleted_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would lock nobody out."""
    own = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        folder.with_name("out.journal.lock").unlink()
        own(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError, match="another process"), locked(folder):
        pass


def test_folder_that_cannot_be_locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", _raising(error))
    with (
        pytest.raises(CheckpointError, match=r"No locks available.*`journal=False`"),
        locked(folder),
    ):
        pass


# -- when it is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_due_every_so_many(every: int, folder: Path) -> None:
    journal = Journal(folder, RUN, every)
    written = []
    for position in range(1, 8):
        if journal.due(position):
            journal.write(position, stats(position))
            written.append(position)
    assert written == list(range(every, 8, every))


def test_due_every_so_many_after_resuming(folder: Path) -> None:
    Journal(folder, RUN).write(4, stats(1))
    journal = Journal(folder, RUN, 3)
    journal.resume()
    assert [journal.due(position) for position in (5, 6, 7, 8)] == [False, False, True, True]


def test_due_when_writing_takes_a_twentieth(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once; then when 20 times the duration of the last write has passed."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    journal = Journal(folder, RUN)
    assert journal.due(1)

    def slow(path: Path) -> None:
        nonlocal now
        now += 2
        states(1)(path)

    journal.write(1, stats(1), slow)
    assert not journal.due(2)
    now += 39
    assert not journal.due(2)
    now += 1.5
    assert journal.due(2)


# -- in a run --------------------------------------------------------------------------------------


def test_run_resumed_at_any_position(folder: Path, tmp_path: Path) -> None:
    """Also behind the last layer, with states and, as the command line writes it, without."""
    model = saved.save("qwen3_moe", tmp_path / "model", num_hidden_layers=3)
    data = passes.batches(model.config.vocab_size)
    wanted, opened = passes.streamed(tmp_path / "model", data)
    total, count = len(opened.layers), len(data.ids)

    def go_on(steps: int, *, last: bool = False) -> SaliencyStats:
        """Runs, and requests the end after a number of steps."""
        journal = Journal(folder, RUN, 1)
        store = StateStore("device", passes.CPU)
        stop, calls = Stop(), []

        def done(share: float) -> None:
            calls.append(share)
            stop.requested = len(calls) == steps

        with open_streamed(tmp_path / "model") as streamed:
            observer = observe(streamed.model)
            if exists(folder):
                entry = journal.resume()
                observer.restore(entry.snapshot)
                if entry.states is not None:
                    store.load(entry.states)
            kept = ObserverJournal(journal, observer)
            run = Run(observer, data, range(count), stop, kept, done)
            run_streamed(run, streamed, store)
            if last:
                journal.write(total, observer.snapshot())
            return observer.stats

    with pytest.raises(Interrupted, match=f"^interrupted after 0 of {total} layers$"):
        go_on(1)
    assert not exists(folder)  # so it is not said that there is something to resume
    for position in range(1, total):
        with pytest.raises(Interrupted, match=f"after {position} of {total} layers.*`resume=True`"):
            go_on(count + 1)
        assert read(folder)["position"] == position
    for last in (False, True, True):
        passes.assert_same_bits(go_on(-1, last=last), wanted)
        assert read(folder)["position"] == total
        assert (read(folder)["states"] is None) == last
