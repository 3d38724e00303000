"""Tensors read ahead of their use: every byte once, in pieces, and errors that name the file."""

import json
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reap_driver.files.safetensors_file import read_header
from reap_driver.load import tensor_reader
from reap_driver.load.tensor_reader import StoredTensor, TensorReader, start, stored
from reap_kernels.errors import CheckpointError
from tests.limits import HUNG


@pytest.fixture
def reader() -> Iterator[TensorReader]:
    made = TensorReader()
    yield made
    made.close()


def written(folder: Path, **tensors: Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return path


def opened(path: Path, reader: TensorReader) -> dict[str, StoredTensor]:
    return stored(read_header(path).tensors, reader)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def kinds() -> dict[str, Tensor]:
    """A tensor of every dtype that can be written, and odd shapes."""
    dtypes = [*tensor_reader.DTYPES.values()]
    made = {str(d): (torch.arange(6).reshape(2, 3) % 2).to(d) for d in dtypes if d.itemsize > 1}
    made |= {str(d): torch.arange(6).byte().view(d) for d in dtypes if d.itemsize == 1}
    made[str(torch.bool)] = torch.tensor([True, False])
    return made | {"none": torch.empty(0, 4), "rows of none": torch.empty(3, 0).bfloat16()}


def test_every_dtype_and_shape(tmp_path: Path, reader: TensorReader) -> None:
    wanted = kinds() | {"scalar": torch.tensor(2.5)}
    path = written(tmp_path, **wanted)
    tensors = opened(path, reader)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensors[key].get_shape() == list(tensor.shape)
        assert tensors[key].nbytes == tensor.nbytes
        found = tensors[key][...]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found), bits(tensor)), key
        assert found.data_ptr() % 64 == 0
    assert reader.bytes_read == sum(tensor.nbytes for tensor in wanted.values())


@pytest.mark.parametrize("piece", [1, 7, 100, 10**6])
def test_large_tensors_in_pieces(
    piece: int, tmp_path: Path, reader: TensorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_reader, "_PIECE", piece)
    sizes: list[int] = []
    read = TensorReader._read

    def noted(self: TensorReader, path: Path, at: int, view: memoryview) -> None:
        sizes.append(len(view))
        read(self, path, at, view)

    monkeypatch.setattr(TensorReader, "_read", noted)
    x = torch.randn(10, 5)
    tensors = opened(written(tmp_path, a=torch.zeros(3), x=x), reader)
    assert torch.equal(tensors["x"][2:7], x[2:7])
    assert reader.bytes_read == sum(sizes) == x.nbytes
    assert len(sizes) == -(-x.nbytes // piece)


def test_short_reads_are_continued(
    tmp_path: Path, reader: TensorReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read may return fewer bytes than requested."""
    own = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: own(fd, [views[0][:3]], at))
    x = torch.randn(7)
    assert torch.equal(opened(written(tmp_path, x=x), reader)["x"][:], x)
    assert reader.bytes_read == x.nbytes


def test_started_before_it_is_asked_for(tmp_path: Path, reader: TensorReader) -> None:
    """Read once; if indexed again, read again into new memory."""
    x = torch.randn(7)
    tensors = opened(written(tmp_path, x=x, y=x + 1), reader)
    start(tensors, ["x"])
    first = tensors["x"][...]
    assert reader.bytes_read == x.nbytes
    first.zero_()
    assert torch.equal(tensors["x"][...], x)
    assert reader.bytes_read == 2 * x.nbytes


def test_file_cut_off_while_it_is_read(tmp_path: Path, reader: TensorReader) -> None:
    path = written(tmp_path, x=torch.randn(7))
    tensors = opened(path, reader)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=f"{path}: ended at byte .* do not change"):
        tensors["x"][...]
    assert reader.bytes_read == 25


def test_file_deleted_while_it_is_read(tmp_path: Path, reader: TensorReader) -> None:
    path = written(tmp_path, x=torch.randn(7))
    tensors = opened(path, reader)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read \(No such file"):
        tensors["x"][...]


def test_disk_error(tmp_path: Path, reader: TensorReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    path = written(tmp_path, x=torch.randn(7))
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read \(Input/output error"):
        opened(path, reader)["x"][...]


def test_dtype_without_a_counterpart(tmp_path: Path, reader: TensorReader) -> None:
    header = json.dumps({"odd": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    tensors = opened(path, reader)
    for ask in (tensors["odd"].start, lambda: tensors["odd"][...]):
        with pytest.raises(CheckpointError, match=r"'odd' has dtype F4, .*convert the tensor"):
            ask()


def test_closing_does_not_wait_for_reads_that_have_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads in progress finish; the others are canceled, and waiting for them raises."""
    monkeypatch.setattr(tensor_reader, "_PIECE", 4)
    go, began, lock = threading.Event(), threading.Semaphore(0), threading.Lock()
    own, count = os.preadv, 0

    def slow(*args: object) -> int:
        nonlocal count
        with lock:
            count += 1
        began.release()
        assert go.wait(HUNG)
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slow)
    reader = TensorReader()
    tensors = opened(written(tmp_path, x=torch.zeros(1000)), reader)
    tensors["x"].start()
    for _ in range(tensor_reader.THREADS):
        assert began.acquire(timeout=HUNG)
    pending = tensors["x"]._reading
    assert pending is not None
    canceled = threading.Event()
    pending._pieces[-1].add_done_callback(lambda _: canceled.set())
    closing = threading.Thread(target=reader.close)
    closing.start()
    assert canceled.wait(HUNG)
    go.set()
    closing.join(HUNG)
    assert not closing.is_alive()
    assert count == tensor_reader.THREADS
    with pytest.raises(CancelledError):
        tensors["x"][...]


def test_closing_closes_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = TensorReader()
    opened(written(tmp_path, x=torch.zeros(3)), reader)["x"][...]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
