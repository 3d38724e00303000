"""A finished folder gets its name: whatever ends that, and at whichever step, the name is that of
one whole checkpoint, at once or after the next run has begun, and nothing else is left."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files import exchange
from reap_driver.files.checkpoint import resolve_folder
from reap_driver.writer import apply, staging
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.staging import clean_stale, publish, scratch, staged
from reap_kernels import SaliencyStats
from reap_kernels.errors import CheckpointError
from tests.driver.writer import saved
from tests.forks import forked

FILES = ("config.json", "model.safetensors", "templates/tools.jinja")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """As a shell in the foreground hands them on: a run in its background ignores some."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fill(folder: Path, content: str) -> None:
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def content(folder: Path) -> str:
    """What every file of a folder holds, if it is whole."""
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.*")}
    assert sorted(found) == sorted(FILES), f"{folder} is not whole: {sorted(found)}"
    [one] = set(found.values())
    return one


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Steps:
    """Lets something happen before or after the n-th step of `publish`.

    Steps are what it asks of the system: flushing, renaming, exchanging names, removing a file of
    the old checkpoint, removing the rest.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, exchanges: bool) -> None:
        self.seen = 0
        self.when = -1
        self.happens: Callable[[], None] = lambda: None
        exchanged = exchange._exchanged if exchanges else lambda *_: False
        monkeypatch.setattr(exchange, "_exchanged", self.around(exchanged))
        monkeypatch.setattr(Path, "rename", self.around(Path.rename))
        monkeypatch.setattr(staging, "sync", self.around(lambda _: None))  # slow, and not seen here
        removed = shutil.rmtree

        def remove(folder: Path, ignore_errors: bool = False) -> None:
            if (folder / "config.json").is_file():
                self.around(os.unlink)(folder / "config.json")
            self.around(removed)(folder, ignore_errors=ignore_errors)

        monkeypatch.setattr(staging.shutil, "rmtree", remove)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.step()
            found = function(*args, **options)
            self.step()
            return found

        return call

    def step(self) -> None:
        self.seen += 1
        if self.seen == self.when:
            self.happens()


def replace(out: Path) -> None:
    with staged(out, needed=0) as folder:
        fill(folder, "new")
        publish(folder, out, overwrite=True)


def disk_error() -> None:
    raise OSError(5, "Input/output error")


ENDS: dict[str, Callable[[], None]] = {
    "error": disk_error,
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
    "termination": lambda: signal.raise_signal(signal.SIGTERM),
    "hangup": lambda: signal.raise_signal(signal.SIGHUP),
    "kill": lambda: os._exit(9),
}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_ended_at_any_step(
    end: str, exchanges: bool, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my-partial-model"  # a word of the hidden names in it
    steps = Steps(monkeypatch, exchanges=exchanges)
    outcomes = set()
    for number in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        if old:
            fill(out, "old")
        steps.seen, steps.when, steps.happens = 0, number, ENDS[end]
        if end == "kill":
            ended = forked(lambda: replace(out)).code != 0
        else:
            with contextlib.suppress(CheckpointError, KeyboardInterrupt, SystemExit):
                replace(out)
            ended = steps.seen >= number
        steps.when = -1
        if end != "kill":  # at once
            assert not old or content(out)
            assert end == "error" or hidden(tmp_path) == [], f"step {number}"
        clean_stale(out)
        outcomes.add(content(out) if old or out.exists() else "none")
        assert hidden(tmp_path) == [], f"step {number}"
        if not ended:
            break
    assert number > 10
    assert outcomes == {"old" if old else "none", "new"}


def test_restored_before_it_is_looked_at(tmp_path: Path) -> None:
    """The name is free: the checkpoint that was set aside gets it back, the newest of several."""
    out = tmp_path / "model"
    fill(tmp_path / ".model.reap-replaced-aaaaaaaa", "older")
    fill(tmp_path / "later", "old")
    (tmp_path / "later").rename(tmp_path / ".model.reap-replaced-00000000")
    fill(tmp_path / ".model.reap-partial-00000000", "new")
    assert len(clean_stale(out)) == 2
    assert (content(out), hidden(tmp_path)) == ("old", [])


def test_restored_before_it_is_read(tmp_path: Path) -> None:
    """Whoever reads the checkpoint finds it, not only who writes it again."""
    fill(tmp_path / ".model.reap-replaced-00000000", "old")
    assert content(resolve_folder(tmp_path / "model")) == "old"
    assert hidden(tmp_path) == []


def test_leaks_of_earlier_versions_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "model"
    fill(out, "new")
    fill(tmp_path / ".model.reap-replaced-abc_1234", "old")
    assert len(clean_stale(out)) == 1
    assert (content(out), hidden(tmp_path)) == ("new", [])


def test_without_locks_nothing_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    aside = tmp_path / ".model.reap-replaced-00000000"
    fill(aside, "old")
    with pytest.raises(CheckpointError, match=rf"model: a run was killed.*complete in {aside}"):
        clean_stale(tmp_path / "model")
    fill(tmp_path / "model", "new")
    assert clean_stale(tmp_path / "model") == []
    assert content(aside) == "old"


@pytest.mark.parametrize("name", ["m*", "m[1]", "m?", "[!a]", "m", "m\nn", "m.reap-partial"])
def test_leftovers_of_other_names_are_left_alone(name: str, tmp_path: Path) -> None:
    others = ["m1", "mx", "m.reap-partial-abcdefgh", "m", "m*", "m[1]", "m?", "b", "m\nn"]
    for other in {name, *others}:
        for kind in ("partial", "replaced"):
            fill(tmp_path / f".{other}.reap-{kind}-abcdefgh", other)
    fill(tmp_path / name, "there")
    removed = sorted(path.name for path in clean_stale(tmp_path / name))
    assert removed == [f".{name}.reap-{kind}-abcdefgh" for kind in ("partial", "replaced")]
    assert len(hidden(tmp_path)) == 2 * len({name, *others}) - 2


def test_locks_of_runs_killed_before_they_had_a_folder_are_removed(tmp_path: Path) -> None:
    for name in ("model", "other"):
        (tmp_path / f".{name}.reap-lock-abcdefgh").touch()
    assert clean_stale(tmp_path / "model") == []
    assert hidden(tmp_path) == [".other.reap-lock-abcdefgh"]


def test_scratch_of_killed_runs_is_removed_and_of_others_left(tmp_path: Path) -> None:
    """What a device map puts on the disk lies there."""
    out = tmp_path / "m*"
    for name in ("m*", "m1"):
        fill(tmp_path / f".{name}.reap-scratch-abcdefgh", "weights")
    with scratch(out) as first, scratch(out) as second:
        (first / "x").touch()
        assert {first.name, second.name} < set(hidden(tmp_path))
        assert len([name for name in hidden(tmp_path) if "-lock-" not in name]) == 3
    assert hidden(tmp_path) == [".m1.reap-scratch-abcdefgh"]


def test_leftovers_that_cannot_be_removed_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    fill(tmp_path / ".model.reap-partial-abcdefgh", "somebody's")
    monkeypatch.setattr(staging.shutil, "rmtree", refuse)
    assert clean_stale(tmp_path / "model") == []


def test_old_one_that_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new checkpoint is there; that the old one is too is said, and no error."""
    full, out = tmp_path / "full", tmp_path / "out"
    saved.save("mixtral", full)
    plan = saved.make_plan(full, meta_model(load_config(full)))
    fill(out, "old")
    removed = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        if ".out.reap-" not in str(path):
            removed(path, ignore_errors, **options)
        elif not ignore_errors:
            raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(staging.shutil, "rmtree", refuse)
    [*_, warning] = apply_plan(full, plan, out, overwrite=True).warnings
    [left] = hidden(tmp_path)
    assert f"cannot be removed; it is in {tmp_path / left}" in warning
    assert content(tmp_path / left) == "old"


def test_record_is_there_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, out = tmp_path / "full", tmp_path / "out"
    saved.save("mixtral", full)
    plan = saved.make_plan(full, meta_model(load_config(full)))
    whole: list[dict[str, Any]] = []

    def seen(folder: Path, target: Path, *, overwrite: bool) -> Path | None:
        whole.append(saved.snapshot(folder))
        return publish(folder, target, overwrite=overwrite)

    monkeypatch.setattr(apply, "publish", seen)
    report = apply_plan(full, plan, out, stats=SaliencyStats({}, ["default"]))
    assert whole == [saved.snapshot(out)]
    assert {"reap/plan.json", "reap/stats.safetensors"} <= whole[0].keys()
    assert report.bytes_written == sum(len(data) for data, _ in whole[0].values())


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """nohup has its process ignore SIGHUP."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with staged(tmp_path / "out", needed=0) as folder:
        fill(folder, "new")
        signal.raise_signal(signal.SIGHUP)
        publish(folder, tmp_path / "out", overwrite=False)
    assert content(tmp_path / "out") == "new"
