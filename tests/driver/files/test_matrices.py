"""Folders of matrices: written layer by layer, resumed, and every way one can be wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reap_driver.files.matrices import INDEX, Matrices, folder_beside, holds_matrices
from reap_kernels.errors import PlanError

NAMES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
MODEL = {"id": "m", "config_digest": "sha256:0"}


def down(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(folder: Path, dtype: torch.dtype = torch.float32) -> Matrices:
    matrices = Matrices.create(folder, model=MODEL, run={"seed": 0})
    for seed, name in enumerate(NAMES):
        matrices.put(name, down(seed, dtype))
    return matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    wrote = made(tmp_path / "plan.matrices", dtype)
    read = Matrices.open(tmp_path / "plan.matrices")
    for matrices in (wrote, read):
        assert list(matrices) == list(NAMES)
        assert matrices.layers == dict.fromkeys(NAMES, (3, 4, 2))
        assert (matrices.model, matrices.kind, matrices.run) == (MODEL, "width", {"seed": 0})
        assert "other" not in matrices
        for seed, name in enumerate(NAMES):
            assert torch.equal(matrices[name], down(seed, dtype))
            assert matrices.dtype(name) == dtype
    assert wrote.digest == read.digest
    assert repr(read).startswith("Matrices: 2 layers in ")
    others = load_file(tmp_path / "plan.matrices" / f"{NAMES[0]}.safetensors")
    assert torch.equal(others["down"], down(0, dtype))  # for a reader that knows no more


def test_equal_content_has_one_digest(tmp_path: Path) -> None:
    assert made(tmp_path / "a").digest == made(tmp_path / "b").digest
    changed = Matrices.open(tmp_path / "b")
    changed.put(NAMES[1], down(7))
    assert changed.digest != Matrices.open(tmp_path / "a").digest
    assert changed.digest == Matrices.open(tmp_path / "b").digest
    assert torch.equal(changed[NAMES[1]], down(7))


def test_what_was_written_is_resumed(tmp_path: Path) -> None:
    first = Matrices.create(tmp_path / "m", model=MODEL, kind="refit", run={"seed": 0})
    first.put(NAMES[0], down(0))
    again = Matrices.create(tmp_path / "m", model=MODEL, kind="refit", run={"seed": 0}, resume=True)
    assert list(again) == [NAMES[0]]
    again.put(NAMES[1], down(1))
    assert list(Matrices.open(tmp_path / "m")) == list(NAMES)
    for field, other in (("model", {"id": "n"}), ("kind", "width"), ("run", {"seed": 1})):
        asked = {"model": MODEL, "kind": "refit", "run": {"seed": 0}, field: other}
        with pytest.raises(PlanError, match=f"has matrices of another {field}"):
            Matrices.create(tmp_path / "m", resume=True, **asked)
    with pytest.raises(PlanError, match="exists already"):
        Matrices.create(tmp_path / "m", model=MODEL)


def test_a_killed_write_leaves_the_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = made(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        matrices.put(NAMES[0], down(5))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    assert torch.equal(Matrices.open(tmp_path / "m")[NAMES[0]], down(0))


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("../x", down(0), "names no layer"),
        ("x" * 300, down(0), "names no layer"),
        ("x", down(0)[0], r"x: down is torch.float32 \[4, 2\]; give floating point"),
        ("x", down(0).long(), "x: down is torch.int64"),
        ("x", down(0)[:0], r"\[0, 4, 2\]"),
        ("x", down(0) * float("inf"), "x: down has values that are not finite"),
    ],
)
def test_what_is_no_layer_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, says: str
) -> None:
    matrices = Matrices.create(tmp_path / "m", model=MODEL)
    with pytest.raises(PlanError, match=says):
        matrices.put(name, tensor)
    assert [path.name for path in (tmp_path / "m").iterdir()] == [INDEX]


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no matrices of layer 'other', only of 2 others"):
        made(tmp_path / "m")["other"]


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"m/{INDEX} cannot be read \(No such file"):
        Matrices.open(tmp_path / "m")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    with pytest.raises(PlanError, match="foreign: exists already"):
        Matrices.create(tmp_path / "foreign", model=MODEL)
    with pytest.raises(PlanError, match="No such file"):
        Matrices.create(tmp_path / "foreign", model=MODEL, resume=True)
    assert not holds_matrices(tmp_path / "foreign")
    made(tmp_path / "m")
    assert holds_matrices(tmp_path / "m")
    index = tmp_path / "m" / INDEX
    content = json.loads(index.read_text())
    content["layers"][NAMES[0]]["shape"] = [3, 4, 3]
    index.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="is damaged: its content has another digest"):
        Matrices.open(tmp_path / "m")


def test_files_of_layers_are_checked(tmp_path: Path) -> None:
    read = made(tmp_path / "m")
    first, second = (tmp_path / "m" / f"{name}.safetensors" for name in NAMES)
    whole = first.read_bytes()
    first.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PlanError, match="is damaged"):
        read[NAMES[0]]
    first.write_bytes(whole[:-2])
    with pytest.raises(PlanError, match=r"experts.safetensors cannot be read"):
        read[NAMES[0]]
    first.write_bytes(second.read_bytes())
    with pytest.raises(PlanError, match=f"is another file than {INDEX} names"):
        read[NAMES[0]]
    save_file({"down": down(0)}, first)
    with pytest.raises(PlanError, match="is not a file of matrices"):
        read[NAMES[0]]
    first.unlink()
    with pytest.raises(PlanError, match="No such file"):
        read[NAMES[0]]


def test_a_plan_finds_its_folder() -> None:
    assert folder_beside("runs/plan.json") == Path("runs/plan.matrices")
    assert folder_beside("runs/plan") == Path("runs/plan.matrices")
