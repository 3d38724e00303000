"""compare_logits against float64, on fresh logits of the order of one: every backend, dtype, case.

The truth is computed here from the definitions, with whole distributions, by none of the library's
code. Bounds are those the docstring states.
"""

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels import selfcheck
from reap_kernels.compare import gpu
from reap_kernels.dispatch import OPS
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError

BACKENDS = ("reference", "cpu", "triton")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOUND = 2e-6
INF = float("inf")
# The interpreter's numpy, of infinities and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def truth(full: Tensor, candidate: Tensor) -> dict[str, Tensor]:
    """By the definitions, in float64."""
    f, c = full.double(), candidate.double()
    lse_f, lse_c = f.logsumexp(1), c.logsumexp(1)
    p, q = (f - lse_f[:, None]).exp(), (c - lse_c[:, None]).exp()
    ratio = (f - lse_f[:, None]) - (c - lse_c[:, None])
    kl = [(a[a > 0] * r[a > 0]).sum() for a, r in zip(p, ratio, strict=True)]
    first = [[int((row == row.max()).nonzero()[0]) for row in x] for x in (f, c)]
    return {
        "acceptance": torch.minimum(p, q).sum(1),
        "kl": torch.stack(kl),
        "full_lse": lse_f,
        "candidate_lse": lse_c,
        "same_top": torch.tensor([a == b for a, b in zip(*first, strict=True)]),
    }


def close(got: rk.LogitComparison, want: dict[str, Tensor]) -> None:
    assert torch.equal(got.same_top, want["same_top"])
    for name in ("acceptance", "kl", "full_lse", "candidate_lse"):
        ours, theirs = getattr(got, name), want[name]
        assert ours.dtype == torch.float32
        assert ours.shape == theirs.shape
        endless = theirs.isinf()
        assert torch.equal(ours[endless].double(), theirs[endless]), name
        error = (ours - theirs)[~endless].abs() / theirs[~endless].abs().clamp(min=1)
        assert not len(error) or float(error.max()) <= BOUND, (name, float(error.max()))


def logits(rows: int, vocabulary: int, spread: float = 3.0, noise: float = 1.0, seed: int = 0):
    """Two [rows, vocabulary] float32, the second the first with noise that grows by row."""
    rng = torch.Generator().manual_seed(seed)
    full = spread * torch.randn(rows, vocabulary, generator=rng)
    scale = noise * torch.linspace(0.01, 1, rows)[:, None]
    return full, full + scale * torch.randn(rows, vocabulary, generator=rng)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 1), (9, 2), (5, 127), (7, gpu.BLOCK), (6, gpu.BLOCK + 1), (40, 4096), (3, 50257)],
)
def test_sizes(rows: int, vocabulary: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "triton":  # a program computes one row; interpreted, each takes its time
        rows = min(rows, 6)
    full, candidate = (x.to(dtype) for x in logits(rows, vocabulary, seed=vocabulary))
    got = rk.compare_logits(full, candidate, backend=backend)
    close(got, truth(full, candidate))
    known = rk.compare_logits(full, candidate, full_lse=got.full_lse, backend=backend)
    close(known, truth(full, candidate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [151936, 262144])
def test_large_vocabularies(vocabulary: int, backend: str) -> None:
    """Sums of many blocks and, but for 262,144, of a part of one."""
    full, candidate = logits(1 if backend == "triton" else 4, vocabulary, noise=0.5)
    close(rk.compare_logits(full, candidate, backend=backend), truth(full, candidate))
    flat = torch.zeros(1, vocabulary)  # a sum of as many equal terms
    close(rk.compare_logits(flat, flat + 1, backend=backend), truth(flat, flat + 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_skewed_rows(backend: str) -> None:
    """One token takes nearly all, or all that float32 can tell; both agree which, or do not."""
    full, candidate = logits(8, 5000, spread=1.0)
    for row, peak in enumerate((5, 12, 20, 40, 90, 150, 300, 1000)):
        full[row, 7 * row] += peak
        candidate[row, 7 * row + row % 2] += peak
    close(rk.compare_logits(full, candidate, backend=backend), truth(full, candidate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_rows(dtype: torch.dtype, backend: str) -> None:
    """Nothing lost where nothing differs, or by a constant only."""
    full = logits(*((2, 9000) if backend == "triton" else (16, 32000)))[0].to(dtype)
    got = rk.compare_logits(full, full.clone(), backend=backend)
    assert got.same_top.all()
    assert float((got.acceptance - 1).abs().max()) <= BOUND
    assert float(got.kl.abs().max()) <= BOUND / 4
    shifted = full.float() + 64
    got = rk.compare_logits(full, shifted, backend=backend)
    assert float((got.acceptance - 1).abs().max()) <= 2 * BOUND
    assert float(got.kl.abs().max()) <= BOUND


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_divergences_keep_their_digits(backend: str) -> None:
    """KL is of second order in a difference: at 1e-3 it is some 5e-7, and still there."""
    full, candidate = logits(16, 4096, noise=0.0)
    candidate = full + 1e-3 * torch.randn(full.shape, generator=torch.Generator().manual_seed(1))
    got, want = rk.compare_logits(full, candidate, backend=backend), truth(full, candidate)
    assert float((got.kl - want["kl"]).abs().max()) <= 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_of_equal_maxima(dtype: torch.dtype, backend: str) -> None:
    """Far apart, side by side, and in the last block; the same set of maxima or only its first."""
    full, candidate = torch.zeros(5, 5000, dtype=dtype), torch.zeros(5, 5000, dtype=dtype)
    places = [
        ((10, 4000), (10, 4000)),
        ((10, 4000), (4000,)),
        ((2047, 2048), (2047,)),
        ((4999,), (4999,)),
        ((130, 131), (131, 4097)),
    ]
    for row, (ours, theirs) in enumerate(places):
        full[row, list(ours)] = 5.0
        candidate[row, list(theirs)] = 4.0
    got = rk.compare_logits(full, candidate, backend=backend)
    assert got.same_top.tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_probability_zero(dtype: torch.dtype, backend: str) -> None:
    full, candidate = (x.to(dtype) for x in logits(6, 3000))
    full[0, 5:900] = -INF  # p = 0 where q is not
    full[1, 2000:] = candidate[1, 2000:] = -INF  # both
    candidate[2, 1234] = -INF  # q = 0 where p is not
    full[3, 1:] = -INF  # one token left
    candidate[4, :2999] = full[4, :2999] = -INF  # the same one, the last
    full[5, 0] = candidate[5, 2999] = -INF
    got, want = rk.compare_logits(full, candidate, backend=backend), truth(full, candidate)
    close(got, want)
    assert got.kl.isinf().tolist() == [False, False, True, False, False, True]
    assert float(got.acceptance[4]) == 1.0
    assert float(got.kl[4]) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", ["nan", "inf", "nothing"])
def test_rows_without_a_softmax(bad: str, backend: str) -> None:
    full, candidate = logits(5, 2500)
    for row, x in ((1, full), (3, candidate)):
        if bad == "nothing":
            x[row] = -INF
        else:
            x[row, 2200] = float(bad)
    got = rk.compare_logits(full, candidate, backend=backend)
    broken = [False, True, False, True, False]
    assert got.acceptance.isnan().tolist() == broken
    assert got.kl.isnan().tolist() == broken
    assert got.full_lse.isnan().tolist() == [False, True, False, False, False]
    assert got.candidate_lse.isnan().tolist() == [False, False, False, True, False]
    assert not got.same_top[torch.tensor(broken)].any()
    sound = torch.tensor(broken).logical_not()
    kept = rk.LogitComparison(**{name: values[sound] for name, values in vars(got).items()})
    close(kept, truth(full[sound], candidate[sound]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_mixed_dtypes(backend: str) -> None:
    full, candidate = logits(12, 700)
    want = truth(full[::2, :650], candidate.bfloat16()[::2, :650])
    spread = torch.empty(700, 12).T.copy_(full)  # columns far apart
    half = torch.full((12, 1000), torch.nan, dtype=torch.bfloat16)
    half[:, 300:] = candidate
    got = rk.compare_logits(spread[::2, :650], half[::2, 300:950], backend=backend)
    close(got, want)
    one = rk.compare_logits(full[:1].expand(3, 700), candidate[:3], backend=backend)
    close(one, truth(full[:1].expand(3, 700), candidate[:3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_is_beside_a_row(backend: str) -> None:
    rows = 5 if backend == "triton" else 50
    full, candidate = (x.bfloat16() for x in logits(rows, 5000))
    whole = rk.compare_logits(full, candidate, backend=backend)
    again = rk.compare_logits(full, candidate, backend=backend)
    alone = [
        rk.compare_logits(full[n : n + 1], candidate[n : n + 1], backend=backend)
        for n in (0, rows - 1)
    ]
    for name, values in vars(whole).items():
        assert torch.equal(values, vars(again)[name]), name
        assert torch.equal(values[[0, rows - 1]], torch.cat([vars(one)[name] for one in alone])), (
            name
        )


def test_no_rows() -> None:
    for backend in BACKENDS:
        got = rk.compare_logits(torch.empty(0, 9), torch.empty(0, 9), backend=backend)
        assert [tuple(x.shape) for x in vars(got).values()] == [(0,)] * 5


def test_scratch_is_bounded() -> None:
    """The CPU backend computes a few rows at a time, whatever their number."""
    full, candidate = logits(600, 4096)
    largest = 0

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            made = [
                x
                for x in (out if isinstance(out, tuple | list) else (out,))
                if isinstance(x, Tensor)
            ]
            own = {full.untyped_storage().data_ptr(), candidate.untyped_storage().data_ptr()}
            for x in made:
                if x.untyped_storage().data_ptr() not in own:
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    from reap_kernels.compare import cpu

    with Watched():
        cpu.compare_logits(full, candidate, None)
    assert largest <= 3 * 4 * cpu._BUFFER * torch.get_num_threads()


@pytest.mark.parametrize(
    ("error", "mentions", "changes"),
    [
        (ShapeError, r"full has shape \(4,\)", {"full": torch.zeros(4)}),
        (ShapeError, r"V >= 1", {"full": torch.zeros(4, 0), "candidate": torch.zeros(4, 0)}),
        (ShapeError, r"candidate has shape \(4, 7\)", {"candidate": torch.zeros(4, 7)}),
        (DtypeError, "full is torch.float64", {"full": torch.zeros(4, 6).double()}),
        (DtypeError, "candidate is torch.int64", {"candidate": torch.zeros(4, 6).long()}),
        (DtypeError, "candidate on meta", {"candidate": torch.zeros(4, 6, device="meta")}),
        (ShapeError, "full_lse has shape", {"full_lse": torch.zeros(3)}),
        (DtypeError, "full_lse is torch.float64", {"full_lse": torch.zeros(4).double()}),
    ],
)
def test_refusals(error: type[Exception], mentions: str, changes: dict) -> None:
    arguments = {"full": torch.zeros(4, 6), "candidate": torch.zeros(4, 6)} | changes
    with pytest.raises(error, match=mentions):
        rk.compare_logits(**arguments)


def test_explicit_backends_never_fall_back(monkeypatch) -> None:
    full, candidate = logits(2, 10)
    with pytest.raises(BackendUnavailable, match="'warp' does not exist for op 'compare'"):
        rk.compare_logits(full, candidate, backend="warp")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match=r"TRITON_INTERPRET=1"):
        rk.compare_logits(full, candidate, backend="triton")
    assert "compare" in OPS
    chosen = [v.backend for v in rk.explain() if v.op == "compare" and v.reason is None]
    assert chosen == ["cpu"]


def test_wrong_numbers_refuse_the_kernel(monkeypatch, tmp_path) -> None:
    """A kernel that divides by another sum, as a miscompiled one might, never serves."""
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path))
    selfcheck.forget()
    sound = gpu.compare_logits

    def wrong(full, candidate, known):
        acceptance, *rest = sound(full, candidate, known)
        return acceptance * (1 + 2e-5), *rest

    monkeypatch.setattr(gpu, "compare_logits", wrong)
    try:
        with pytest.raises(BackendUnavailable, match=r"acceptance is off by (1\.9|2\.\d)e-05"):
            rk.compare_logits(*logits(2, 10), backend="triton")
    finally:
        selfcheck.forget()


@pytest.mark.parametrize("backend", [None, "triton"])
def test_opcheck(backend: str | None) -> None:
    full, candidate = logits(3, 300)
    known = full.logsumexp(1)
    operator = torch.ops.reap_kernels.compare_logits.default
    for lse in (None, known):
        result = torch.library.opcheck(operator, (full, candidate, lse, backend))
        assert set(result.values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break() -> None:
    full, candidate = logits(3, 300)

    def mean(f, c):
        return rk.compare_logits(f, c).acceptance.mean()

    fast = torch.compile(mean, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(full, candidate), mean(full, candidate))
