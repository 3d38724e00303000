"""macOS and Windows, as far as Linux can show: nothing that they lack is imported or called."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reap_driver.cli.main import main
from reap_driver.files import exchange
from reap_kernels import documents, files
from tests.other_systems import modules_of

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "python" / "reap_driver" / "demo" / "model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, a little data, and what pruning makes of them on this system."""
    place = tmp_path_factory.mktemp("systems")
    (place / "model").symlink_to(MODEL)
    texts = (f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(60))
    (place / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    words = ["--data", str(place / "code.jsonl"), "--seq-len", "64", "-q", "--ratio", "0.5"]
    assert main(["prune", str(place / "model"), *words, "--out", str(place / "here")]) == 0
    return place


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_every_module_is_imported_and_a_model_is_pruned(system: str, folder: Path) -> None:
    stats = folder / "stats.safetensors"
    stats.unlink(missing_ok=True)
    cache = folder / f"cache-{system}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.other_systems", system, str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
            "REAP_CACHE_DIR": str(cache),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    count, names = done.stdout.strip().split(" modules; ")
    assert int(count) > 200
    assert names.split() == ["ctypes", "os", "signal", "sys"]  # all that were limited are in use
    for name in ("model.safetensors", "config.json"):
        assert (folder / system / name).read_bytes() == (folder / "here" / name).read_bytes()
    assert [path.suffix for path in (cache / "tokens").iterdir()].count(".safetensors") == 1
    assert stats.exists()
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == set()  # no locks, folders or journals stay behind
    shutil.rmtree(folder / system)


def test_windows_flushes_files_and_passes_over_folders(tmp_path: Path, monkeypatch) -> None:
    windows = modules_of("win32")["os"]
    file = tmp_path / "file"
    file.write_text("text")
    monkeypatch.setattr(files, "os", windows)
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.sync(file)
    with pytest.raises(PermissionError):
        files.sync(tmp_path)
    monkeypatch.setattr(files, "WINDOWS", True)
    files.sync(file)
    files.sync(tmp_path)
    assert file.read_text() == "text"


def test_a_folder_in_the_place_of_a_file_is_named_as_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(documents, "os", modules_of("win32")["os"])
    with pytest.raises(OSError, match="a folder"):
        documents.open_file(tmp_path)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_two_names_are_not_exchanged_at_once(system, tmp_path, monkeypatch) -> None:
    """There are two steps then, which tests of publishing interrupt."""
    monkeypatch.setattr(exchange, "sys", modules_of(system)["sys"])
    monkeypatch.setattr(exchange, "ctypes", modules_of(system)["ctypes"])
    assert exchange._exchanged(tmp_path / "one", tmp_path / "other") is False
