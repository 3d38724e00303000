"""The digest of a checkpoint's weights: which changes it detects, and which not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.files.checkpoint import open_checkpoint
from reap_driver.files.digest import weights_digest
from tests.driver.writer import saved

_SAMPLE = 64 << 10


def digest(folder: Path) -> str:
    return weights_digest(open_checkpoint(folder))


def large() -> dict[str, Tensor]:
    """Data of three samples and a half."""
    rng = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(_SAMPLE // 4, generator=rng),
        "b": torch.randn(_SAMPLE // 4, 2, generator=rng).half(),
        "c": torch.randn(_SAMPLE // 4 + _SAMPLE // 8, generator=rng),
    }


def write(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", large())


def test_copy_of_the_folder_is_equal(folder: Path, tmp_path: Path) -> None:
    """The same for a copy at another place and time; other files do not matter."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"other": 1}')
    assert digest(tmp_path / "copy") == digest(folder)
    assert digest(folder).startswith("sha256:")
    assert len(digest(folder)) == len("sha256:") + 64


def test_other_training_of_the_architecture_differs(tmp_path: Path) -> None:
    for name in ("first", "second"):
        saved.save("qwen3_moe", tmp_path / name)
    assert digest(tmp_path / "first") == digest(tmp_path / "second")  # the zoo's seed
    saved.change_tensors(
        tmp_path / "second", lambda tensors: {k: t + t.abs() / 256 for k, t in tensors.items()}
    )
    assert digest(tmp_path / "first") != digest(tmp_path / "second")


def flip(path: Path, place: int) -> None:
    """Changes one bit of a byte of the data, counted from its start or end."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start + place if place >= 0 else place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 1, _SAMPLE - 1, -1, -2, -_SAMPLE])
def test_a_byte_of_the_first_and_last_64_kib_differs(place: int, folder: Path) -> None:
    before = digest(folder)
    flip(folder / "model.safetensors", place)
    assert digest(folder) != before


@pytest.mark.parametrize("place", [_SAMPLE, -_SAMPLE - 1])
def test_a_byte_between_does_not(place: int, folder: Path) -> None:
    """As documented, not everything is read."""
    before = digest(folder)
    flip(folder / "model.safetensors", place)
    assert digest(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda ts: {k.replace("b", "bb"): t for k, t in ts.items()},
        lambda ts: {**ts, "b": ts["b"].view(2, -1)},
        lambda ts: {**ts, "b": ts["b"].view(torch.bfloat16)},
        lambda ts: {**ts, "c": ts["c"][:-1].clone()},
        lambda ts: {**ts, "d": torch.empty(0)},
    ],
    ids=["name", "shape", "dtype", "shorter", "one more"],
)
def test_other_names_shapes_and_dtypes_differ(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], folder: Path, tmp_path: Path
) -> None:
    """With the same bytes of data."""
    assert digest(write(tmp_path / "other", change(large()))) != digest(folder)


def test_tensors_that_change_places_differ(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.zeros(4)}
    first = digest(write(tmp_path / "first", tensors))
    assert digest(write(tmp_path / "second", {"a": tensors["b"], "b": tensors["a"]})) != first


def test_other_shards_differ(tmp_path: Path) -> None:
    """The same tensors in other shards have another digest, because samples are per file."""
    saved.save("qwen3_moe", tmp_path / "model")
    found = {digest(tmp_path / "model")}
    for parts in (2, 3):
        shutil.copytree(tmp_path / "model", tmp_path / str(parts))
        saved.shard(tmp_path / str(parts), parts)
        found.add(digest(tmp_path / str(parts)))
    assert len(found) == 3


def test_small_and_empty_files(tmp_path: Path) -> None:
    """Less than a sample, and no data at all."""
    small = digest(write(tmp_path / "small", {"a": torch.ones(1)}))
    assert small != digest(write(tmp_path / "other", {"a": torch.zeros(1)}))
    empty = digest(write(tmp_path / "empty", {"a": torch.empty(0)}))
    assert empty not in (small, digest(write(tmp_path / "empty2", {"b": torch.empty(0)})))


def test_last_shard_counts(tmp_path: Path) -> None:
    """Every file is sampled, not the first alone."""
    saved.save("qwen3_moe", tmp_path / "model")
    saved.shard(tmp_path / "model", 3)
    before = digest(tmp_path / "model")
    flip(tmp_path / "model" / "model-00003-of-00003.safetensors", -1)
    assert digest(tmp_path / "model") != before
