"""Files of the source that are replaced while it is read: one error that names the file, and no
output, whichever file it is and however it was replaced."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.evaluation.audit import check_permutation
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.fingerprints import Fingerprints
from reap_driver.load.resident import load_model
from reap_driver.load.streamed_model import open_streamed
from reap_driver.observation import streamed as streaming
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import CheckpointError
from tests.driver.writer import saved

Change = Callable[[Path], None]
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
OTHERS = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
SAYS = r": changed after it was inspected \(.*start again"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "full"
    saved.save("mixtral", folder)
    saved.shard(folder, 3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def full(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "full"))


@pytest.fixture
def plan(original: Path) -> Plan:
    return saved.make_plan(original, meta_model(load_config(original)))


def other_bytes(path: Path) -> bytes:
    """As many, the last of them another; text stays text."""
    content = bytearray(path.read_bytes())
    content[-1] = 0x20 if content[-1] != 0x20 else 0x0A
    return bytes(content)


def swapped(path: Path) -> None:
    """Another file of equal size and times gets the name."""
    stat = path.stat()
    new = path.with_name("new")
    new.write_bytes(other_bytes(path))
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.rename(path)


def rewritten(path: Path) -> None:
    """In place, with as many bytes; never shorter, for others may be reading it."""
    content = other_bytes(path)
    with path.open("r+b") as file:
        file.write(content)


def backdated(path: Path) -> None:
    """In place, with as many bytes and the old time: seen where it changes a header."""
    stat = path.stat()
    content = path.read_bytes()
    assert content.count(b"F32") > 0
    path.write_bytes(content.replace(b"F32", b"I32"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CASES = [
    *[
        (name, change)
        for name in (SHARDS[0], *OTHERS)
        for change in (swapped, rewritten, Path.unlink)
    ],
    (SHARDS[2], backdated),
]


@pytest.mark.parametrize(("name", "change"), CASES)
def test_pins(full: Path, name: str, change: Change) -> None:
    source = open_checkpoint(full)
    source.fingerprints.check()
    change(full / name)
    said = "cannot be read" if change is Path.unlink else SAYS
    with pytest.raises(CheckpointError, match=f"{name}.*{said}"):
        source.fingerprints.check()


@pytest.mark.parametrize("change", [swapped, rewritten])
def test_seen_when_opened_though_it_is_back_at_the_end(full: Path, change: Change) -> None:
    source = open_checkpoint(full)
    shutil.copy2(full / SHARDS[1], full / "kept")
    change(full / SHARDS[1])
    with pytest.raises(CheckpointError, match=SAYS):
        source.fingerprints.open(full / SHARDS[1])
    assert source.fingerprints.open(full / SHARDS[0]).read(8)


def test_only_what_was_inspected_is_checked(full: Path) -> None:
    source = open_checkpoint(full)
    (full / "README.md").write_text("new")
    (full / "new.txt").write_text("new")
    source.fingerprints.check()
    assert Fingerprints().open(full / "new.txt").read() == b"new"


@pytest.mark.parametrize("name", [SHARDS[0], SHARDS[2], *OTHERS])
@pytest.mark.parametrize("change", [swapped, rewritten])
def test_apply(full: Path, plan: Plan, tmp_path: Path, name: str, change: Change) -> None:
    """In the middle of writing: some shards are open already, some not."""
    pending = [change]

    def progress(*_: int) -> None:
        if pending:
            pending.pop()(full / name)

    with pytest.raises(CheckpointError, match=name + SAYS):
        apply_plan(full, plan, tmp_path / "out", progress=progress, threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


@pytest.mark.parametrize("name", [*SHARDS, *OTHERS])
def test_streamed(full: Path, name: str) -> None:
    def read() -> None:
        with open_streamed(full) as streamed:
            streamed.ready(0)
            swapped(full / name)
            for layer in range(1, len(streamed.layers)):
                streamed.ready(layer)

    with pytest.raises(CheckpointError, match=name + SAYS):
        read()


def test_streamed_statistics(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    observed = streaming.run_streamed

    def replaced(run: object, streamed: object, store: object) -> None:
        observed(run, streamed, store)
        swapped(full / SHARDS[1])

    monkeypatch.setattr(streaming, "run_streamed", replaced)
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    with pytest.raises(CheckpointError, match=SHARDS[1] + SAYS):
        streaming.observe_streamed(full, [batch])


@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_loaded_whole(full: Path, device_map: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from reap_driver.load import resident, streamed_model

    checked = resident.check_loading

    def replaced(*args: object) -> None:
        checked(*args)
        rewritten(full / SHARDS[0])

    for module in (resident, streamed_model):
        monkeypatch.setattr(module, "check_loading", replaced)
    with pytest.raises(CheckpointError, match=SHARDS[0] + SAYS):
        load_model(full, device_map=device_map)


def test_permutation(full: Path, plan: Plan, tmp_path: Path, monkeypatch) -> None:
    """Either of the two that are compared."""
    from reap_driver.evaluation import audit as permutation

    out = tmp_path / "out"
    apply_plan(full, plan, out)
    spread = permutation._spread
    for folder in (full, out):
        name = sorted(folder.glob("*.safetensors"))[0]

        def replaced(total: int, sample: int | None, name: Path = name):
            rewritten(name)
            return spread(total, sample)

        monkeypatch.setattr(permutation, "_spread", replaced)
        with pytest.raises(CheckpointError, match=f"{name}{SAYS}"):
            check_permutation(full, out, plan)
