"""Only what computes the same is bound: look-alikes are left alone, and said."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reap_driver as rd
import reap_kernels
from reap_driver.fusing.norms import NormFormula, norm_formula
from reap_driver.fusing.rotary_formula import Form, Layout, layout_of
from reap_driver.fusing.sites import NormSite, RotarySite
from reap_kernels import rms_norm, rotary
from reap_kernels.errors import UnsupportedModel
from tests.driver import zoo

HALF = torch.bfloat16


class Norm(nn.Module):
    """An RMS norm as most models have it; a subclass changes one thing."""

    eps = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(48, dtype=HALF))
        self.epsilon = self.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)


class AfterProduct(Norm):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return ((1 + self.weight.float()) * wide).to(x.dtype)


class Centered(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class OutsideRoot(Norm):
    """eps is added to the root, not to the mean."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + self.epsilon)
        return self.weight * wide.to(x.dtype)


class Clamped(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-2, 2)


class Grouped(Norm):
    """A norm of each half."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.float().unflatten(-1, (2, -1))
        halves = halves * torch.rsqrt(halves.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * halves.flatten(-2).to(x.dtype)


class TwoInputs(Norm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Positional(Norm):
    """Another scale for the first row."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.cat([out[:1], 1.01 * out[1:]])


def test_formulas_are_found() -> None:
    assert norm_formula(Norm(), HALF) == NormFormula(1e-6, 0.0, True)
    assert norm_formula(AfterProduct(), HALF) == NormFormula(1e-5, 1.0, False)
    assert norm_formula(Norm().to("meta"), HALF) == NormFormula(1e-6, 0.0, True)


@pytest.mark.parametrize("kind", [Centered, OutsideRoot, Clamped, Grouped, TwoInputs, Positional])
def test_other_norms_have_no_formula(kind: Callable[[], nn.Module]) -> None:
    assert isinstance(norm_formula(kind(), HALF), str)


def halves(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turned(q), turned(k)


def backwards(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return halves(q, k, cos, -sin)


def one_of_two(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return (halves(q, k, cos, sin)[0],)


def with_more(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return *halves(q, k, cos, sin), None


def one_in_a_tuple(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return (halves(x, x, cos, sin)[0],)


def queries_only(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return halves(q, k, cos, sin)[0], k


def exchanged(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return halves(q, k, sin, cos)


def scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return tuple(1.01 * one for one in halves(q, k, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_rotations_of_halves_are_found(dtype: torch.dtype) -> None:
    form = Form.of(halves)
    assert form is not None
    assert layout_of(halves, form, "all", dtype, dtype, rotary) == Layout()


@pytest.mark.parametrize(
    "other",
    [backwards, queries_only, exchanged, scaled, one_of_two, with_more, one_in_a_tuple],
)
def test_other_rotations_have_no_layout(other: Callable[..., Any]) -> None:
    form = Form.of(other)
    assert form is not None
    for columns in ("all", "half", "fewer"):
        assert layout_of(other, form, columns, torch.float32, torch.float32, rotary) is None


class OverTokens(Norm):
    """Of one norm over all dimensions but the first: an RMS norm of rows that come alone."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float().flatten(1)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.view(x.shape).to(x.dtype)


def test_the_first_call_has_the_dimensions_of_the_real_input() -> None:
    module = OverTokens()
    formula = norm_formula(module, HALF)
    assert isinstance(formula, NormFormula)
    site = NormSite("norm", "weight", formula, None)
    x = torch.arange(1.0, 6 * 48 + 1).view(2, 3, 48).to(HALF)
    with torch.no_grad():
        found = site.forward(module, module.forward, (x,), {})
        assert torch.equal(found, module(x))
    assert "differs from the kernel by" in site.left


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_zeros_is_not_all_that_is_compared(side: str) -> None:
    """A wrong formula gives zeros their norm too."""
    module = Norm()
    site = NormSite("norm", "weight", NormFormula(1e-6, 1.0, True), None)
    x = torch.ones(2, 6, 48, dtype=HALF)
    x[:, slice(0, 4) if side == "left" else slice(2, 6)] = 0
    with torch.no_grad():
        assert torch.equal(site.forward(module, module.forward, (x,), {}), module(x))
    assert "differs from the kernel by" in site.left


class InAutocast(Norm):
    """Computes in the dtype of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        on = torch.is_autocast_enabled("cpu")
        return super().forward(x).to(torch.get_autocast_dtype("cpu") if on else x.dtype)


def test_a_call_under_autocast_is_compared_by_itself() -> None:
    module = InAutocast().float()
    formula = norm_formula(module, torch.float32)
    assert isinstance(formula, NormFormula)
    site = NormSite("norm", "weight", formula, None)
    x = torch.arange(1.0, 97).view(2, 48)
    with torch.no_grad():
        assert site.forward(module, module.forward, (x,), {}).dtype == torch.float32
        assert site.left == ""
        with torch.autocast("cpu", torch.bfloat16):
            assert site.forward(module, module.forward, (x,), {}).dtype == torch.bfloat16
    assert "another shape or dtype" in site.left


def inverse(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Any:
    return halves(q, k, cos, -sin if back else sin)


def test_arguments_that_the_probe_did_not_have_run_the_models_own_code() -> None:
    form = Form.of(inverse)
    assert form is not None
    site = RotarySite("rotary", inverse, form, None)
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 16, generator=rng) for heads in (3, 2))
    cos, sin = (torch.randn(1, 5, 16, generator=rng) for _ in range(2))
    cases: list[tuple[dict[str, bool], int]] = [({}, 1), ({"back": False}, 2), ({"back": True}, 2)]
    with torch.no_grad():
        for given, calls in cases:
            found = site(q, k, cos, sin, **given)
            torch.testing.assert_close(found, inverse(q, k, cos, sin, **given))
            assert site.calls == calls


@pytest.mark.parametrize("kind", ["dtype of keys", "dtype of sin", "tokens"])
def test_heads_that_the_kernel_refuses_run_the_models_own_code(kind: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 5, 16, generator=rng) for heads in (3, 2))
    cos, sin = (torch.randn(1, 5, 16, generator=rng) for _ in range(2))
    if kind == "dtype of keys":
        k = k.double()
    elif kind == "dtype of sin":
        sin = sin.double()
    else:
        k = k[:, :, :1]
    form = Form.of(halves)
    assert form is not None
    site = RotarySite("rotary", halves, form, None)
    with torch.no_grad():
        for one, two in zip(site(q, k, cos, sin), halves(q, k, cos, sin), strict=True):
            assert torch.equal(one, two)
    assert (site.calls, site.left) == (0, "")


def test_another_thread_rotates_while_one_is_probed() -> None:
    form = Form.of(halves)
    assert form is not None
    site = RotarySite("rotary", halves, form, None)
    given = [torch.ones(1, 1, 5, 16)] * 2 + [torch.full((1, 5, 16), 2.0)] * 2
    seen: list[Any] = []
    with site.watched(seen.append), ThreadPoolExecutor(1) as pool:
        assert site(*given)[0] is given[0]
        other = pool.submit(torch.no_grad()(site), *given).result()
    torch.testing.assert_close(other, halves(*given))
    assert len(seen) == 1


@pytest.mark.parametrize("fault", ["norm", "residual", "rotary"])
def test_the_first_call_is_compared(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong on real inputs is not used, from the first call on."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).logits
    own_norm, own_rotary = rms_norm, rotary
    context = rd.fused(model)
    with context:

        def norm(x: Tensor, *args: Any, residual: Any = None, **kwargs: Any) -> Any:
            out = own_norm(x, *args, residual=residual, **kwargs)
            if residual is not None:
                return (out[0], 1.01 * out[1]) if fault == "residual" else out
            return 1.01 * out if fault == "norm" else out

        def turn(*args: Any, **kwargs: Any) -> Any:
            out = own_rotary(*args, **kwargs)
            real = args[0].shape[-1] == 8  # the made inputs are wider
            return (out[0], 1.01 * out[1]) if fault == "rotary" and real else out

        monkeypatch.setattr(reap_kernels, "rms_norm", norm)
        monkeypatch.setattr(reap_kernels, "rotary", turn)
        with torch.no_grad():
            assert torch.equal(model(**inputs, use_cache=False).logits, plain)
    expected = {
        "norm": {"input_layernorm", "q_norm", "k_norm", "norm"},
        "residual": {"post_attention_layernorm"},
        "rotary": {"apply_rotary_pos_emb"},
    }
    assert {name.rpartition(".")[2] for name in context.left} == expected[fault]
    assert all("differs from the kernel by" in reason for reason in context.left.values())


def test_a_layout_that_is_not_found_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that fits elsewhere, and not in the call that the model makes."""
    config, model = zoo.tiny("qwen3_moe")
    with rd.fused(model) as fused:
        monkeypatch.setattr("reap_driver.fusing.sites.layout_of", lambda *_: None)
        fused(**zoo.tiny_inputs("qwen3_moe", config))
    assert "rotary" not in fused.bound.values()
    assert "none of the layouts" in fused.left["modeling_qwen3_moe.apply_rotary_pos_emb"]


def test_a_change_in_place_is_refused() -> None:
    """A residual that is overwritten before its sum is computed would be wrong silently."""
    from reap_driver.fusing.deferred import Branch

    residual = torch.zeros(3)
    total = residual + Branch.of(torch.ones(3))
    residual.add_(1)
    with pytest.raises(UnsupportedModel, match="in place"):
        total.sum()


def test_a_computed_sum_lets_go_of_what_it_added() -> None:
    """The model keeps the sum as its residual, while its MLP needs the memory."""
    from reap_driver.fusing.deferred import Branch

    residual = torch.ones(3)
    total = residual + Branch.of(torch.ones(3))
    held = weakref.ref(residual)
    del residual
    assert held() is not None
    assert torch.equal(total * 1, torch.full((3,), 2.0))
    assert held() is None


def test_deferred_tensors_have_their_values() -> None:
    """Whatever touches one gets the value: functions, lists of tensors, operators in place."""
    from reap_driver.fusing.deferred import Branch, Sum

    ones = torch.ones(2, 3)
    total = ones + Branch.of(ones)
    assert isinstance(total, Sum)
    assert total.shape == (2, 3)
    assert total.parts is not None
    assert torch.equal(torch.cat([total, ones]), torch.cat([2 * ones, ones]))
    assert total.parts is None
    assert type(total * 2) is Tensor
    changed: Any = Branch.of(torch.ones(3))
    changed += 1
    assert torch.equal(torch.as_tensor(changed), torch.full((3,), 2.0))
