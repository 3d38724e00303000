"""The CUDA kernels, run on the CPU by the emulation of `csrc/host`: every stage against float64.

What the emulation cannot show, the compiler's work and speed, `python -m bench ptxas` and a GPU do.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels import cuda, env
from reap_kernels.dispatch import Request, Sizes
from reap_kernels.errors import BackendUnavailable, DtypeError, KernelError, ShapeError
from reap_kernels.layer import cuda_backend
from reap_kernels.saliency import kernel_cuda as saliency
from reap_kernels.saliency.measures import SlotMeasures
from reap_kernels.sort import kernel_cuda as route
from reap_kernels.testing import (
    CASES,
    Case,
    largest_relative_error,
    make_experts,
    make_inputs,
    relative_error,
)

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Slots per token around every kernel there is, and widths around every load.
SLOTS = (1, 2, 3, 4, 5, 8, 10, 16, 22, 32)
WIDTHS = (1, 7, 8, 64, 255, 256, 1032, 2056)
SHAPES = tuple(
    Case(f"k{k} H{h}", "k and H of a kernel of its own", 9, 40, k, h, 1, foreign=0.2)
    for k, h in itertools.product(SLOTS, WIDTHS)
)


@pytest.fixture
def orders():
    """Each value is one order in which threads and blocks take turns; natural order afterwards."""
    module = cuda.host_module(env.cuda_host())

    def each():
        for seed in range(4):
            module.set_order(seed)
            yield seed

    yield each()
    module.set_order(0)


def stages(case: Case, dtype: torch.dtype) -> tuple[Tensor, rk.LayerStats, Tensor]:
    """Output and statistics of random expert outputs, by the stages around a layer's products, and
    the expert outputs by slot.
    """
    inputs = make_inputs(case, dtype)
    rng = torch.Generator().manual_seed(3)
    y = torch.randn(inputs.topk_ids.numel(), case.hidden, generator=rng).to(dtype)
    rows = route.sort_slots(inputs.topk_ids, inputs.topk_weights, case.experts)
    out = torch.empty(case.tokens, case.hidden, dtype=dtype)
    measures = SlotMeasures.empty(len(y), CPU)
    stats = rk.LayerStats(case.experts, case.groups)
    sorted_rows = y[rows.gather_index] if len(y) else y
    saliency.combine(sorted_rows, inputs.topk_weights, rows, out, measures)
    saliency.reduce_slots(
        measures, inputs.topk_weights, rows, stats, inputs.mask, inputs.group, tile=64
    )
    return out, stats, y


def oracle(case: Case, dtype: torch.dtype, y: Tensor) -> tuple[Tensor, rk.LayerStats]:
    """The same in float64, from the formulas."""
    inputs = make_inputs(case, dtype)
    ids, router_weights = inputs.topk_ids.flatten(), inputs.topk_weights.flatten()
    served = (ids >= 0) & (ids < case.experts) & (router_weights != 0)
    scaled = torch.where(served[:, None], router_weights.double()[:, None] * y.double(), 0)
    out = scaled.view(case.tokens, case.top_k, case.hidden).sum(dim=1)
    every = {"mask": inputs.mask, "group": inputs.group}
    rows = {k: v.repeat_interleave(case.top_k) for k, v in every.items() if isinstance(v, Tensor)}
    stats = rk.LayerStats(case.experts, case.groups)
    rk.accumulate(y, ids, router_weights, stats, **rows, backend="reference")
    return out, stats


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *SHAPES], ids=lambda case: case.name)
def test_stages_match_float64(case: Case, dtype: torch.dtype) -> None:
    out, stats, y = stages(case, dtype)
    want, truth = oracle(case, dtype, y)
    # Sums accumulate in float32; what remains is one rounding to the output's dtype.
    bound = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(out, want) <= bound
    for name in (*rk.stats.COUNTS, *rk.stats.EXTREMA):
        assert torch.equal(stats.fields()[name], truth.fields()[name]), name
    for name in rk.stats.SUMS:
        assert largest_relative_error(stats.fields()[name], truth.fields()[name]) <= 3e-7, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [CASES[-1], CASES[8], SHAPES[46]], ids=lambda case: case.name)
def test_no_order_of_threads_changes_a_bit(case: Case, orders) -> None:
    """A result that depends on who comes first is a race; see also tests/csrc."""
    found = []
    for _ in orders:
        out, stats, _ = stages(case, torch.float16)
        found.append((out, stats))
    assert len(found) == 4
    for out, stats in found[1:]:
        assert torch.equal(out, found[0][0])
        for name in rk.stats.FIELDS:
            assert torch.equal(stats.fields()[name], found[0][1].fields()[name]), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("experts", [1, 31, 32, 128, 1024, 4095])
@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257, 1025])
def test_routing_around_chunks_of_slots(tokens: int, experts: int, orders) -> None:
    rng = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, 1), generator=rng)
    want = rk.sort_by_expert(ids, experts, backend="cpu")
    for _ in itertools.islice(orders, 2):
        found = route.sort_slots(ids, None, experts)
        assert torch.equal(found.gather_index, want.gather_index)
        assert torch.equal(found.offsets, want.offsets)
        assert torch.equal(found.scatter_index[found.gather_index], torch.arange(tokens))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("router_weights", cuda.FLOATS, ids=str)
def test_routing_takes_any_integers_and_floats(
    dtype: torch.dtype, router_weights: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (70, 4), generator=rng).to(dtype)
    weights = torch.randint(0, 3, (70, 4), generator=rng).to(router_weights)
    weights[3] = -0.0  # exactly zero, too
    got = rk.sort_by_expert(ids, 9, topk_weights=weights, backend="cuda")
    want = rk.sort_by_expert(ids, 9, topk_weights=weights, backend="reference")
    assert torch.equal(got.gather_index, want.gather_index)
    assert torch.equal(got.offsets, want.offsets)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("block_m", [1, 16, 64, 128])
def test_tile_lists(block_m: int) -> None:
    """Each expert's rows in tiles of at most block_m, in order; nothing for an expert without."""
    sizes = [0, 1, 63, 64, 65, 0, 300, 0]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    slots = sum(sizes) + 10
    tiles = route.schedule(offsets, slots, block_m)
    want = [
        (expert, int(offsets[expert]) + start)
        for expert, size in enumerate(sizes)
        for start in range(0, size, block_m)
    ]
    used = int(tiles.firsts[-1])
    assert used <= tiles.bound == slots // block_m + len(sizes)
    pairs = zip(tiles.experts[:used].tolist(), tiles.rows[:used].tolist(), strict=True)
    assert list(pairs) == want
    numbers = [-(-size // block_m) for size in sizes]
    assert tiles.firsts.tolist() == [0, *itertools.accumulate(numbers)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_as_torch_does(dtype: torch.dtype) -> None:
    """One slot per token makes the combination a product, rounded once, as torch's."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).view(-1, 64)
    for gate in (1.0, 1 / 3, -1e-3, 3e5):
        router_weights = torch.full((len(every), 1), gate)
        out = torch.empty_like(every)
        saliency.combine(every, router_weights, None, out, None)
        want = (router_weights * every.float()).to(dtype)
        number = ~want.isnan()
        assert torch.equal(out.isnan(), want.isnan())
        assert torch.equal(out[number], want[number])


def test_rows_that_begin_anywhere() -> None:
    """A view at an odd element is read element by element, not at a misaligned address."""
    base = torch.randn(40 * 64 + 1).half()
    y = base[1:].view(40, 64)
    assert y.data_ptr() % 16
    got, want = rk.LayerStats(3), rk.LayerStats(3)
    ids, router_weights = torch.arange(40) % 3, torch.rand(40)
    rk.accumulate(y, ids, router_weights, got, backend="cuda")
    rk.accumulate(y, ids, router_weights, want, backend="reference")
    assert largest_relative_error(got.sums, want.sums) <= 3e-7


def test_wide_sums_of_float64_rows() -> None:
    y = torch.randn(30, 11, dtype=torch.float64) * 1e30  # squares overflow float32
    got, want = rk.LayerStats(3), rk.LayerStats(3)
    ids, router_weights = torch.arange(30) % 3, torch.rand(30)
    rk.accumulate(y, ids, router_weights, got, backend="cuda")
    rk.accumulate(y, ids, router_weights, want, backend="reference")
    assert int(got.nonfinite.sum()) == 0
    assert largest_relative_error(got.sums, want.sums) <= 3e-7


def test_masks_and_groups_of_any_strides() -> None:
    case = replace(CASES[-1], top_k=1, hidden=8)
    inputs = make_inputs(case)
    spread = torch.zeros(case.tokens, 3, dtype=torch.bool)
    spread[:, 1] = inputs.mask
    groups = torch.zeros(case.tokens, 2, dtype=torch.int64)
    groups[:, 0] = inputs.group
    y, ids, router_weights = inputs.hidden, inputs.topk_ids[:, 0], inputs.topk_weights[:, 0]
    for backend in ("cuda", "triton", "cpu"):
        got, want = (rk.LayerStats(case.experts, case.groups) for _ in range(2))
        strided = {"mask": spread[:, 1], "group": groups[:, 0]}
        rk.accumulate(y, ids, router_weights, got, **strided, backend=backend)
        dense = {"mask": inputs.mask, "group": inputs.group}
        rk.accumulate(y, ids, router_weights, want, **dense, backend=backend)
        assert torch.equal(got.sums, want.sums)
        assert torch.equal(got.counts, want.counts)


def test_limits_are_stated() -> None:
    ids = torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(BackendUnavailable, match="4096 experts are more than it counts, 4095"):
        rk.sort_by_expert(ids, 4096, backend="cuda")
    request = Request("layer", CPU, torch.float16, "silu", Sizes(top_k=33, experts=64))
    assert "k = 33 is above 32" in cuda_backend.refusal(request)
    request = Request("saliency", CPU, torch.float8_e4m3fn, sizes=Sizes(4, 1, 8))
    with pytest.raises(BackendUnavailable, match=r"not torch.float8_e4m3fn"):
        rk.accumulate(
            torch.zeros(4, 8).to(request.dtype), ids[:, 0], torch.ones(4), rk.LayerStats(8),
            backend="cuda",
        )  # fmt: skip


def test_a_refused_launch_names_kernel_shape_and_code() -> None:
    y = torch.zeros(4, 8)
    with pytest.raises(KernelError, match=r"combine_rows could not be .* k = 33, H = 8.*status 1"):
        saliency.combine(y, torch.zeros(1, 33), None, torch.zeros(1, 8), None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"offsets": torch.zeros(3)}, DtypeError, "offsets is torch.float32; it takes torch.int64"),
        ({"offsets": torch.zeros(3, device="meta").long()}, ShapeError, "offsets is on meta"),
        ({"offsets": torch.zeros(6).long()[::2]}, ShapeError, r"offsets has strides \(2,\)"),
    ],
)
def test_every_tensor_is_checked(change: dict, error: type, message: str) -> None:
    tiles = {name: torch.zeros(9, dtype=torch.int32) for name in ("tile_experts", "tile_rows")}
    call = {"offsets": torch.zeros(3).long(), "firsts": torch.zeros(3, dtype=torch.int32), **tiles}
    route._SCHEDULE(CPU, "E = 2", experts=2, block_m=4, **call)
    with pytest.raises(error, match=message):
        route._SCHEDULE(CPU, "E = 2", experts=2, block_m=4, **{**call, **change})


def test_without_the_module_the_reason_is_given(monkeypatch) -> None:
    monkeypatch.delenv("REAP_CUDA_HOST")
    with pytest.raises(
        BackendUnavailable, match="inputs are on the CPU, where CUDA kernels run only for tests"
    ):
        rk.sort_by_expert(torch.zeros(4, 1, dtype=torch.int64), 4, backend="cuda")
    absent = lambda name: (_ for _ in ()).throw(ModuleNotFoundError(name))  # noqa: E731
    monkeypatch.setattr(cuda.importlib, "import_module", absent)
    cuda.module.cache_clear()
    try:
        assert "was not built" in cuda.module()
    finally:
        cuda.module.cache_clear()
    monkeypatch.setenv("REAP_CUDA_HOST", "/nowhere/_host.so")
    with pytest.raises(BackendUnavailable, match=r"/nowhere/_host.so cannot be loaded.*make host"):
        rk.sort_by_expert(torch.zeros(4, 1, dtype=torch.int64), 4, backend="cuda")


MIXES = (
    ("cuda", "grouped_mm", "triton"),
    ("triton", "grouped_mm", "cuda"),
)


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_stages_mix_as_the_launch_table_says(mix: tuple[str, ...], tmp_path, monkeypatch) -> None:
    from reap_kernels.tuning import Entry, Table

    names = dict(zip(("sort", "layer", "saliency"), mix, strict=True))
    entries = tuple(Entry(op, None, None, None, backend=backend) for op, backend in names.items())
    Table("interpreter", "a test", entries).save(tmp_path / "table.json")
    monkeypatch.setenv("REAP_TUNING", str(tmp_path / "table.json"))
    case = replace(CASES[-1], tokens=24, experts=6, top_k=3, hidden=40, intermediate=24)
    inputs, experts = make_inputs(case), make_experts(case)
    found = []
    for backend in ("cuda", "reference"):
        stats = rk.LayerStats(case.experts, case.groups)
        call = (inputs.hidden, inputs.topk_ids, inputs.topk_weights, experts, stats)
        out = rk.observe_layer(*call, mask=inputs.mask, group=inputs.group, backend=backend)
        found.append((out, stats))
    (out, stats), (want, truth) = found
    assert relative_error(out, want) <= 1e-6
    assert torch.equal(stats.counts, truth.counts)
    assert largest_relative_error(stats.sums, truth.sums) <= 1e-6
    verdicts = rk.explain("cpu", torch.float32, backend="cuda")
    (note,) = [v.note for v in verdicts if (v.op, v.backend) == ("layer", "cuda")]
    assert note == f"sort by {mix[0]}, products by {mix[1]}, norms and sums by {mix[2]}"


def test_a_backend_may_be_asked_for_one_op(monkeypatch) -> None:
    monkeypatch.setenv("REAP_BACKEND", "sort=cuda,saliency=reference")
    asked = [env.backend(op) for op in env.OPS]
    assert dict(zip(env.OPS, asked, strict=True))["sort"] == "cuda"
    assert dict(zip(env.OPS, asked, strict=True))["saliency"] == "reference"
    assert env.backend("layer") is None
    chosen = {v.op: v.backend for v in rk.explain("cpu", torch.float32) if v.reason is None}
    assert (chosen["sort"], chosen["saliency"]) == ("cuda", "reference")
    assert chosen["layer"] == "cpu"


@pytest.mark.parametrize("value", ["sort=", "srt=cuda", "sort=cuda=triton", "sort=cuda,"])
def test_a_wrong_request_for_one_op_is_named(monkeypatch, value: str) -> None:
    monkeypatch.setenv("REAP_BACKEND", value)
    with pytest.raises(BackendUnavailable, match="op=backend pairs with commas"):
        rk.sort_by_expert(torch.zeros(4, 1, dtype=torch.int64), 4)
