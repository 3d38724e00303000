"""rotary against models' own operations and against float64: every backend, dtype, layout of pairs.

What a model computes is spelled here in torch's operations, by none of the library's code. Bounds
are those the docstring states.
"""

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_kernels import selfcheck
from reap_kernels.errors import BackendUnavailable, DtypeError, ShapeError, UsageError
from reap_kernels.rotary import gpu
from tests.ops.test_norm import DTYPES, EPS, gemma, llama, units

BACKENDS = ("reference", "cpu", "triton")


def half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def every_two(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def llama_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (x * cos) + (half(x) * sin)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """MiniMax-M2, Qwen3-Next, GLM-4-MoE."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([llama_rope(turned, cos, sin), rest], dim=-1)


def glm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (
        t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1)[:, None] for t in (cos, sin)
    )
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([(turned * cos) + (every_two(turned) * sin), rest], dim=-1)


def ernie(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (
        t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1)[:, None] for t in (cos, sin)
    )
    return ((x.float() * cos) + (every_two(x).float() * sin)).to(x.dtype)


def cohere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y, cos, sin = x.float(), cos.unsqueeze(1), sin.unsqueeze(1)
    return ((y * cos) + (every_two(y) * sin)).to(x.dtype)


def deepseek_v3(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[..., : t.shape[-1] // 2].unsqueeze(1) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def gpt_oss_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[..., : t.shape[-1] // 2].unsqueeze(1) for t in (cos, sin))
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def deepseek_v4(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The last columns are rotated."""
    rest, turned = x[..., : -cos.shape[-1]], x[..., -cos.shape[-1] :]
    return torch.cat([rest, ernie(turned, cos, sin)], dim=-1)


PAIRS = {"per_pair": True}
# Columns that are rotated, of 24, and the options that the docstring names.
MODELS = {
    llama_rope: (24, {}),
    partial: (12, {}),
    glm: (12, {"interleaved": True, **PAIRS}),
    ernie: (24, {"interleaved": True, "float32": True, **PAIRS}),
    cohere: (24, {"interleaved": True, "float32": True}),
    deepseek_v3: (24, {"interleaved": True, "separate": True, **PAIRS}),
    gpt_oss_rope: (24, PAIRS),
    deepseek_v4: (8, {"interleaved": True, "float32": True, "start": 16, **PAIRS}),
}


def heads(
    count: int, dtype: torch.dtype, seed: int = 0, tokens: int = 3, width: int = 24
) -> Tensor:
    """[2, count, tokens, width], as a projection leaves it: the heads of a token lie together."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, count, width, generator=rng).to(dtype).transpose(1, 2)


def tables(columns: int, dtype: torch.dtype, tokens: int = 3, batch: int = 2) -> list[Tensor]:
    """Cosines and sines of other angles for each column, so that no column stands for another."""
    rng = torch.Generator().manual_seed(columns)
    angles = 6 * torch.rand(batch, tokens, columns, generator=rng)
    return [angles.cos().to(dtype), angles.sin().to(dtype)]


def given(columns: list[Tensor], options: dict) -> list[Tensor]:
    """The tables as the op takes them."""
    per_pair = options.get("per_pair")
    return [t[..., : t.shape[-1] // 2] if per_pair else t for t in columns]


# Every dtype has roundings one by one and in float32; which columns are a pair depends on none.
COMBINATIONS = [
    pytest.param(model, dtype, id=f"{model.__name__}-{dtype}")
    for model in MODELS
    for dtype in DTYPES
    if dtype == torch.bfloat16 or model in (llama_rope, ernie)
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize(("model", "dtype"), COMBINATIONS)
def test_models(model, dtype: torch.dtype, backend: str) -> None:
    """The bits of the model, and the strides that its operations would give."""
    rotated, options = MODELS[model]
    q, k = heads(6, dtype), heads(1, dtype, seed=1)
    full = tables(rotated, dtype)
    got = rk.rotary(q, k, *given(full, options), backend=backend, **options)
    for ours, x in zip(got, (q, k), strict=True):
        assert torch.equal(ours, model(x, *full))
        assert ours.stride() == x.stride()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("norm", [llama, gemma], ids=lambda norm: norm.__name__)
@pytest.mark.parametrize(
    ("rope", "dtype"),
    [*((llama_rope, dtype) for dtype in DTYPES), (partial, torch.bfloat16), (glm, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_norms_before(rope, norm, dtype: torch.dtype, backend: str) -> None:
    """As in Qwen3 and Qwen3-Next: the norm may be off by units of the last place."""
    rotated, options = MODELS[rope]
    q, k = heads(6, dtype), heads(2, dtype, seed=1)
    weights = [heads(1, dtype, seed=n)[0, 0, 0] for n in (2, 3)]
    full = tables(rotated, dtype)
    form = {"round_first": True} if norm is llama else {"offset": 1.0}
    named = dict(zip(("q_weight", "k_weight"), weights, strict=True))
    got = rk.rotary(
        q, k, *given(full, options), **options, **named, **form, eps=EPS, backend=backend
    )
    for ours, x, weight in zip(got, (q, k), weights, strict=True):
        normed = norm(x, weight)
        want = rope(normed, *full)
        if backend == "cpu":
            assert torch.equal(ours, want)
            continue
        size = normed.abs().amax(dim=-1, keepdim=True)
        unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
        # Both elements of a pair by that much, and then three roundings.
        assert bool(((ours - want).abs() <= 4 * unit * size).all())
        if dtype != torch.float32:
            assert float((units(ours, want) == 0).float().mean()) >= 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_formula(backend: str) -> None:
    """Against float64, with a norm of the keys alone, whose weight is of another dtype."""
    q, k = heads(2, torch.float16), heads(3, torch.float16, seed=1)
    weight = heads(1, torch.float32, seed=2)[0, 0, 0]
    cos, sin = tables(24, torch.float32, batch=1)
    got = rk.rotary(q, k, cos, sin, float32=True, k_weight=weight, eps=0.1, backend=backend)
    normed = k.double() / (k.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    for ours, x in zip(got, (q.double(), normed), strict=True):
        want = llama_rope(x, cos.double(), sin.double())
        bound = 2**-9 * x.abs().amax(-1, keepdim=True)
        assert bool(((ours - want).abs() <= bound).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Parts of one projection, complex factors, tables far apart, one sequence's for all."""
    whole = torch.full((2, 3, 5, 60), torch.nan, dtype=torch.float16).transpose(1, 2)
    q, k = whole[:, :3, :, 10:34], whole[:, 3:, :, 10:58:2]
    q.copy_(heads(3, q.dtype)), k.copy_(heads(2, q.dtype, seed=1))
    cos, sin = tables(12, torch.float32, batch=1)
    factors = torch.complex(cos, sin)
    options = {"per_pair": True, "float32": True, "interleaved": True, "backend": backend}
    got = rk.rotary(q, k, factors.real, factors.imag, **options)
    want = rk.rotary(
        q.contiguous(), k.contiguous(), cos.expand(2, 3, 12), sin.repeat(2, 1, 1), **options
    )
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("far", ["heads", "tokens", "columns"])
def test_addresses_beyond_31_bits(far: str) -> None:
    """Memory that is not touched is never taken."""
    q = heads(3, torch.float16)[:1]
    cos, sin = tables(24, q.dtype, batch=1)
    steps = {
        "heads": (1, 1 << 30, 24, 1),
        "tokens": (1, 24, 1 << 30, 1),
        "columns": (1, 1, 3, 1 << 27),
    }
    room = 1 + sum((n - 1) * step for n, step in zip(q.shape, steps[far], strict=True))
    spread = torch.empty(room, dtype=q.dtype).as_strided(q.shape, steps[far]).copy_(q)
    got = rk.rotary(spread, spread, cos, sin, backend="triton")
    for ours in got:
        assert torch.equal(ours, llama_rope(q, cos, sin))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_and_without_tokens(backend: str) -> None:
    q = heads(6, torch.float32)
    cos, sin = tables(24, torch.float32)
    alone, nothing = rk.rotary(q, None, cos, sin, backend=backend)
    assert nothing is None
    assert torch.equal(alone, rk.rotary(q, q[:, :1], cos, sin, backend=backend)[0])
    empty = rk.rotary(q[:, :, :0], q[:, :0, :0], cos[:, :0], sin[:, :0], backend=backend)
    assert [x.shape for x in empty] == [(2, 6, 0, 24), (2, 0, 0, 24)]


@pytest.mark.parametrize("heads_q", [1, 5, 40])
def test_blocks_of_heads(heads_q: int) -> None:
    """40 heads of 256 columns are three blocks, the last of which is not full."""
    q, k = (heads(n, torch.float16, tokens=1, width=256) for n in (heads_q, 3))
    cos, sin = tables(256, q.dtype, tokens=1)
    got = rk.rotary(q, k, cos, sin, backend="triton")
    for ours, x in zip(got, (q, k), strict=True):
        assert torch.equal(ours, llama_rope(x, cos, sin))


@pytest.mark.parametrize(
    ("error", "mentions", "changes"),
    [
        (ShapeError, r"q has shape \(6,\)", {"q": torch.zeros(6)}),
        (ShapeError, r"k has shape \(2, 1, 4, 6\)", {"k": torch.zeros(2, 1, 4, 6)}),
        (DtypeError, "q is torch.float64", {"q": torch.zeros(2, 1, 3, 6).double()}),
        (
            DtypeError,
            "k is torch.float16, q is torch.float32",
            {"k": torch.zeros(2, 1, 3, 6).half()},
        ),
        (DtypeError, "q is on cpu, k on meta", {"k": torch.zeros(2, 1, 3, 6, device="meta")}),
        (ShapeError, r"cos has shape \(3, 6\)", {"cos": torch.zeros(3, 6)}),
        (ShapeError, r"cos has shape \(5, 3, 6\)", {"cos": torch.zeros(5, 3, 6)}),
        (ShapeError, r"sin is torch.float32 \(1, 3, 4\)", {"sin": torch.zeros(1, 3, 4)}),
        (ShapeError, "for 12 columns of q", {"per_pair": True}),
        (ShapeError, "from start=2", {"start": 2}),
        (ShapeError, "from start=-2", {"start": -2}),
        (
            ShapeError,
            "for 5 columns of q",
            {"cos": torch.zeros(1, 3, 5), "sin": torch.zeros(1, 3, 5)},
        ),
        (
            DtypeError,
            "or give float32=True",
            {"q": torch.zeros(2, 1, 3, 6).half(), "k": None},
        ),
        (UsageError, "separate=True is for interleaved", {"separate": True}),
        (UsageError, "k_weight is given without k", {"k": None, "k_weight": torch.zeros(6)}),
        (ShapeError, r"q_weight has shape \(4,\)", {"q_weight": torch.zeros(4)}),
        (
            DtypeError,
            "k_weight is torch.float16, q is torch.float32",
            {"k_weight": torch.zeros(6).half(), "round_first": True},
        ),
        (UsageError, "eps is -1", {"eps": -1.0}),
    ],
)
def test_refusals(error: type[Exception], mentions: str, changes: dict) -> None:
    x, table = torch.zeros(2, 1, 3, 6), torch.zeros(1, 3, 6)
    with pytest.raises(error, match=mentions):
        rk.rotary(**{"q": x, "k": x, "cos": table, "sin": table} | changes)


def test_what_triton_refuses(monkeypatch) -> None:
    wide, table = torch.zeros(1, 1, 1, 16386), torch.zeros(1, 1, 2)
    with pytest.raises(BackendUnavailable, match="16386 columns, its programs hold 16384"):
        rk.rotary(wide, None, table, table, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    chosen = [v.backend for v in rk.explain() if v.op == "rotary" and v.reason is None]
    assert chosen == ["cpu"]


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda form, passed: form.round_first, id="norm"),
        pytest.param(lambda form, passed: form.float32, id="one rounding"),
        pytest.param(lambda form, passed: form.separate, id="separate"),
        pytest.param(lambda form, passed: passed and not form.interleaved, id="columns that pass"),
    ],
)
def test_wrong_numbers_refuse_the_kernel(broken, monkeypatch, tmp_path) -> None:
    """A kernel that turns keys the other way in one form never serves."""
    monkeypatch.setenv("REAP_CACHE_DIR", str(tmp_path))
    selfcheck.forget()
    sound = gpu.rotary

    def wrong(q, k, cos, sin, *rest):
        form, columns = rest[-1], cos.shape[-1] * (2 if rest[-1].per_pair else 1)
        keys = -sin if broken(form, columns < q.shape[-1]) else sin
        return sound(q, k, cos, sin, *rest)[0], sound(q, k, cos, keys, *rest)[1]

    monkeypatch.setattr(gpu, "rotary", wrong)
    q, (cos, sin) = heads(2, torch.float16), tables(24, torch.float16)
    try:
        with pytest.raises(BackendUnavailable, match="k is off by"):
            rk.rotary(q, q, cos, sin, backend="triton")
    finally:
        selfcheck.forget()


@pytest.mark.parametrize("backend", [None, "triton"])
def test_opcheck(backend: str | None) -> None:
    q, k = heads(2, torch.float16, tokens=1), heads(1, torch.float16, tokens=1)
    weight = q[0, 0, 0]
    cos, sin = tables(24, q.dtype, tokens=1)
    operator = torch.ops.reap_kernels.rotary.default
    for second, w in ((k, weight), (None, None)):
        form = (False, False, False, False, 0, EPS, 0.0, True)
        arguments = (q, second, cos, sin, weight, w, *form, backend)
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_compiles_without_a_graph_break() -> None:
    q, (cos, sin) = heads(2, torch.float32), tables(24, torch.float32)

    def both(q, cos, sin):
        turned, again = rk.rotary(q, q, cos, sin)
        return turned + again

    fast = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(q, cos, sin), both(q, cos, sin))
