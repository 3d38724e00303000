"""rms_norm against a model's own operations and against float64: every backend, dtype, rounding.

What a model computes is spelled here in torch's operations, by none of the library's code. Bounds
are those the docstring states.
"""

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels import selfcheck
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
from reap_kernels.norm import gpu, triton_backend

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 1e-6


def llama(x: Tensor, weight: Tensor) -> Tensor:
    """Rounded to x's dtype, then multiplied: Llama, Qwen3, Mixtral, DeepSeek-V3, GLM-4."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    """Weights are differences from 1, and all is float32: Gemma, Qwen3-Next, Qwen3.5."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + weight.float())).type_as(x)


def gpt_oss(x: Tensor, weight: Tensor) -> Tensor:
    """All in float32, one rounding: gpt-oss, OLMo 3, Nemotron-H."""
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
    return (weight * y).to(x.dtype)


def weightless(x: Tensor, weight: None) -> Tensor:
    """nanochat, and norms of Gemma 4 without a scale."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)


MODELS = {
    llama: {"round_first": True},
    gemma: {"offset": 1.0},
    gpt_oss: {},
    weightless: {},
}


def inputs(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of the order of 1, 1e-3 and 1e3, and a weight."""
    rng = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, width, generator=rng)
        * 10.0 ** (3 * (torch.arange(rows) % 3 - 1))[:, None]
    )
    return x.to(dtype), torch.randn(width, generator=rng).to(dtype)


def units(got: Tensor, want: Tensor) -> Tensor:
    """Distances in units of the last place: how many numbers of the dtype lie between."""
    assert got.dtype == want.dtype
    kind = {2: torch.int16, 4: torch.int32}[got.element_size()]

    def place(x: Tensor) -> Tensor:
        bits = x.contiguous().view(kind).long()
        return torch.where(bits < 0, -(bits & (2 ** (8 * x.element_size() - 1) - 1)), bits)

    return (place(got) - place(want)).abs()


def as_model(got: Tensor, want: Tensor, backend: str, round_first: bool) -> None:
    """What the docstring says of results beside the same operations in torch."""
    assert got.shape == want.shape
    if backend == "cpu":
        assert torch.equal(got, want)
    elif got.dtype == torch.float32:
        assert bool(((got - want).abs() <= 1e-6 * want.abs()).all())
    else:
        apart = units(got, want)
        assert int(apart.max()) <= (2 if round_first else 1)
        assert float((apart == 0).float().mean()) >= 0.99


# 1: nothing to sum; 16: several programs of many rows; 16,384: the widest. Their tiles depend on no
# dtype, so one of them is enough for the others.
SIZES = [
    *((rows, width, torch.bfloat16) for rows, width in ((1, 1), (70, 16), (2, 16384))),
    *((3, 1000, dtype) for dtype in DTYPES),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize(("rows", "width", "dtype"), SIZES, ids=str)
def test_models(model, rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    x, weight = inputs(rows, width, dtype, seed=width)
    given = None if model is weightless else weight
    got = rk.rms_norm(x, given, EPS, backend=backend, **MODELS[model])
    as_model(got, model(x, given), backend, model is llama)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(dtype: torch.dtype, backend: str) -> None:
    """Against float64: one rounding, and one more for the product where it is rounded first."""
    x, weight = inputs(6, 300, dtype)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + EPS).sqrt()
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    for offset, round_first in ((0.0, False), (1.0, False), (0.0, True)):
        got = rk.rms_norm(x, weight, EPS, offset=offset, round_first=round_first, backend=backend)
        want = exact * (offset + weight.double())
        bound = (2.01 if round_first else 1.01) * unit
        # Below 1e-4, numbers of fp16 are further apart than their size says.
        assert float(((got - want).abs() / want.abs().clamp(min=1e-4)).max()) <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual(dtype: torch.dtype, backend: str) -> None:
    """The sum has the bits of torch's, and the norm is that of the sum as it was rounded."""
    x, weight = inputs(6, 300, dtype)
    residual = inputs(6, 300, dtype, seed=1)[0]
    normed, total = rk.rms_norm(
        x, weight, EPS, round_first=True, residual=residual, backend=backend
    )
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rk.rms_norm(total, weight, EPS, round_first=True, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_another_dtype(backend: str) -> None:
    """As torch promotes: a norm rounded to bf16 times float32 is float32."""
    x, weight = inputs(5, 96, torch.bfloat16)
    wide = weight.float() + 2**-12
    first = rk.rms_norm(x, wide, EPS, round_first=True, backend=backend)
    assert first.dtype == llama(x, wide).dtype == torch.float32
    once = rk.rms_norm(x, wide, EPS, backend=backend)
    assert once.dtype == gpt_oss(x, wide).dtype == torch.bfloat16
    narrow = rk.rms_norm(x.float(), weight, EPS, round_first=True, backend=backend)
    assert narrow.dtype == torch.float32
    if backend != "reference":
        as_model(once, gpt_oss(x, wide), backend, False)
        as_model(narrow, llama(x.float(), weight), backend, True)
        if backend == "cpu":
            assert torch.equal(first, llama(x, wide))
        else:  # 1 unit of bf16, in which the norm was rounded
            apart = (first - llama(x, wide)).abs()
            assert bool((apart <= 2**-7 * first.abs()).all())
            assert float((apart <= 1e-6 * first.abs()).float().mean()) >= 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Heads of a projection, columns far apart, one row for all, and dimensions that do not merge;
    results lie as torch's operations would lay them.
    """
    x, weight = inputs(2 * 3 * 4, 40, torch.float16)
    plain = rk.rms_norm(x, weight, EPS, backend=backend)
    heads = x.view(2, 3, 4, 40).transpose(1, 2)
    got = rk.rms_norm(heads, weight, EPS, residual=heads * 0, backend=backend)[0]
    assert torch.equal(got, plain.view(2, 3, 4, 40).transpose(1, 2))
    assert got.stride() == heads.stride()
    spread = torch.empty(40, 24, dtype=x.dtype).T.copy_(x)
    sparse = torch.full((80,), torch.nan, dtype=x.dtype)[::2].copy_(weight)
    assert torch.equal(rk.rms_norm(spread, sparse, EPS, backend=backend), plain)
    one = rk.rms_norm(x[:1].expand(3, 40), weight, EPS, backend=backend)
    assert torch.equal(one, plain[:1].expand(3, 40))
    five = torch.full((2, 2, 2, 2, 3, 60), torch.nan, dtype=x.dtype)[:, :, :, :, ::2, 10:50]
    five = five.permute(3, 0, 2, 1, 4, 5).copy_(x.view(3, 8, 40)[:1].expand(4, 8, 40).reshape(
        2, 2, 2, 2, 2, 40
    ))  # fmt: skip
    want = rk.rms_norm(five.contiguous(), weight, EPS, backend=backend)
    assert torch.equal(rk.rms_norm(five, weight, EPS, backend=backend), want)
    assert rk.rms_norm(x[0], weight, EPS, backend=backend).shape == (40,)


@pytest.mark.parametrize("steps", [(1 << 30, 1), (1, 1 << 27)], ids=["rows", "columns"])
def test_addresses_beyond_31_bits(steps: tuple[int, int]) -> None:
    """Memory that is not touched is never taken."""
    x, weight = inputs(3, 20, torch.float16)
    far = torch.empty(1 + 2 * steps[0] + 19 * steps[1], dtype=x.dtype).as_strided((3, 20), steps)
    far.copy_(x)
    got = rk.rms_norm(far, weight, EPS, residual=far, backend="triton")
    want = rk.rms_norm(x, weight, EPS, residual=x, backend="triton")
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def test_leading_dimensions_merge() -> None:
    """Into at most three, or none of a size; more are launched one by one."""
    plain = torch.empty(2, 3, 4, 5)
    assert gpu._merged([plain, plain]) == ([1, 1, 24], [0, 0, 5, 1] * 2)
    heads = plain.transpose(1, 2)
    assert gpu._merged([heads]) == ([2, 4, 3], [60, 5, 20, 1])
    assert gpu._merged([plain, heads.contiguous().transpose(1, 2)])[0] == [2, 3, 4]
    assert gpu._merged([plain.permute(2, 1, 0, 3).unsqueeze(0).expand(7, 4, 3, 2, 5)]) is None


def test_tiles_fill_a_device() -> None:
    """Two of 16,384 rows of 2,048 columns for a program, at most 32 elements for a thread."""
    block = gpu.power_of_two(2048)
    rows = gpu.rows_of_tile(block, 64)
    assert 16384 // rows >= 8 * 132  # programs for each multiprocessor of an H100
    for width in (1, 16, 128, 2048, 5120, triton_backend.MOST):
        tile = gpu.power_of_two(width) * gpu.rows_of_tile(gpu.power_of_two(width), 64)
        assert tile <= 32 * 32 * gpu.warps_of_tile(tile) or tile < 1024
        assert gpu.warps_of_tile(tile) in (1, 2, 4, 8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_is_beside_a_row(backend: str) -> None:
    x, weight = inputs(70, 96, torch.bfloat16)
    whole = rk.rms_norm(x, weight, EPS, backend=backend)
    assert torch.equal(whole, rk.rms_norm(x, weight, EPS, backend=backend))
    alone = [rk.rms_norm(x[n : n + 1], weight, EPS, backend=backend) for n in (0, 45, 69)]
    assert torch.equal(whole[[0, 45, 69]], torch.cat(alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_finite(backend: str) -> None:
    """Stay what they are, and change no other; a row of zeros stays zeros."""
    x, weight = inputs(4, 64, torch.bfloat16)
    want = rk.rms_norm(x, weight, EPS, backend=backend)
    x[1, 7] = torch.nan
    x[2] = 0
    got = rk.rms_norm(x, weight, EPS, backend=backend)
    assert got[1].isnan().all()
    assert not got[2].any()
    assert torch.equal(got[[0, 3]], want[[0, 3]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    got, total = rk.rms_norm(
        torch.empty(3, 0, 8), None, EPS, residual=torch.empty(3, 0, 8), backend=backend
    )
    assert got.shape == total.shape == (3, 0, 8)


@pytest.mark.parametrize(
    ("error", "mentions", "changes"),
    [
        (ShapeError, r"x has shape \(\)", {"x": torch.tensor(1.0)}),
        (ShapeError, "H >= 1", {"x": torch.zeros(4, 0)}),
        (DtypeError, "x is torch.float64", {"x": torch.zeros(4, 6).double()}),
        (DtypeError, "weight is torch.int64", {"weight": torch.zeros(6).long()}),
        (DtypeError, "x is on cpu, weight on meta", {"weight": torch.zeros(6, device="meta")}),
        (ShapeError, r"weight has shape \(5,\); expected \(6,\)", {"weight": torch.zeros(5)}),
        (ShapeError, r"residual has shape \(6,\)", {"residual": torch.zeros(6)}),
        (DtypeError, "residual is torch.float16", {"residual": torch.zeros(4, 6).half()}),
        (UsageError, "eps is -1", {"eps": -1.0}),
        (UsageError, "eps is nan", {"eps": float("nan")}),
        (UsageError, "offset is inf", {"offset": float("inf")}),
    ],
)
def test_refusals(error: type[Exception], mentions: str, changes: dict) -> None:
    with pytest.raises(error, match=mentions):
        rk.rms_norm(**{"x": torch.zeros(4, 6), "weight": torch.zeros(6), "eps": EPS} | changes)


def test_what_triton_refuses(monkeypatch) -> None:
    wide = torch.zeros(2, 16385)
    with pytest.raises(BackendUnavailable, match="16385 columns, its programs hold 16384"):
        rk.rms_norm(wide, None, EPS, backend="triton")
    many = torch.zeros(1, 1).expand(1 << 31, 1)
    with pytest.raises(BackendUnavailable, match=r"reach 2\^31"):
        rk.rms_norm(many, None, EPS, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="TRITON_INTERPRET=1"):
        rk.rms_norm(wide, None, EPS, backend="triton")
    chosen = [v.backend for v in rk.explain() if v.op == "norm" and v.reason is None]
    assert chosen == ["cpu"]


@pytest.mark.parametrize(
    ("factor", "at", "words"), [(1.02, 0, "the norm is off by"), (2.0, 1, "the sum differs")]
)
def test_wrong_numbers_refuse_the_kernel(factor: float, at: int, words: str, monkeypatch, tmp_path):
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path))
    selfcheck.forget()
    sound = gpu.rms_norm

    def wrong(*arguments):
        results = list(sound(*arguments))
        results[at] = None if results[at] is None else results[at] * factor
        return results

    monkeypatch.setattr(gpu, "rms_norm", wrong)
    try:
        with pytest.raises(BackendUnavailable, match=words):
            rk.rms_norm(torch.ones(2, 10).half(), None, EPS, backend="triton")
    finally:
        selfcheck.forget()


@pytest.mark.parametrize("backend", [None, "triton"])
def test_opcheck(backend: str | None) -> None:
    x, weight = inputs(6, 30, torch.bfloat16)
    operator = torch.ops.reap_kernels.rms_norm.default
    for residual, wide in ((None, weight), (x, weight.float())):
        arguments = (x, wide, residual, EPS, 0.0, True, backend)
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break() -> None:
    x, weight = inputs(3, 30, torch.float32)

    def both(x, weight):
        normed, total = rk.rms_norm(x, weight, EPS, residual=x)
        return normed + total

    fast = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(x, weight), both(x, weight))


def test_compiles_with_numbers_that_are_arguments() -> None:
    """As of one function for norms that differ in `eps`, which torch then traces as a symbol."""
    x, weight = inputs(3, 30, torch.float32)
    fast = torch.compile(rk.rms_norm, backend="aot_eager", fullgraph=True, dynamic=True)
    for eps in (1e-6, 1e-2):
        want = rk.rms_norm(x, weight, eps, offset=2 * eps)
        assert torch.equal(fast(x, weight, eps, offset=2 * eps), want)
