"""Everything timed on one MoE layer: one registry, each entry checked before it is timed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import reap_kernels as rk
from bench.baselines import observe_all
from bench.gpu.machine import Machine
from bench.gpu.verify import CheckFailed, NotHere, bounds_of, products_of
from reap_kernels import ExpertWeights, LayerStats, Quantized
from reap_kernels.device import architecture
from reap_kernels.dispatch import select
from reap_kernels.experts.request import request_of
from reap_kernels.experts.triton_backend import launches
from reap_kernels.layer import gpu
from reap_kernels.layer.call import LayerCall
from reap_kernels.saliency.stage_kernels import stage_kernels
from reap_kernels.testing import Case, largest_relative_error, make_inputs, relative_error
from reap_kernels.tuning import Launch, Launches, off_entries

# Tokens whose outputs and statistics are compared with float64.
_SAMPLE = 16
# transformers' eager loop adds k times in bf16, and every implementation rounds before it adds.
_THEIR_OUTPUT = 2e-2
# More tokens tell nothing about the all-experts algorithm, whose time is linear from far fewer.
_ALL_EXPERTS_TOKENS = 8192


class Work:
    """One layer call to time: the same weights, ids and router_weights for every provider.

    Attributes:
        machine: where.
        case: sizes and routing.
        experts: the weights.
        hidden: input sets [T, H], together twice as large as the L2 cache at least.
        ids, router_weights: [T, k].
    """

    def __init__(self, machine: Machine, case: Case, experts: ExpertWeights) -> None:
        self.machine, self.case, self.experts = machine, case, experts
        device, dtype = machine.device, experts.dtype
        routing = make_inputs(_with_hidden(case, 1), dtype, device=device)
        self.ids, self.router_weights = routing.topk_ids, routing.topk_weights
        rng = torch.Generator(device).manual_seed(1)
        size = case.tokens * case.hidden * dtype.itemsize
        sets = min(16, max(2, -(-2 * machine.cache_bytes // size)))
        self.hidden = [
            torch.randn(case.tokens, case.hidden, generator=rng, device=device, dtype=dtype)
            for _ in range(sets)
        ]

    @cached_property
    def sample(self) -> Tensor:
        """Sampled tokens of the first input set, the first and the last among them."""
        last = self.case.tokens - 1
        steps = range(_SAMPLE)
        at = sorted({last * step // (_SAMPLE - 1) for step in steps})
        return torch.tensor(at, device=self.machine.device)

    @cached_property
    def truth(self) -> tuple[Tensor, LayerStats]:
        """Output and statistics of the sampled tokens alone, in float64."""
        stats = LayerStats(self.case.experts, device=self.machine.device)
        at = self.sample
        call = (self.hidden[0][at], self.ids[at], self.router_weights[at], self.experts, stats)
        return rk.observe_layer(*call, backend="reference"), stats

    @property
    def slots(self) -> int:
        """S = T * k."""
        return self.case.tokens * self.case.top_k

    @property
    def weight_size(self) -> int:
        """Bytes of a weight as it is stored, without its share of a scale."""
        up = self.experts.up
        return (up.values if isinstance(up, Quantized) else up[0]).itemsize

    @cached_property
    def touched(self) -> int:
        """Experts with at least one token."""
        return len(torch.unique(self.ids))


def _with_hidden(case: Case, hidden: int) -> Case:
    return Case(
        case.name, case.why, case.tokens, case.experts, case.top_k, hidden, 1, skew=case.skew
    )


@dataclass(frozen=True)
class Prepared:
    """A provider ready to run.

    Attributes:
        calls: one an input set.
        verify: output rows [n, H] of the sampled tokens, and their statistics where it has any:
            [3, E] count, sum ||f||, sum g ||f||.
        scale: time of the whole call / time of `calls`, where fewer tokens run.
        output: largest accepted error of the output.
        note: what a reader of the row must know.
    """

    calls: Sequence[Callable[[], object]]
    verify: Callable[[], tuple[Tensor | None, Tensor | None]]
    scale: float = 1.0
    output: float = _THEIR_OUTPUT
    note: str = ""


@dataclass(frozen=True)
class Provider:
    """One entry: `prepare(work)` raises NotHere, BackendUnavailable or OutOfMemoryError."""

    name: str
    variant: str
    observed: bool
    prepare: Callable[[Work], Prepared] = field(repr=False)


def checked(work: Work, prepared: Prepared) -> float:
    """Error of the output on the sample (of the sums, where there is no output).

    Raises:
        CheckFailed: it, or a statistic, is further from float64 than allowed.
    """
    want, truth = work.truth
    rows, sums = prepared.verify()
    error = 0.0
    if rows is not None:
        error = relative_error(rows, want)
        if not error <= prepared.output:
            raise CheckFailed(f"the output is off by {error:.1e}, {prepared.output:.0e} is allowed")
    if sums is not None:
        if not torch.equal(sums[0], truth.count[0].double()):
            raise CheckFailed("counts differ from float64's")
        worst = largest_relative_error(
            sums[1:], torch.stack([truth.norm_sum, truth.weighted_norm_sum])[:, 0]
        )
        bound = bounds_of(work.experts.dtype, "").sums
        if not worst <= bound:
            raise CheckFailed(f"sums are off by {worst:.1e}, {bound:.0e} is allowed")
        error = error if rows is not None else worst
    return error


def of_run(
    work: Work, run: Callable[[LayerCall], Tensor], bound: float, note: str = ""
) -> Prepared:
    """Observed calls of a layer by kernels that were chosen by hand, and what is compared with
    float64.
    """
    total = LayerStats(work.case.experts, device=work.machine.device)

    def call(hidden: Tensor, stats: LayerStats, mask: Tensor | None = None) -> Tensor:
        return run(LayerCall(hidden, work.ids, work.router_weights, work.experts, stats, mask))

    def verify() -> tuple[Tensor, Tensor]:
        return _sampled(work, lambda stats, mask: call(work.hidden[0], stats, mask))

    calls = [lambda h=h: call(h, total) for h in work.hidden]
    return Prepared(calls, verify, output=bound, note=note)


def _sampled(work: Work, call: Callable[[LayerStats, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs and statistics of the whole call, of which only the sampled tokens count."""
    mask = torch.zeros(work.case.tokens, dtype=torch.bool, device=work.machine.device)
    mask[work.sample] = True
    own = LayerStats(work.case.experts, device=work.machine.device)
    out = call(own, mask)
    sums = torch.stack([own.count.double(), own.norm_sum, own.weighted_norm_sum])[:, 0]
    return out[work.sample], sums


def tma_launch(where: torch.device, product: str, otherwise: Launch) -> Launch:
    """A product's launch by TMA: of the table's line that is off, else as `otherwise`."""
    found = (entry.launch for entry in off_entries(architecture(where)) if entry.op == product)
    own = next((launch for launch in found if launch and launch.kernel == "tma"), None)
    return own or replace(otherwise, kernel="tma")


def _by_tma(work: Work) -> Prepared:
    """Triton's kernels with both products by TMA, whatever the launch table says."""
    request = request_of("layer", work.hidden[0], work.case.top_k, work.experts)
    select(request, "triton")  # runs its self-check, or says why it does not serve
    chosen, where = launches(request), work.machine.device
    own = Launches(*(tma_launch(where, op, getattr(chosen, at)) for op, at in _SIDES.items()))
    run = gpu.prepared(gpu.TRITON, stage_kernels("triton", "triton"), own, request)
    note = f"tiles {_tiles(own.up)}, {_tiles(own.down)}"
    return of_run(work, run, bounds_of(work.experts.dtype, "triton").output, note)


# Products, and which launch of a layer is theirs.
_SIDES = {"gate_up": "up", "down": "down"}


def ours(backend: str | None, observed: bool) -> Callable[[Work], Prepared]:
    """A call of the layer op by one backend; None: the default."""

    def prepare(work: Work) -> Prepared:
        request = request_of("layer", work.hidden[0], work.case.top_k, work.experts)
        served = select(request, backend)
        stats = LayerStats(work.case.experts, device=work.machine.device) if observed else None

        def call(hidden: Tensor) -> Callable[[], Tensor]:
            return lambda: rk.observe_layer(
                hidden, work.ids, work.router_weights, work.experts, stats, backend=backend
            )

        def verify() -> tuple[Tensor, Tensor | None]:
            if not observed:
                return call(work.hidden[0])()[work.sample], None
            inputs = (work.hidden[0], work.ids, work.router_weights, work.experts)
            return _sampled(
                work,
                lambda own, mask: rk.observe_layer(*inputs, own, mask=mask, backend=backend),
            )

        products = products_of(served.name, work.hidden[0], work.case.top_k, work.experts)
        chosen, note = launches(request), served.backend.note(request)
        tiles = f"tiles {_tiles(chosen.up)}, {_tiles(chosen.down)}" if products == "triton" else ""
        output = bounds_of(work.experts.dtype, products).output
        note = "; ".join(part for part in (f"served by {served.name}", note, tiles) if part)
        calls = [call(hidden) for hidden in work.hidden]
        return Prepared(calls, verify, output=output, note=note)

    return prepare


def _tiles(launch: Launch) -> str:
    """Rows x columns x depth, warps, stages."""
    size = f"{launch.block_m}x{launch.block_n}x{launch.block_k}"
    return f"{size} w{launch.num_warps} s{launch.num_stages}"


def experts_module(experts: ExpertWeights, implementation: str) -> nn.Module:
    """transformers' Qwen3-MoE experts on the same storage."""
    try:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    except ImportError as error:
        raise NotHere(f"transformers cannot be imported: {error}") from error
    config = Qwen3MoeConfig(
        hidden_size=experts.hidden_size,
        moe_intermediate_size=experts.intermediate_size,
        num_experts=experts.num_experts,
        experts_implementation=implementation,
    )
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(experts.up, requires_grad=False)
    module.down_proj = nn.Parameter(experts.down, requires_grad=False)
    return module.eval()


def _transformers(implementation: str) -> Callable[[Work], Prepared]:
    def prepare(work: Work) -> Prepared:
        if implementation == "batched_mm":
            h, i = work.case.hidden, work.case.intermediate
            gathered, free = (
                work.slots * 3 * h * i * work.experts.dtype.itemsize,
                work.machine.free_bytes(),
            )
            if gathered > free:
                raise NotHere(
                    f"it would gather {gathered / 1e9:.0f} GB of weights; {free / 1e9:.0f} GB free"
                )
        module = experts_module(work.experts, implementation)
        calls = [lambda h=h: module(h, work.ids, work.router_weights) for h in work.hidden]
        return Prepared(calls, lambda: (calls[0]()[work.sample], None))

    return prepare


def _products(work: Work) -> Prepared:
    """torch's grouped_mm of both products on rows gathered and activated beforehand: what path A
    cannot be faster than.
    """
    multiply = getattr(torch.nn.functional, "grouped_mm", None)
    if multiply is None:
        raise NotHere(f"torch {torch.__version__} has no grouped_mm")
    routing = rk.sort_by_expert(work.ids, work.case.experts)
    ends = routing.offsets[1:].to(torch.int32)
    up, down = work.experts.up.transpose(1, 2), work.experts.down.transpose(1, 2)
    rows = work.hidden[0].index_select(0, routing.gather_index // work.case.top_k)
    gate, own = multiply(rows, up, offs=ends).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate).mul_(own)
    del gate, own

    def call() -> Tensor:
        multiply(rows, up, offs=ends)
        return multiply(inner, down, offs=ends)

    def verify() -> tuple[Tensor, None]:
        inverse = torch.empty_like(routing.gather_index)
        inverse[routing.gather_index] = torch.arange(work.slots, device=inverse.device)
        y = call()[inverse.view(work.ids.shape)[work.sample]]
        return (work.router_weights[work.sample].float()[:, :, None] * y.float()).sum(dim=1), None

    note = "both products only: no routing, gather, activation or combination"
    return Prepared([call], verify, note=note)


def _all_experts(work: Work) -> Prepared:
    case, device = work.case, work.machine.device
    tokens = min(case.tokens, _ALL_EXPERTS_TOKENS)
    while tokens > 1 and case.experts * tokens * case.hidden * 4 > work.machine.free_bytes() // 2:
        tokens //= 2

    def observe(at: Tensor | slice, total: Tensor, hidden: Tensor) -> Tensor:
        observe_all(total, work.experts.project, hidden[at], work.ids[at], work.router_weights[at])
        return total

    def zeros() -> Tensor:
        return torch.zeros(3, case.experts, dtype=torch.float64, device=device)

    total, part = zeros(), slice(0, tokens)
    note = "observation alone, to be added to the layer's own forward"
    if tokens < case.tokens:
        note += f"; timed on {tokens} tokens and scaled by {case.tokens / tokens:g}"
    return Prepared(
        [lambda h=h: observe(part, total, h) for h in work.hidden],
        lambda: (None, observe(work.sample, zeros(), work.hidden[0])),
        scale=case.tokens / tokens,
        note=note,
    )


PROVIDERS = (
    Provider("reap", "triton", True, ours("triton", True)),
    Provider("reap", "triton", False, ours("triton", False)),
    Provider("reap", "grouped_mm", True, ours("grouped_mm", True)),
    Provider("reap", "grouped_mm", False, ours("grouped_mm", False)),
    Provider("reap", "cuda", True, ours("cuda", True)),
    Provider("reap", "cuda", False, ours("cuda", False)),
    Provider("reap", "tma", True, _by_tma),
    Provider("reap", "wgmma", True, ours("wgmma", True)),
    Provider("reap", "wgmma", False, ours("wgmma", False)),
    Provider("reap", "automatic", True, ours(None, True)),
    Provider("reap", "automatic", False, ours(None, False)),
    Provider("transformers", "grouped_mm", False, _transformers("grouped_mm")),
    Provider("transformers", "eager", False, _transformers("eager")),
    Provider("transformers", "batched_mm", False, _transformers("batched_mm")),
    Provider("torch", "products only", False, _products),
    Provider("all-experts", "eager", True, _all_experts),
)
