"""What happens to a running command from outside: signals, full disks, files that are replaced,
environments and terminals that are not as usual."""

import errno
import io
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reap_driver.cli.main import main
from reap_driver.workflow import calibration, compare, observe, prune, search_data
from reap_kernels import files
from tests.driver.cli.conftest import Run
from tests.driver.writer import saved

WRITING = {
    "observe": "observe model --data code.jsonl --no-journal --out new.safetensors",
    "observe, journal": "observe model --data code.jsonl --out new.safetensors",
    "plan": "plan stats.safetensors --out new.json",
    "report": "report stats.safetensors plan.json --out new",
    "apply": "apply model plan.json --out new",
    "masks": "apply model plan.json --as-masks new.safetensors",
    "search": "search model stats.safetensors --data more.jsonl --evaluations 8 --population 6"
    " --elites 2 --seq-len 16 --out new.json",
}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """As a shell in the foreground hands them on: a run in its background ignores some."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in numbers[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def measured(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics and a plan of the plain model."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "code.jsonl").write_text('{"text": "def add(a, b): return a + b"}\n' * 40)
    model, stats = str(originals["plain"]), str(folder / "stats.safetensors")
    data = str(folder / "code.jsonl")
    assert main(["observe", model, "--data", data, "--seq-len", "16", "--out", stats, "-q"]) == 0
    assert main(["plan", stats, "--out", str(folder / "plan.json"), "-q"]) == 0
    return folder


@pytest.fixture
def place(model: Path, data: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, data, statistics and a plan, in which commands run."""
    folder = model.parent
    for name in ("stats.safetensors", "plan.json"):
        (folder / name).write_bytes((measured / name).read_bytes())
    (folder / "more.jsonl").write_bytes((measured / "code.jsonl").read_bytes())
    monkeypatch.chdir(folder)
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def at_the_last_step(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], None]) -> None:
    """Something happens when a complete file is flushed, before it gets its name."""
    monkeypatch.setattr(files, "sync", lambda _: happens())


@pytest.mark.parametrize(
    ("command", "number"),
    [
        *((command, signal.SIGTERM) for command in WRITING),
        *(("plan", number) for number in (signal.SIGHUP, signal.SIGINT)),
        *(("apply", number) for number in (signal.SIGHUP, signal.SIGINT)),
    ],
)
def test_signals_end_every_command_and_leave_nothing(
    run: Run, place: Path, command: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what it can be resumed from, and a report's empty folder."""
    before = listing(place)
    at_the_last_step(monkeypatch, lambda: signal.raise_signal(number))
    done = run(*WRITING[command].split())
    assert done.code == 128 + number
    assert "no half-written output is left behind" in done.error or "journal" in command
    resumable = ("new.safetensors.journal", "new.json.search")
    left = [name for name in listing(place) if name != "new" and not name.startswith(resumable)]
    assert left == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ranks_that_torchrun_ends_are_silent(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the rank that failed has something to say."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    at_the_last_step(monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
    done = run(*WRITING["plan"].split())
    assert (done.code, done.err) == (143, "")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        *((command, errno.ENOSPC) for command in WRITING if "journal" not in command),
        *(("plan", code) for code in (errno.EDQUOT, errno.EIO, errno.EROFS)),
        *(("apply", code) for code in (errno.EDQUOT, errno.EIO, errno.EROFS)),
    ],
)
def test_disk_errors_name_the_file(
    run: Run, place: Path, command: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the system does not."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    before = listing(place)
    at_the_last_step(monkeypatch, fail)
    done = run(*WRITING[command].split())
    assert done.code == (4 if code in files.NO_SPACE else 3)
    assert os.strerror(code) in done.error
    assert "new" in done.error.partition(os.strerror(code))[0]
    assert ".tmp" not in done.error
    assert [name for name in listing(place) if name != "new"] == before


@pytest.mark.parametrize(
    "words",
    [
        "observe model --data code.jsonl --out new --stream always",
        "observe model --data code.jsonl --out new --stream never --no-journal",
        "prune model --data code.jsonl --out new",
        "search model stats.safetensors --data more.jsonl --seq-len 16 --out new",
        "compare model model --data code.jsonl --stream never",
        "compare model model --data code.jsonl --stream always",
    ],
)
def test_a_shard_replaced_while_data_is_read(
    run: Run, place: Path, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = calibration.read_data

    def replaced(*args: Any) -> Any:
        swap(place)
        return read(*args)

    for job in (observe, compare, search_data):
        monkeypatch.setattr(job, "read_data", replaced)
    done = run(*words.split())
    assert done.code == 3
    assert "safetensors: changed after it was inspected (another file has its name" in done.error
    assert not (place / "new").exists()


def test_a_shard_replaced_between_observing_and_writing(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = prune._planned

    def replaced(*args: Any) -> Any:
        swap(place)
        return planned(*args)

    monkeypatch.setattr(prune, "_planned", replaced)
    done = run("prune", "model", "--data", "code.jsonl", "--out", "new")
    assert done.code == 3
    assert "changed after it was inspected" in done.error
    assert not (place / "new").exists()


def swap(place: Path) -> None:
    """A shard is replaced by a copy."""
    [path, *_] = sorted((place / "model").glob("*.safetensors"))
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)


def test_a_source_that_cannot_be_read(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no matter of where the output goes."""
    opened = Path.open

    def refuse(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "tokenizer.json" and args[:1] == ("rb",) and (place / "held").exists():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **options)

    checked = saved.snapshot(place / "model")
    monkeypatch.setattr(Path, "open", refuse)
    from reap_driver.writer import apply as writer

    copied = writer.write_shards

    def revoked(*args: Any) -> Any:
        (place / "held").touch()
        return copied(*args)

    monkeypatch.setattr(writer, "write_shards", revoked)
    done = run("apply", "model", "plan.json", "--out", "new")
    assert done.code == 3
    assert "tokenizer.json: cannot be read (Permission denied); check the file" in done.error
    monkeypatch.undo()
    assert saved.snapshot(place / "model") == checked


@pytest.mark.parametrize("value", ["x", "", "-1", "1e3", "2"])
def test_world_size_in_errors(run: Run, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """The printer of errors does not fail itself."""
    monkeypatch.setenv("WORLD_SIZE", value)
    done = run("plan", "nowhere.safetensors", "--out", "/nowhere/plan.json")
    assert done.code == 3
    assert "nowhere" in done.error


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_an_environment_of_words(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    known = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for variable, value in {**known, "MASTER_ADDR": "localhost", name: "x"}.items():
        monkeypatch.setenv(variable, value)
    done = run("observe", "model", "--data", "code.jsonl", "--out", "new")
    assert done.code == 3
    assert f"{name}='x': must be an integer" in done.error


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_stdout_that_cannot_write_a_name(
    place: Path, encoding: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["plan", "stats.safetensors", "--out", "plän-\u732b.json", *more]) == 0
    assert (place / "plän-\u732b.json").is_file()
    said = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "pl" in said
    assert "Traceback" not in said


def test_names_that_no_file_records(run: Run, place: Path) -> None:
    """A name of bytes that are no UTF-8 would end in files that cannot be read again."""
    name = os.fsdecode(b"out-\xff")
    done = run("plan", "stats.safetensors", "--out", name)
    assert (done.code, list(place.glob("out*"))) == (2, [])
    assert "'out-\\udcff': its bytes are no UTF-8 text" in done.err


def test_terminals_are_not_commanded(run: Run, place: Path) -> None:
    """By characters in names from elsewhere, in results, notes and errors."""
    done = run("plan", "stats.safetensors", "--out", "new-\x1b[31m.json")
    assert "new-\\x1b[31m.json" in done.out
    assert "\x1b" not in done.out + done.err
    assert "\x1b" not in run("plan", "no-\x1b[31m", "--out", "x").err


ALL = {
    **{name: line for name, line in WRITING.items() if name != "report"},  # it draws for seconds
    "prune": "prune model --data code.jsonl --out new --stats new.safetensors",
    "compare": "compare model plan.json --data more.jsonl --seq-len 16 --draws 10",
    "dry run": "observe model --data code.jsonl --dry-run",
}
# Events of Python's audit hooks that change files, and which of their arguments are paths.
_CHANGES = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "shutil.rmtree": 1}
_CHANGES |= {"os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1, "os.utime": 1}
_watching: list[tuple[str, str]] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Notes what is opened or changed, and what unpickling asks for; an audit hook stays."""
    if not _watching:
        return
    if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        changing = args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        _watching.append(("write" if changing else "read", os.fsdecode(args[0])))
    elif event == "pickle.find_class":
        _watching.append((event, f"{args[0]}.{args[1]}"))
    elif event in _CHANGES:
        paths = [os.fsdecode(arg) for arg in args[: _CHANGES[event]] if not isinstance(arg, int)]
        folder = args[-1] if isinstance(args[-1], int) else -1  # what they are relative to
        place = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
        _watching.extend(("write", os.path.join(place, path)) for path in paths)


@pytest.fixture
def watched(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What happens to files, with a user's folders inside `place`."""
    for name in ("TMPDIR", "REAP_CACHE_DIR"):
        (place / "user" / name).mkdir(parents=True)
        monkeypatch.setenv(name, str(place / "user" / name))
    monkeypatch.setattr(tempfile, "tempdir", None)
    if watch not in _hooked:
        _hooked.append(watch)
        sys.addaudithook(watch)
    _watching.append(("begin", ""))
    yield _watching
    _watching.clear()


_hooked: list[Any] = []
PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "a.pkl")


@pytest.mark.parametrize("command", ALL)
def test_files_are_written_where_they_belong_and_no_pickle_is_opened(
    run: Run, place: Path, command: str, watched: list[tuple[str, str]]
) -> None:
    """In the output, beside it under hidden names, and in the user's cache and temporary folder."""
    for name in PICKLES:
        (place / "model" / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    untouched = {path: saved.snapshot(place / path) for path in ("model",)}
    watched.clear()
    watched.append(("begin", ""))
    assert run(*ALL[command].split()).code == 0
    happened = list(watched)
    watched.clear()
    assert {path: saved.snapshot(place / path) for path in untouched} == untouched
    allowed = re.compile(rf"({place}/)?(\.?new|user/)|/dev/|/proc/|.*/__pycache__|{place}$")
    written = {path for what, path in happened if what == "write"}
    assert [path for path in sorted(written) if not allowed.match(path)] == []
    read = {Path(path).name for what, path in happened if what == "read"}
    assert not read & set(PICKLES)
    assert [what for what in happened if what[0] == "pickle.find_class"] == []
    assert not [path for path in (place / "new").rglob("*") if path.name in PICKLES]
