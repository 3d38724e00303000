"""A model in the hub's cache: a snapshot folder of symbolic links into a folder of blobs. The
output is an ordinary folder, and the cache stays as it is."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from reap_driver.compat.model_config import load_config
from reap_driver.compat.pretrained import meta_model
from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.planning.plan import Plan
from reap_driver.writer.apply import apply_plan
from reap_kernels.errors import CheckpointError
from tests.driver.writer import saved

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def full(tmp_path: Path) -> Path:
    saved.save("qwen3_moe", tmp_path / "full")
    saved.shard(tmp_path / "full", 3)
    (tmp_path / "full" / "tokenizer.json").write_text("{}")
    (tmp_path / "full" / "templates").mkdir()
    (tmp_path / "full" / "templates" / "tools.jinja").write_text("{{ x }}")
    return tmp_path / "full"


@pytest.fixture
def plan(full: Path) -> Plan:
    return saved.make_plan(full, meta_model(load_config(full)))


@pytest.fixture
def snapshot(full: Path, tmp_path: Path) -> Path:
    """`full` as huggingface_hub stores it; relative links, blobs named by content."""
    model = tmp_path / "hub" / "models--acme--tiny"
    folder = model / "snapshots" / REVISION
    for name in ("blobs", "refs", "snapshots"):
        (model / name).mkdir(parents=True)
    (model / "refs" / "main").write_text(REVISION)
    for path in full.rglob("*"):
        if path.is_file():
            blob = model / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.write_bytes(path.read_bytes())
            blob.chmod(0o444)
            link = folder / path.relative_to(full)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def everything(folder: Path) -> dict[str, tuple[str, object]]:
    """Every entry below a folder: links by target, files by content and time."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        elif path.is_file():
            status = path.stat()
            found[name] = ("file", (path.read_bytes(), status.st_mtime_ns, status.st_mode))
        else:
            found[name] = ("folder", None)
    return found


def assert_same_output(left: Path, right: Path) -> None:
    """Equal names and bytes, but for the card, which names the source."""
    one, other = saved.snapshot(left), saved.snapshot(right)
    assert one.keys() == other.keys()
    assert all(one[name][0] == other[name][0] for name in one if name != "README.md")


def test_output_is_an_ordinary_folder(
    full: Path, plan: Plan, snapshot: Path, tmp_path: Path
) -> None:
    cache = snapshot.parents[2]
    before = everything(cache)
    apply_plan(full, plan, tmp_path / "direct")
    apply_plan(snapshot, plan, tmp_path / "linked")
    assert_same_output(tmp_path / "direct", tmp_path / "linked")
    entries = list((tmp_path / "linked").rglob("*"))
    assert not [path for path in entries if path.is_symlink()]
    files = [path.stat() for path in entries if path.is_file()]
    assert all(status.st_mode & 0o200 and status.st_nlink == 1 for status in files)
    assert everything(cache) == before


def test_hub_id_is_found_in_the_cache(
    full: Path, plan: Plan, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(snapshot.parents[2]))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    report = apply_plan("acme/tiny", plan, tmp_path / "by-id")
    assert report.source == snapshot
    apply_plan(full, plan, tmp_path / "direct")
    assert_same_output(tmp_path / "direct", tmp_path / "by-id")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors.index.json",
        "model-00002-of-00003.safetensors",
        "tokenizer.json",
        "templates/tools.jinja",
    ],
)
def test_link_to_a_deleted_blob_is_refused(
    name: str, plan: Plan, snapshot: Path, tmp_path: Path
) -> None:
    (snapshot / name).resolve().unlink()
    before = everything(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        apply_plan(snapshot, plan, tmp_path / "pruned")
    message = str(caught.value)
    assert message.startswith(f"{snapshot / name}: a symbolic link to ")
    assert os.readlink(snapshot / name) in message
    assert "download the file again, or remove the link" in message
    assert everything(tmp_path) == before


def test_dangling_links_of_hidden_folders_do_not_matter(
    plan: Plan, snapshot: Path, tmp_path: Path
) -> None:
    (snapshot / ".cache").mkdir()
    (snapshot / ".cache" / "lock").symlink_to("nowhere")
    apply_plan(snapshot, plan, tmp_path / "pruned")
    assert not (tmp_path / "pruned" / ".cache").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_inside_the_snapshot_is_refused(
    plan: Plan, snapshot: Path, tmp_path: Path, overwrite: bool
) -> None:
    """Also by way of a link to the snapshot, on either side."""
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    before = everything(tmp_path)
    for source, out in (
        (snapshot, snapshot / "pruned"),
        (snapshot, link / "pruned"),
        (link, snapshot / "pruned"),
        (link, snapshot),
    ):
        with pytest.raises(CheckpointError, match="is the source or inside it"):
            apply_plan(source, plan, out, overwrite=overwrite)
    assert everything(tmp_path) == before


def test_link_as_output_is_refused(plan: Plan, snapshot: Path, tmp_path: Path) -> None:
    """What a link leads to is not replaced, whether it exists or not."""
    (tmp_path / "elsewhere").mkdir()
    for target in ("elsewhere", "nowhere"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        before = everything(tmp_path)
        with pytest.raises(CheckpointError, match="link: exists"):
            apply_plan(snapshot, plan, tmp_path / "link")
        with pytest.raises(CheckpointError, match="link: is not a folder"):
            apply_plan(snapshot, plan, tmp_path / "link", overwrite=True)
        assert everything(tmp_path) == before


def fifo(path: Path, _: Path) -> None:
    os.mkfifo(path)


def device(path: Path, _: Path) -> None:
    path.symlink_to("/dev/zero")


def outside(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere / "private.txt")


def folder_outside(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere, target_is_directory=True)


def through_a_link_inside(path: Path, elsewhere: Path) -> None:
    path.with_name(".hidden").symlink_to(elsewhere / "private.txt")
    path.symlink_to(".hidden")


@pytest.mark.parametrize("make", [fifo, device, outside, folder_outside, through_a_link_inside])
@pytest.mark.parametrize("name", ["tokenizer.model", "templates/new.jinja"])
def test_what_is_no_file_of_the_checkpoint_is_not_copied(
    full: Path, plan: Plan, tmp_path: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    """A link would publish a file of this machine, a pipe would never end."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "private.txt").write_text("secret")
    make(full / name, elsewhere)
    says = (
        "neither a file nor a folder"
        if make is fifo
        else "a symbolic link to .*, no file of this checkpoint"
    )
    with pytest.raises(CheckpointError, match=rf"{name}: is {says}, so it is not copied; put a"):
        apply_plan(full, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert open_checkpoint(full).tensors  # which can be observed


def test_links_inside_and_hidden_files(full: Path, plan: Plan, tmp_path: Path) -> None:
    (full / "vocab.txt").symlink_to("tokenizer.json")
    for name in (".env", "templates/.netrc"):
        (full / name).write_text("secret")
    report = apply_plan(full, plan, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "{}"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert report.left_out == [".env", "templates/.netrc"]
    assert list((tmp_path / "out").rglob(".*")) == []


def test_a_blob_that_leads_out_of_the_cache(snapshot: Path, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("secret")
    blob = snapshot.parents[1] / "blobs" / "planted"
    blob.symlink_to(tmp_path / "private.txt")
    (snapshot / "vocab.txt").symlink_to("../../blobs/planted")
    with pytest.raises(
        CheckpointError, match=r"vocab\.txt: is a symbolic link to \.\./\.\./blobs/pl"
    ):
        apply_plan(snapshot, plan, tmp_path / "out")
