"""Launch tables: buckets, overrides, bad files, the arithmetic fallback, and the search."""

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from reap_kernels import device, tuning
from reap_kernels.errors import BackendUnavailable, DataError
from reap_kernels.tune import Measured, Shape, candidates, tune
from reap_kernels.tuning import CONFIGS, PRODUCTS, Entry, Launch, Table, table_dtype

CPU = torch.device("cpu")
SMALL = Launch(16, 16, 16, 1, 4, 2)


@pytest.fixture
def on_sm90(monkeypatch) -> None:
    monkeypatch.setattr(device, "architecture", lambda where: "sm90")


def test_shipped_tables_are_whole() -> None:
    """Every architecture has a launch for every call, and stages that fit its shared memory."""
    shared = {"sm80": 163, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99, "interpreter": 1024}
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(shared)
    for arch, kilobytes in shared.items():
        table = Table.load(CONFIGS / f"{arch}.json")
        assert table.arch == arch
        assert table.entries == tuning.ordered(table.entries), "buckets are out of order"
        for op in PRODUCTS:
            for dtype in ("half", "float32"):
                own = [e for e in table.entries if (e.op, e.dtype, e.off) == (op, dtype, None)]
                bounds = [(e.width, e.rows) for e in own]
                assert bounds[-1] == (None, None), f"{arch} {op} {dtype} has calls without a launch"
        for entry in table.entries:
            if entry.launch is not None:
                itemsize = 2 if entry.dtype == "half" else 4
                assert entry.launch.shared_bytes(entry.op, itemsize) <= kilobytes * 1024


@pytest.mark.usefixtures("on_sm90")
def test_buckets() -> None:
    table = Table.load(CONFIGS / "sm90.json")

    def launch(width: int, rows: float) -> Launch:
        return tuning.choose(CPU, "down", torch.float16, width, rows)

    half = [e for e in table.entries if (e.op, e.dtype, e.off) == ("down", "half", None)]
    few, some, rest = (entry.launch for entry in half)
    assert [launch(768, 64), launch(768, 64.1), launch(1024, 255)] == [few, some, some]
    assert [launch(1025, 255.1), launch(1025, 1)] == [rest, few]
    assert tuning.choose(CPU, "down", torch.bfloat16, 768, 64) == few

    def backend(width: int, rows: float) -> str:
        return tuning.choose_backend(CPU, "layer", torch.float16, width, rows)

    narrow, wide = backend(1024, 999), backend(1025, 999)
    assert [narrow, wide, backend(1025, 255)] == ["triton", "grouped_mm", "triton"]


@pytest.mark.usefixtures("on_sm90")
def test_lines_that_are_off_are_kept_and_never_chosen(tmp_path: Path, monkeypatch) -> None:
    """And one whose `off` is deleted holds in its bucket: it comes before the line that held."""
    table = Table.load(CONFIGS / "sm90.json")
    off = tuning.off_entries("sm90")
    assert off == tuple(entry for entry in table.entries if entry.off == "has not run on a GPU")
    assert {entry.launch.kernel for entry in off if entry.launch is not None} == {"tma"}
    for op in PRODUCTS:
        assert tuning.choose(CPU, op, torch.bfloat16, 768, 1024).kernel == "pointer"
    for op, names in tuning.STAGE_BACKENDS.items():
        backend = tuning.choose_backend(CPU, op, torch.bfloat16, 768, 1024)
        assert backend == names[0], f"{op} takes {backend}"

    path = tmp_path / "own.json"
    on = tuple(replace(entry, off=None) for entry in table.entries)
    Table("sm90", "by hand", on).save(path)
    monkeypatch.setenv("REAP_TUNING", str(path))
    for entry in off:
        call = (CPU, entry.op, torch.bfloat16, entry.width or 2048, entry.rows or 1024)
        if entry.launch is None:
            assert tuning.choose_backend(*call) == entry.backend
            first = tuning.STAGE_BACKENDS[entry.op][0]
            assert tuning.choose_backend(*call, among=(first,)) == first
        else:
            assert tuning.choose(*call) == entry.launch


def test_a_table_keeps_what_is_off_beside_what_holds(tmp_path: Path) -> None:
    tma = replace(SMALL, kernel="tma")
    bucket = ("down", "half", 768, 64)
    on, other = Entry(*bucket, SMALL), Entry(*bucket, replace(SMALL, block_m=32))
    off, again = Entry(*bucket, tma, off="slower"), Entry(*bucket, tma, off="again")
    table = Table("sm90", "by hand", tuning.ordered([on, other, off, again]))
    assert table.entries == (off, on)
    both = (replace(off, off=None), on)
    assert tuning.ordered([*both, other]) == both, "the pointer kernel reads what TMA cannot"
    layers = [Entry("layer", *bucket[1:], backend=name) for name in ("wgmma", "triton", "wgmma")]
    assert tuning.ordered(layers) == tuple(layers[:2])
    table.save(tmp_path / "own.json")
    assert Table.load(tmp_path / "own.json") == table
    lines = json.loads((tmp_path / "own.json").read_text())["entries"]
    assert lines[0]["kernel"] == "tma"
    assert set(lines[1]) == set(lines[0]) - {"kernel", "off"}, "an older reader refuses the file"
    assert [str(SMALL), str(tma)] == ["16,16,16,1,4,2", "16,16,16,1,4,2,tma"]
    assert str(off) == "down half width <= 768 rows <= 64: 16,16,16,1,4,2,tma"
    assert str(Entry("norm", None, None, None, backend="triton")) == "norm any: triton"


@pytest.mark.usefixtures("on_sm90")
def test_override_comes_first_and_need_not_be_whole(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "own.json"
    Table("sm90", "by hand", (Entry("down", "half", None, None, SMALL),)).save(path)
    shipped = tuning.choose(CPU, "gate_up", torch.float16, 768, 999)
    monkeypatch.setenv("REAP_TUNING", str(path))
    assert tuning.choose(CPU, "down", torch.float16, 768, 999) == SMALL
    assert tuning.choose(CPU, "gate_up", torch.float16, 768, 999) == shipped
    assert next(table.origin for table in tuning.tables("sm90")) == "by hand"


def test_override_of_another_architecture_is_refused(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "own.json"
    Table("sm80", "by hand", ()).save(path)
    monkeypatch.setenv("REAP_TUNING", str(path))
    with pytest.raises(DataError, match=r"for sm80, this device is sm90.*reap-kernels tune"):
        tuning.tables("sm90")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"block_m": 48}, r"'entries\[0\].block_m' is 48; expected a power of two"),
        ({"block_k": 8}, r"'entries\[0\].block_k' is 8; expected a whole number, 16 to 256"),
        ({"block_n": 512}, "block_n' is 512"),
        ({"block_n": 64.0}, "block_n' is 64.0"),
        ({"block_n": True}, "block_n' is True"),
        ({"num_stages": 0}, "num_stages' is 0; expected a whole number, 1 to 16"),
        ({"num_stages": 1e30}, r"num_stages' is 1e\+30"),
        ({"group_m": 1e30}, r"group_m' is 1e\+30"),
        ({"group_m": -1}, "group_m' is -1"),
        ({"num_warps": 3}, "num_warps' is 3; expected a power of two"),
        ({"num_warps": 64}, "num_warps' is 64"),
        (
            {"block_m": 256, "block_k": 256, "num_stages": 16},
            "bytes of shared memory; expected at most",
        ),
        ({"block_m": 256, "block_n": 256, "num_warps": 1}, "registers of a thread"),
        ({"op": "up"}, r"'entries\[0\].op' is 'up'; expected one of sort, "),
        ({"op": ["down"]}, r"op' is \['down'\]"),
        ({"op": "layer"}, r"'entries\[0\].backend' is missing"),
        ({"backend": "cuda"}, r"'entries\[0\].backend' is unknown"),
        ({"rows": "64"}, "rows' is '64'"),
        ({"width": -1}, "width' is -1"),
        ({"dtype": "int4"}, "dtype' is 'int4'"),
        ({"kernel": "TMA"}, r"'entries\[0\].kernel' is 'TMA'; expected one of pointer, tma"),
        ({"off": True}, r"'entries\[0\].off' is True; expected a text"),
        ({"off": None}, r"'entries\[0\].off' is None"),
        ({"speed": 3}, r"'entries\[0\].speed' is unknown"),
    ],
)
def test_bad_entries_are_named(tmp_path: Path, change: dict, word: str) -> None:
    path = tmp_path / "own.json"
    entry = Entry("down", "half", None, None, SMALL).as_json() | change
    facts = {
        "format": tuning.FORMAT.name,
        "version": 1,
        "arch": "sm90",
        "origin": "",
        "entries": [entry],
    }
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=rf"launch table .*own\.json: .*{word}"):
        Table.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "reap-launch-table", "version": 2}'])
def test_files_that_are_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"launch table .*own\.json .*unset REAP_TUNING"):
        Table.load(path)
    with pytest.raises(DataError, match="No such file"):
        Table.load(tmp_path / "absent.json")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_read_and_written_back(path: Path, tmp_path: Path) -> None:
    table = Table.load(path)
    table.save(tmp_path / "again.json")
    assert Table.load(tmp_path / "again.json") == table


def test_every_candidate_can_be_kept_in_a_table(tmp_path: Path) -> None:
    for op, dtype in itertools.product(PRODUCTS, (torch.float16, torch.float32)):
        launches = candidates(op, dtype, 227 * 1024)
        entries = [Entry(op, table_dtype(dtype), None, n, x) for n, x in enumerate(launches, 1)]
        table = Table("sm90", "", tuple(entries))
        table.save(tmp_path / "own.json")
        assert Table.load(tmp_path / "own.json") == table


def test_fallback_fits_any_shared_memory() -> None:
    for op in PRODUCTS:
        for dtype in (torch.float16, torch.float32):
            for kilobytes in (48, 64, 99, 227):
                launch = tuning.fallback(op, dtype, 500, kilobytes * 1024)
                assert launch.shared_bytes(op, dtype.itemsize) <= kilobytes * 1024
                assert launch.num_stages >= 1


def test_unaligned_sizes_and_biases_get_launches_of_their_own() -> None:
    def launches(hidden: int, plain: bool) -> tuning.Launches:
        problem = tuning.Problem(CPU, torch.float16, "silu", hidden, 768, 500, plain)
        return problem.launches()

    assert launches(2048, True) == launches(2048, False)  # the fallback's tiles leave room
    assert launches(2047, True).up == tuning._UNALIGNED[2]
    full = Launch(128, 128, 64, 8, 8, 4)
    assert tuning._roomier(full).block_n == 64
    assert tuning._roomier(SMALL) == SMALL


def test_candidates_of_both_kernels_where_there_is_tma() -> None:
    pointers = candidates("down", torch.bfloat16, 227 * 1024)
    assert {launch.kernel for launch in pointers} == {"pointer"}
    both = candidates("down", torch.bfloat16, 227 * 1024, True)
    boxed = [launch for launch in both if launch.kernel == "tma"]
    assert [launch for launch in both if launch.kernel == "pointer"] == pointers
    assert replace(SMALL, block_m=64, block_n=64, block_k=64, group_m=8, kernel="tma") in boxed
    assert candidates("down", torch.float32, 227 * 1024, True) == candidates(
        "down", torch.float32, 227 * 1024
    )


def test_candidates_fit() -> None:
    for op in PRODUCTS:
        found = candidates(op, torch.bfloat16, 99 * 1024)
        assert found
        assert all(launch.shared_bytes(op, 2) <= 99 * 1024 for launch in found)


def test_tune_takes_the_fastest_that_is_right(tmp_path: Path, monkeypatch) -> None:
    """In the interpreter, by a clock that prefers one launch, with a product that is wrong once."""
    from reap_kernels.experts import product as products

    quick, slow = Launch(16, 32, 32, 1, 4, 1), Launch(32, 32, 32, 1, 4, 1)
    wrong = Launch(16, 16, 32, 1, 4, 1)
    product = products.product

    def broken(a, b, rows, launch, **options):
        out = product(a, b, rows, launch, **options)
        return out * 2 if launch == wrong else out

    monkeypatch.setattr(products, "product", broken)
    ran: list[Launch] = []
    monkeypatch.setattr("reap_kernels.tune.BUCKETS", ((16, 4), (None, 6)))
    seen: list[Measured] = []

    def clock(call) -> float:
        if call.__defaults__ is None:  # a whole layer, by one backend or another
            return 1.0
        launch = call.__defaults__[0]
        ran.append(launch)
        return {quick: 1.0, slow: 2.0}.get(launch, 3.0)

    shape = Shape(3, 2, 48, 32)
    table = tune(
        [shape],
        torch.float32,
        CPU,
        timer=clock,
        tried=lambda *_: [wrong, slow, quick],
        seen=seen.append,
    )
    assert {e.launch for e in table.entries if e.op in PRODUCTS} == {quick}
    assert wrong not in ran
    refused = [m for m in seen if m.milliseconds is None]
    assert {m.launch for m in refused} == {wrong}
    assert all("wrong numbers" in m.reason for m in refused)
    assert {e.backend for e in table.entries if e.op == "layer"} <= {"triton", "grouped_mm"}
    path = tmp_path / "table.json"
    table.save(path)
    assert Table.load(path) == table
    assert asdict(table)["arch"] == "interpreter"


@pytest.mark.parametrize(
    ("best", "kernels"), [("tma", ["tma", "pointer"]), ("pointer", ["pointer"])]
)
def test_tune_keeps_a_launch_that_reads_any_weights(
    best: str, kernels: list[str], tmp_path: Path, monkeypatch
) -> None:
    """Where TMA is faster: of experts that are separate tensors, the line behind it is used."""
    monkeypatch.setattr("reap_kernels.tune.BUCKETS", ((None, 6),))
    slow = Launch(32, 32, 32, 1, 4, 1)
    pointer = Launch(16, 32, 32, 1, 4, 1)
    boxes = replace(pointer, kernel="tma")

    def clock(call) -> float:
        launch = None if call.__defaults__ is None else call.__defaults__[0]
        return {slow: 4.0, pointer: 2.0, boxes: 1.0 if best == "tma" else 3.0}.get(launch, 1.0)

    tried = [slow, pointer, boxes]
    table = tune([Shape(3, 2, 48, 32)], torch.float32, CPU, timer=clock, tried=lambda *_: tried)
    for op in PRODUCTS:
        lines = [e.launch for e in table.entries if e.op == op]
        assert [launch.kernel for launch in lines] == kernels
        assert lines[-1] == pointer
    table.save(tmp_path / "table.json")
    monkeypatch.setenv("REAP_TUNING", str(tmp_path / "table.json"))
    assert tuning.choose(CPU, "down", torch.float32, 32, 6).kernel == best
    assert tuning.choose(CPU, "down", torch.float32, 32, 6, ("pointer",)) == pointer


@pytest.mark.parametrize(("quick", "served"), [("cuda", True), ("triton", True), ("cuda", False)])
def test_tune_takes_the_fastest_path_of_each_stage(
    quick: str, served: bool, tmp_path: Path, monkeypatch
) -> None:
    """By a clock that looks at what a layer ran; where `cuda` does not serve nothing is chosen."""
    from reap_kernels.layer import gpu
    from reap_kernels.saliency import kernel_cuda as saliency_cuda
    from reap_kernels.sort import kernel_cuda as route_cuda

    if not served:
        monkeypatch.delenv("REAP_CUDA_HOST")
    monkeypatch.setattr("reap_kernels.tune.BUCKETS", ((16, 4), (None, 6)))
    ran: list[tuple[str, str, str]] = []
    observe = gpu.observe_layer

    def recorded(kernels, call):
        around = kernels.around
        names = {gpu.TRITON: "triton", gpu.GROUPED_MM: "grouped_mm"}
        route = "cuda" if around.sort is route_cuda.sort_slots else "triton"
        saliency = "cuda" if around.combine is saliency_cuda.combine else "triton"
        ran.append((route, names[kernels.products], saliency))
        return observe(kernels, call)

    def clock(call) -> float:
        if call.__defaults__ is not None:  # a candidate launch
            return 1.0
        call()
        route, _, saliency = ran[-1]
        # Routing is quick by one kind of kernels, saliency by the other.
        return 3.0 - (route == quick) - (saliency != quick)

    monkeypatch.setattr(gpu, "observe_layer", recorded)
    launch = Launch(16, 32, 32, 1, 4, 1)
    shape = Shape(3, 2, 48, 32)
    table = tune([shape], torch.float32, CPU, timer=clock, tried=lambda *_: [launch])
    paths = {(e.op, e.rows): e.backend for e in table.entries if e.op in ("sort", "saliency")}
    other = {"cuda": "triton", "triton": "cuda"}[quick]
    rows = (16, None)
    want = {("sort", n): quick for n in rows} | {("saliency", n): other for n in rows}
    assert paths == (want if served else {})
    assert {found[0] for found in ran} == ({"cuda", "triton"} if served else {"triton"})
    path = tmp_path / "table.json"
    table.save(path)
    monkeypatch.setenv("REAP_TUNING", str(path))
    chosen = tuning.choose_backend(CPU, "sort", torch.int64, 32, 3.0)
    assert chosen == (quick if served else tuning.STAGE_BACKENDS["sort"][0])


def test_tune_needs_a_device_that_runs_kernels(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        BackendUnavailable, match=r"cannot be measured on cpu.*run `tune` on the GPU"
    ):
        tune([Shape(3, 2, 48, 32)], torch.float32, CPU)
