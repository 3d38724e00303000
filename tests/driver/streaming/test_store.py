"""States in every storage: the same values and strides; errors name the file."""

import errno
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reap_driver.memory.decision import Offload
from reap_driver.observation import state_store as stores
from reap_driver.observation.batch_state import BatchState
from reap_driver.observation.state_store import (
    FORMAT,
    StateStore,
    read_state,
    states_folder,
    write_state,
)
from reap_kernels.errors import DataError
from tests.limits import HUNG
from tests.sealed import change_tensors

CPU = torch.device("cpu")


def odd_tensors() -> dict[str, Tensor]:
    """One of each kind of memory and value that a layer may pass on."""
    h = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    return {
        "dense": h,
        "transposed": h.mT,
        "permuted": h.permute(2, 0, 1),
        "expanded": h[:, :1].expand(2, 5, 8),
        "overlapping": h.flatten().unfold(0, 4, 2),
        "part of rows": h[..., 1:4],
        "every second": h[:, ::2],
        "one row": h[:1, 1:2],
        "size 1 with a stride of its own": h.as_strided((1, 3, 8), (1, 8, 1)),
        "bfloat16": h.bfloat16(),
        "float8": h.to(torch.float8_e4m3fn),
        "int64": torch.tensor([2**62 + 1, -1]),
        "bool": h > 0,
        "complex": torch.complex(h, -h),
        "0-d": torch.tensor(2.5, dtype=torch.float64),
        "empty": h[:, :0],
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def assert_same(mine: Tensor, theirs: Tensor) -> None:
    """Bits, dtype, strides, and the offset from an aligned address."""
    assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    left, right = (t.contiguous().view(-1).view(torch.uint8) for t in (mine, theirs))
    assert torch.equal(left, right)
    assert not theirs.numel() or mine.data_ptr() % 64 == theirs.data_ptr() % 64


@pytest.mark.parametrize("name", odd_tensors())
def test_file_keeps_values_and_strides(name: str, tmp_path: Path) -> None:
    tensor = odd_tensors()[name]
    state = BatchState.of(3, (tensor, None), {"1": [{"t": torch.ones(2)}, []]})
    write_state(tmp_path / "state", state)
    state = read_state(tmp_path / "state")
    assert state.layer == 3
    assert_same(state.output()[0], tensor)
    assert state.changes()["1"][0]["t"].tolist() == [1, 1]


@pytest.mark.parametrize("name", odd_tensors())
def test_copy_in_host_memory_keeps_values_and_strides(name: str) -> None:
    tensor = odd_tensors()[name]
    copy = stores._pinned(tensor)
    assert_same(copy, tensor)
    assert not tensor.numel() or copy.data_ptr() != tensor.data_ptr()


def test_file_holds_no_more_than_the_memory_between_first_and_last_element(tmp_path: Path) -> None:
    """Not the whole buffer that a view was taken from, nor copies of what is expanded."""
    large = torch.zeros(1 << 20)
    write_state(tmp_path / "state", BatchState.of(0, [large[5:9], large[:1].expand(1 << 20)], {}))
    assert (tmp_path / "state").stat().st_size < 1000


def test_reading_gives_memory_of_its_own(tmp_path: Path) -> None:
    """Layers may write to it, and the file may be deleted."""
    write_state(tmp_path / "state", BatchState.of(0, torch.ones(3), {}))
    first, second = (read_state(tmp_path / "state").output() for _ in range(2))
    first += 1
    assert second.tolist() == read_state(tmp_path / "state").output().tolist() == [1, 1, 1]


@pytest.fixture(params=["device", "host", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StateStore]:
    place: Offload = request.param
    made = StateStore(place, CPU, tmp_path / "journal")
    yield made
    made.close()


def value(layer: int, number: int) -> BatchState:
    """A state that differs between layers and batches."""
    return BatchState.of(layer, torch.tensor([layer, number]), {})


def fill(store: StateStore, layer: int, numbers: tuple[int, ...] = (0, 3, 7)) -> None:
    """A layer on all batches, as `run_streamed` does it."""
    store.begin(layer + 1)
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        before = store.get(number, following)
        seen = None if before is None else before.output().tolist()
        assert seen == (None if layer == 0 else [layer - 1, number])
        store.put(number, value(layer, number))


def test_layer_after_layer(store: StateStore) -> None:
    assert store.empty
    for layer in range(3):
        fill(store, layer)
        store.turn()
    assert not store.empty
    state = store.get(3, None)
    assert state is not None
    assert state.output().tolist() == [2, 3]


def test_batch_that_no_layer_was_for(store: StateStore) -> None:
    """It has no state, also in files."""
    store.begin(1)
    assert store.get(0, 1) is None
    store.put(0, None)
    assert store.get(1, None) is None
    store.put(1, value(0, 1))
    store.turn()
    store.begin(2)
    assert store.get(0, 1) is None
    state = store.get(1, None)
    assert state is not None
    assert state.layer == 0


def test_saved_and_loaded(store: StateStore, tmp_path: Path) -> None:
    """Also from one storage to another: the saved files are the same."""
    fill(store, 0)
    store.put(9, None)
    folder = states_folder(tmp_path / "journal", 1)
    folder.parent.mkdir(exist_ok=True)
    store.save(folder)
    for place in ("device", "host", "file"):
        other = StateStore(place, CPU, tmp_path / "journal")
        assert other.empty
        other.load(folder)
        assert not other.empty
        state = other.get(7, 9)
        assert state is not None
        assert state.output().tolist() == [0, 7]
        assert other.get(9, None) is None
        other.close()


def test_saving_does_not_disturb(store: StateStore, tmp_path: Path) -> None:
    fill(store, 0)
    folder = states_folder(tmp_path / "journal", 1)
    folder.parent.mkdir(exist_ok=True)
    store.save(folder)
    store.turn()
    fill(store, 1)
    store.turn()
    assert not store.in_files or not folder.exists()


def test_files_of_a_layer_that_is_done_are_deleted(tmp_path: Path) -> None:
    store = StateStore("file", CPU, tmp_path)
    assert store.in_files
    for layer in range(3):
        fill(store, layer)
        store.turn()
        assert [path.name for path in tmp_path.iterdir()] == [f"states-{layer + 1:05}"]
    store.close()


def test_files_of_a_killed_run_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    left = states_folder(tmp_path, 1)
    left.mkdir(parents=True)
    (left / "000005.safetensors").write_bytes(b"half")
    store = StateStore("file", CPU, tmp_path)
    store.begin(1)
    assert list(left.iterdir()) == []
    store.close()


def test_next_state_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore("file", CPU, tmp_path)
    fill(store, 0)
    store.turn()
    read: list[str] = []
    ahead = threading.Event()

    def noted(path: Path) -> BatchState:
        read.append(path.name)
        if len(read) == 2:
            ahead.set()
        return read_state(path)

    monkeypatch.setattr(stores, "read_state", noted)
    store.get(0, 3)
    assert ahead.wait(HUNG)
    store.get(3, None)
    store.close()
    assert read == ["000000.safetensors", "000003.safetensors"]


def test_unexpected_order_is_read_too(tmp_path: Path) -> None:
    """A state that was read ahead and is not requested is dropped."""
    store = StateStore("file", CPU, tmp_path)
    fill(store, 0)
    store.turn()
    store.get(0, 3)
    state = store.get(7, None)
    assert state is not None
    assert state.output().tolist() == [0, 7]
    store.close()


@pytest.mark.parametrize("place", ["device", "file"])
@pytest.mark.parametrize("damage", ["gone", "cut", "foreign", "no tensor"])
def test_missing_and_damaged_files_are_named(place: Offload, damage: str, tmp_path: Path) -> None:
    store = StateStore("device", CPU)
    fill(store, 0)
    folder = states_folder(tmp_path, 1)
    store.save(folder)
    path = folder / "000003.safetensors"
    content = path.read_bytes()
    match damage:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(content[:-3])
        case "foreign":
            path.write_bytes(content.replace(b"layer", b"later"))
        case "no tensor":
            path.write_bytes(content.replace(b'"0":', b'"1":'))
    again = StateStore(place, CPU, tmp_path)

    def asked() -> None:
        again.load(folder)
        again.get(3, None)

    with pytest.raises(DataError, match=f"{path}.*start anew"):
        asked()
    again.close()


GOOD = {"output": {"tensor": 0}, "changes": {"dict": []}}


def skeleton(**change: Any) -> dict[str, Any]:
    return {"skeleton": {**GOOD, **change}}


def place(**change: Any) -> dict[str, Any]:
    return {"tensors": [{"shape": [2, 3], "strides": [3, 1], "offset": 0, **change}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": -2}, "field 'layer' is -2"),
        ({"layer": "0"}, "field 'layer' is '0'"),
        ({"tensors": []}, r"has the tensors \['0'\], its header 0"),
        ({"tensors": [[[2], [1], 0]]}, r"field 'tensors\[0\]' is "),
        (place(shape=[2, 4]), "says that tensor 0 has shape"),
        (place(shape=[6]), "says that tensor 0 has shape"),
        (place(shape=[-2, 3]), r"field 'tensors\[0\].shape\[0\]' is -2"),
        (place(strides=[2**40, 1]), "says that tensor 0"),
        (place(shape=[2**62, 2, 3], strides=[0, 3, 1]), "says that tensor 0"),
        (place(offset=64), r"offset' is 64"),
        ({"skeleton": None}, "has the skeleton None"),
        ({"skeleton": {"output": {"tensor": 0}}}, "has the skeleton"),
        (skeleton(changes=True), "has the changes True"),
        (skeleton(changes={"list": []}), "has the changes"),
        (skeleton(output={"tensor": 1}), "has the part"),
        (skeleton(output={"tensor": -1}), "has the part"),
        (skeleton(output={"tensor": True}), "has the part"),
        (skeleton(output={"plain": [1]}), "has the part"),
        (skeleton(output={"tuple": [3]}), "has the part 3"),
        (skeleton(output={"dict": [["a"]]}), "has the part"),
        (skeleton(output={"dict": [[[1], {"plain": 1}]]}), "has the part"),
        (skeleton(output={"module": "os"}), "has the part"),
        (skeleton(output={"tensor": 0, "plain": 1}), "has the part"),
    ],
    ids=str,
)
def test_states_that_make_no_sense(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "state"
    write_state(path, BatchState.of(0, torch.ones(2, 3), {}))
    change_tensors(path, FORMAT, {**place(), **skeleton()}, {})
    assert torch.equal(read_state(path).output(), torch.ones(2, 3))
    change_tensors(path, FORMAT, change, {})
    with pytest.raises(DataError, match=f"state of a batch {path}.*{says}.*start anew"):
        read_state(path)


def test_missing_folder_is_named(store: StateStore, tmp_path: Path) -> None:
    store.load(tmp_path / "away")
    with pytest.raises(DataError, match=str(tmp_path / "away")):
        store.get(3, None)


def test_full_disk_is_an_os_error_of_the_next_call(tmp_path: Path) -> None:
    """The safetensors library gives the errno only in its text; the error has a remedy."""
    store = StateStore("file", CPU, tmp_path)
    store.begin(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        store.put(0, BatchState.of(0, torch.zeros(10000), {}))
        with pytest.raises(OSError, match="File too large") as caught:
            store.turn()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        store.close()
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "states-00001" / "000000.safetensors")
