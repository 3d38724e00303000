"""Test cases and layouts for MoE layers, for our tests, benchmarks and backend self-checks.

Data are N(0, 1) with outputs of order 1, so that a relative bound means something; routing comes
balanced, Zipf-skewed or all to one expert. Every case says why it exists.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reap_kernels.activation import Activation
from reap_kernels.quantized import FORMATS, MX_BLOCK, Quantized
from reap_kernels.types import ExpertWeights


@dataclass(frozen=True)
class Case:
    """One MoE layer call: sizes, how tokens are routed, and why the case exists."""

    name: str
    why: str
    tokens: int = 64
    experts: int = 8
    top_k: int = 2
    hidden: int = 32
    intermediate: int = 16
    skew: str = "balanced"
    foreign: float = 0.0
    zero_weights: float = 0.0
    masked: float = 0.0
    groups: int = 1


CASES = (
    Case("plain", "the common case"),
    Case("no-tokens", "an empty batch is legal", tokens=0),
    Case("one-token", "decode", tokens=1),
    Case("one-expert", "E = k = 1", experts=1, top_k=1),
    Case("all-experts", "k = E: every expert on every token", top_k=8, tokens=20),
    Case("wide-k", "k = 16", experts=24, top_k=16, tokens=12),
    Case("odd-sizes", "H, I, T not multiples of anything", tokens=37, hidden=33, intermediate=7),
    Case("zipf", "a few experts take most tokens, many take none", experts=64, skew="zipf"),
    Case("all-to-one", "one expert takes every token, in two pieces", tokens=1100, skew="one"),
    Case("foreign", "ids of other ranks, identity experts, -1", foreign=0.3),
    Case("zero-weights", "skipped slots carry weight 0", zero_weights=0.3),
    Case("masked", "padding is computed, not counted", masked=0.4),
    Case("groups", "calibration groups in one batch", groups=3),
    Case(
        "everything",
        "all of it at once",
        tokens=60,
        experts=12,
        top_k=4,
        skew="zipf",
        foreign=0.2,
        zero_weights=0.1,
        masked=0.3,
        groups=4,
    ),
)


# Where a counting sort can go wrong: several blocks, more experts than a block has slots, the tail.
ROUTING_CASES = (
    *(case for case in CASES if case.name in ("one-token", "all-to-one", "everything")),
    Case("many-experts", "E = 1024, k = 16", tokens=70, experts=1024, top_k=16, hidden=1),
)


@dataclass(frozen=True)
class Inputs:
    """Arguments of `observe_layer` for one case."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    mask: Tensor | None
    group: int | Tensor

    def to(self, device: torch.device | str) -> "Inputs":
        """The same inputs on `device`."""
        return Inputs(
            self.hidden.to(device),
            self.topk_ids.to(device),
            self.topk_weights.to(device),
            None if self.mask is None else self.mask.to(device),
            self.group if isinstance(self.group, int) else self.group.to(device),
        )


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs of `case`: hidden N(0, 1) in `dtype`, router weights summing to 1 per token."""
    rng = torch.Generator().manual_seed(seed)
    t, e, k = case.tokens, case.experts, case.top_k
    logits = torch.randn(t, e, generator=rng)
    if case.skew == "zipf":
        logits = logits - 2.0 * torch.arange(1, e + 1).log()
    weights, ids = torch.softmax(logits, dim=-1).topk(k, dim=-1)
    if case.skew == "one":
        ids = torch.full_like(ids, e // 2)
        ids[:, 1:] = e  # one served slot per token
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    if case.foreign:
        strange = torch.randint(0, 3, (t, k), generator=rng)
        strange = torch.tensor([-1, e, e + 5])[strange]
        ids = torch.where(torch.rand(t, k, generator=rng) < case.foreign, strange, ids)
    if case.zero_weights:
        weights = weights.masked_fill(torch.rand(t, k, generator=rng) < case.zero_weights, 0.0)
    mask = torch.rand(t, generator=rng) >= case.masked if case.masked else None
    group: int | Tensor = 0
    if case.groups > 1:
        group = torch.randint(0, case.groups, (t,), generator=rng)
    hidden = torch.randn(t, case.hidden, generator=rng).to(dtype)
    return Inputs(hidden, ids, weights.to(dtype), mask, group).to(device)


def _matrices(case: Case, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gate, up [E, I, H] and down [E, H, I] scaled so that outputs are of order 1, and biases."""
    rng = torch.Generator().manual_seed(seed + 1)
    e, h, i = case.experts, case.hidden, case.intermediate

    def normal(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    return {
        "gate": normal(e, i, h, scale=h**-0.5),
        "up": normal(e, i, h, scale=h**-0.5),
        "down": normal(e, h, i, scale=2 * i**-0.5),
        "gate_bias": normal(e, i, scale=0.5),
        "up_bias": normal(e, i, scale=0.5),
        "down_bias": normal(e, h, scale=0.5),
    }


def _interleave(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2)


Layout = Callable[[dict[str, Tensor], Activation], ExpertWeights]


def _stacked(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    return ExpertWeights(torch.cat([m["gate"], m["up"]], 1), m["down"], activation)


def _transposed(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    up = torch.cat([m["gate"], m["up"]], 1).transpose(1, 2).contiguous()
    down = m["down"].transpose(1, 2).contiguous()
    return ExpertWeights(up.transpose(1, 2), down.transpose(1, 2), activation)


def _interleaved_biased(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    bias = _interleave(m["gate_bias"], m["up_bias"])
    return ExpertWeights(
        _interleave(m["gate"], m["up"]),
        m["down"],
        activation,
        up_bias=bias,
        down_bias=m["down_bias"],
        interleaved=True,
    )


def _ungated(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    return ExpertWeights(m["up"], m["down"], Activation("relu2"), up_bias=m["up_bias"])


def _blocks(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    """2-D storage [E * I, H] of all three, as dbrx keeps them."""
    e, i, h = m["up"].shape
    flat = {name: m[name].reshape(e * i, h) for name in ("gate", "up")}
    down = m["down"].transpose(1, 2).reshape(e * i, h)
    return ExpertWeights(
        flat["up"].view(e, i, h),
        down.view(e, i, h).transpose(1, 2),
        activation,
        gate=flat["gate"].view(e, i, h),
    )


def _per_expert(m: dict[str, Tensor], activation: Activation) -> ExpertWeights:
    """Separate modules, each with its own gate, up and down and their biases."""
    return ExpertWeights(
        [u.clone() for u in m["up"]],
        [d.clone() for d in m["down"]],
        activation,
        gate=[g.clone() for g in m["gate"]],
        up_bias=m["up_bias"],
        gate_bias=m["gate_bias"],
        down_bias=m["down_bias"],
    )


LAYOUTS: dict[str, Layout] = {
    "stacked": _stacked,
    "transposed": _transposed,
    "interleaved-biased": _interleaved_biased,
    "ungated": _ungated,
    "blocks": _blocks,
    "per-expert": _per_expert,
}

ACTIVATIONS = (
    Activation("silu"),
    Activation("gelu_tanh"),
    Activation("silu_clamped_in", limit=0.7),
    Activation("silu_clamped_out", limit=0.7),
    Activation("swiglu_oai", limit=0.7),
    Activation("relu2"),
)


def make_experts(
    case: Case,
    layout: str = "stacked",
    activation: Activation | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> ExpertWeights:
    """Random experts of `case` in one of `LAYOUTS`; `relu2` needs the ungated layout."""
    matrices = {name: m.to(device) for name, m in _matrices(case, seed, dtype).items()}
    return LAYOUTS[layout](matrices, activation or Activation("silu"))


# Root of the mean square of a code drawn evenly: of E2M1, and of -8 to 7.
_CODES = {"mxfp4": 2.93, "int4_group": 4.64}


def make_quantized(
    format: str,
    experts: int,
    rows: int,
    columns: int,
    *,
    std: float = 1.0,
    scales: torch.dtype | None = None,
    group: int = 32,
    block: tuple[int, int] = (128, 128),
    seed: int = 0,
) -> Quantized:
    """Random matrices of about `std`, every code of 4 bits, and scales that differ.

    Args:
        format: one of `quantized.FORMATS`.
        experts: E.
        rows: N.
        columns: K; for the formats of 4 bits a multiple of their groups.
        std: of the elements, about.
        scales: dtype of the scales; default the format's first.
        group: elements that share a scale in `int4_group`.
        block: of `fp8_block`.
        seed: of the random numbers.
    """
    rng = torch.Generator().manual_seed(seed)
    dtype = scales or FORMATS[format][2][0]
    shape = (experts, rows, columns)
    if format == "fp8_block":
        values = torch.randn(shape, generator=rng).to(torch.float8_e4m3fn)
        blocks = (experts, -(-rows // block[0]), -(-columns // block[1]))
        factors = (torch.rand(blocks, generator=rng) + 0.5) * std
        return Quantized(values, factors.to(dtype), format, block)
    std /= _CODES[format]
    if format == "mxfp4":
        packed = torch.randint(0, 256, (experts, rows, columns // 2), generator=rng)
        spread = torch.randint(-1, 2, (experts, rows, columns // MX_BLOCK), generator=rng)
        exponents = spread + 127 + round(math.log2(std))
        return Quantized(packed.to(torch.uint8), exponents.to(torch.uint8), format)
    words = torch.randint(-(1 << 31), 1 << 31, (experts, rows, columns // 8), generator=rng)
    factors = (torch.rand(experts, rows, columns // group, generator=rng) + 0.5) * std
    return Quantized(words.to(torch.int32), factors.to(dtype), format)


def make_quantized_experts(
    case: Case,
    format: str,
    layout: str = "stacked",
    activation: Activation | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    block: tuple[int, int] = (128, 128),
) -> ExpertWeights:
    """Experts of `case` whose matrices are quantized; biases and shapes as `layout` has them.
    `block` is that of `fp8_block`.
    """
    plain = make_experts(case, layout, activation, torch.bfloat16, seed, device)
    hidden, inner = plain.hidden_size, plain.intermediate_size

    def made(rows: int, columns: int, number: int) -> Quantized:
        std = (2 if number == 2 else 1) * columns**-0.5
        seeds = seed * 3 + number
        sizes = (case.experts, rows, columns)
        return make_quantized(format, *sizes, std=std, block=block, seed=seeds).to(device)

    gate = None if plain.gate is None else made(inner, hidden, 1)
    up = made(plain.up[0].shape[0], hidden, 0)
    return replace(plain, up=up, gate=gate, down=made(hidden, inner, 2))


def relative_error(got: Tensor, want: Tensor) -> float:
    """Frobenius error of `got` relative to `want`, in float64; 0 for empty tensors."""
    if want.numel() == 0:
        return 0.0
    scale = want.double().norm()
    error = (got.double() - want.double()).norm()
    return float(error / scale) if scale > 0 else float(error)


def largest_relative_error(got: Tensor, want: Tensor) -> float:
    """Largest element-wise error relative to `want`; elements that are 0 must be 0 (else inf)."""
    got, want = got.double(), want.double()
    error = torch.where(want == 0, torch.where(got == 0, 0.0, math.inf), (got - want).abs())
    error = torch.where(want == 0, error, error / want.abs())
    return float(error.max()) if error.numel() else 0.0
