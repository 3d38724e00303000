"""Stage 4, a whole model: Qwen3-30B-A3B with random weights, observed beside its plain forward.

transformers and reap_driver are imported inside functions: a machine without them runs the rest.
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import reap_kernels as rk
from bench.baselines import observe_module
from bench.gpu.clock import Deadline, times
from bench.gpu.layer import release
from bench.gpu.machine import Machine
from bench.gpu.nvml import COLUMNS, Window
from bench.gpu.selection import PLANNED, Selection
from bench.gpu.verify import CheckFailed, bounds_of, stage_outcome

Row = dict[str, object]
# Provider, variant, and whether it is observed.
Key = tuple[str, str, str]
SEQUENCES, LENGTH, ROUNDS = 231, 2048, 2
IMPLEMENTATIONS = ("grouped_mm", "eager")
_QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}
_TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
_OBSERVED, _UNOBSERVED = ("reap", "automatic", "yes"), ("reap", "automatic", "no")
_OVER = "observed/unobserved"
# What of the free memory weights may take; the rest is for activations and the kernels' scratch.
_WEIGHTS_SHARE = 0.88


def missing() -> str | None:
    """Why this stage cannot run here, or None."""
    try:
        import reap_driver.memory.batch_size
        import reap_driver.observation.observer  # noqa: F401
    except ImportError as error:
        return f"transformers (5.17 or newer) or reap_driver cannot be imported: {error}"
    return None


class Bench:
    """The model, its tokens, and every way to run them.

    Attributes:
        model: on the device, in bf16.
        batch: sequences at a time, as the driver chooses.
        batches: token ids on the CPU, [batch, length] each.
        note: what a reader of any row must know.
    """

    def __init__(self, machine: Machine, sequences: int | None = None) -> None:
        from reap_driver.memory.machine import free_device_memory
        from reap_driver.memory.workload import workload
        from reap_driver.model.discover import find_moe_layers

        self.machine = machine
        sizes = dict(_TINY if machine.smoke else _QWEN3_30B)
        planned, length = (3, 16) if machine.smoke else (SEQUENCES, LENGTH)
        sequences = sequences or planned
        wanted = sizes["num_hidden_layers"]
        sizes["num_hidden_layers"] = min(wanted, fitting_layers(sizes, machine.free_bytes()))
        self.note = f"{sizes['num_hidden_layers']} of {wanted} layers, random weights"
        self.note = f"smoke: tiny; {self.note}" if machine.smoke else self.note
        self.layers, self.length = sizes["num_hidden_layers"], length
        self.model = build(sizes, machine.device)
        found = find_moe_layers(self.model)
        work = workload(
            self.model,
            found,
            tokens=sequences * length,
            seq_len=length,
            device=self.model.device,
            dtype=self.model.dtype,
        )
        free = free_device_memory(self.model.device)
        self.batch = work.batch(None if free is None else free.nbytes)
        rng = torch.Generator().manual_seed(1)
        ids = torch.randint(0, sizes["vocab_size"], (sequences, length), generator=rng)
        self.batches = list(ids.split(self.batch))

    @property
    def experts(self) -> list[Any]:
        """The experts modules, in order."""
        return [layer.mlp.experts for layer in self.model.model.layers]

    def plain(self, implementation: str, batches: list[Tensor]) -> None:
        """transformers' own forward."""
        self.model.set_experts_implementation(implementation)
        self.forward(batches)

    def forward(self, batches: list[Tensor]) -> None:
        """The model as it is bound now, with what `observe` spares it spared too."""
        with torch.no_grad():
            for ids in batches:
                own = ids.to(self.machine.device, non_blocking=True)
                self.model(input_ids=own, use_cache=False, logits_to_keep=1)

    def observed(self, batches: list[Tensor], **how: Any) -> rk.SaliencyStats:
        """`rd.observe` with its options, from entering it to statistics on the CPU."""
        from reap_driver import observe

        with observe(self.model, **how) as obs:
            for ids in batches:
                obs(input_ids=ids)
        return obs.stats

    def unobserved(self, batches: list[Tensor]) -> None:
        """Our kernels without statistics."""
        with _bound(self.experts):
            self.forward(batches)

    def fused(self, batches: list[Tensor]) -> None:
        """The same, with norms, residual sums and rotations in kernels of ours."""
        from reap_driver import fused

        with fused(self.model):
            self.unobserved(batches)

    def variants(self) -> dict[Key, Callable[[list[Tensor]], object]]:
        """(provider, variant, observed) -> how to run it."""
        theirs = {
            ("transformers", name, "no"): lambda batches, n=name: self.plain(n, batches)
            for name in IMPLEMENTATIONS
        }
        ours: dict[Key, Callable[[list[Tensor]], object]] = {
            _OBSERVED: self.observed,
            _UNOBSERVED: self.unobserved,
            ("reap", "fused", "yes"): partial(self.observed, fuse=True),
            ("reap", "fused", "no"): self.fused,
        }
        if self._cudnn():
            options = {"fuse": True, "attention": "cudnn"}
            ours["reap", "fused, cuDNN's attention", "yes"] = partial(self.observed, **options)
        return ours | theirs

    def _cudnn(self) -> bool:
        """Whether observing may ask for cuDNN's attention."""
        device = self.machine.device
        return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@contextlib.contextmanager
def _bound(modules: list[Any]) -> Iterator[None]:
    """The experts run our kernels, unobserved."""
    from reap_driver.compat.experts_interface import experts_bound

    activation = rk.Activation("silu")
    with contextlib.ExitStack() as stack:
        for module in modules:
            own = rk.ExpertWeights(module.gate_up_proj.data, module.down_proj.data, activation)
            stack.enter_context(
                experts_bound(
                    module,
                    lambda hidden, ids, weights, e=own: rk.observe_layer(hidden, ids, weights, e),
                )
            )
        yield


def fitting_layers(sizes: dict[str, int], free: int) -> int:
    """Layers whose bf16 weights fit, beside embeddings and head."""
    h, width = sizes["hidden_size"], sizes["moe_intermediate_size"]
    attention = 2 * h * sizes["head_dim"]
    attention *= sizes["num_attention_heads"] + sizes["num_key_value_heads"]
    layer = 2 * (sizes["num_experts"] * (3 * h * width + h) + attention + 2 * h)
    rest = 2 * 2 * sizes["vocab_size"] * h
    return max(1, int((_WEIGHTS_SHARE * free - rest) // layer))


def build(sizes: dict[str, int], device: torch.device) -> Any:
    """The model in bf16, its weights drawn by transformers' own initialization on the device."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, initializer_range=0.02)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.to(device).eval().requires_grad_(False)


def captured(bench: Bench, modules: list[Any], ids: Tensor) -> list[tuple[Tensor, ...]]:
    """What each module receives when transformers runs the model on `ids`."""
    seen: dict[Any, tuple[Tensor, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args))
        for module in modules
    ]
    bench.plain("grouped_mm", [ids])
    for hook in hooks:
        hook.remove()
    return [seen[module] for module in modules]


def verify(bench: Bench) -> str:
    """The first layer's statistics against the all-experts algorithm's; counts exact.

    Later layers see other inputs: rounding moves hidden states, and random routers choose by it.
    """
    ids, module = bench.batches[0][:1], bench.experts[0]
    arguments = captured(bench, [module], ids)[0]
    want = _zeros(module)
    observe_module(want, module, *arguments)
    got = next(iter(bench.observed([ids]).layers.values()))
    want = want.cpu()
    if not torch.equal(got.count[0].double(), want[0]):
        raise CheckFailed("the first layer's counts differ from the all-experts algorithm's")
    sums = torch.stack([got.norm_sum[0], got.weighted_norm_sum[0]])
    error = float(((sums - want[1:]).abs() / want[1:].clamp_min(1e-30)).max())
    # Both round: twice what one may be off by.
    bound = 2 * bounds_of(torch.bfloat16, "").sums
    if not error <= bound:
        raise CheckFailed(f"the first layer's sums differ by {error:.1e}, {bound:.0e} is allowed")
    return f"first layer's counts equal, sums within {error:.1e} of all-experts"


def _zeros(module: Any) -> Tensor:
    where = module.down_proj.device
    return torch.zeros(3, module.num_experts, dtype=torch.float64, device=where)


def all_experts_seconds(bench: Bench) -> float:
    """Seconds per layer and sequence of the all-experts observation, from two layers."""
    modules = bench.experts[:2]
    taken = []
    for module, arguments in zip(
        modules, captured(bench, modules, bench.batches[0][:1]), strict=True
    ):
        total = _zeros(module)
        call = [lambda t=total, m=module, a=arguments: observe_module(t, m, *a)]
        times(call, bench.machine.device, 1)
        taken.append(statistics.median(times(call, bench.machine.device, 3)))
    return statistics.mean(taken)


def run(machine: Machine, deadline: Deadline, selection: Selection = PLANNED) -> list[Row]:
    """Rows of every variant; one row that says why, where the stage cannot run."""
    reason = missing() or (deadline.reason if deadline.passed() else None)
    if reason is not None:
        return [_row(*_OBSERVED, status="skipped", note=reason)]
    bench = None
    try:
        bench = Bench(machine, selection.sequences)
        checked = verify(bench)
        return _measure(bench, deadline, checked, selection.rounds or ROUNDS)
    except Exception as error:  # noqa: BLE001  what earlier stages found must not be lost
        return [_row(*_OBSERVED, *stage_outcome(error))]
    finally:
        del bench
        release(machine)  # other processes check what comes next


def _measure(bench: Bench, deadline: Deadline, checked: str, turns: int) -> list[Row]:
    device, variants = bench.machine.device, bench.variants()
    trial, lost = _tried(bench, variants)
    variants = {key: variants[key] for key in trial}
    baseline = all_experts_seconds(bench)
    slowest = _out_of_the_race(trial)
    rounds = sum(seconds for key, seconds in trial.items() if key not in slowest) * turns
    fit = max(1, math.floor(0.9 * deadline.left() / rounds))
    batches = bench.batches[:fit]
    taken: dict[Key, list[float]] = {key: [] for key in variants}
    peaks: dict[Key, float] = {}
    windows: dict[Key, list[Window]] = {key: [] for key in variants}
    for _ in range(turns):
        for key, work in variants.items():
            if key in slowest:
                continue
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            with bench.machine.watch.window(windows[key]):
                taken[key] += times([lambda w=work: w(batches)], device, 1)
            if device.type == "cuda":
                peaks[key] = torch.cuda.max_memory_allocated(device) / 1e9
    rows = _rows(bench, batches, taken, peaks, trial, baseline, checked)
    for row in rows:
        key = (str(row["provider"]), str(row["variant"]), str(row["observed"]))
        row.update(bench.machine.watch.columns(windows.get(key, [])))
    return rows + lost + _contexts(bench, trial, turns)


def _tried(
    bench: Bench, variants: dict[Key, Callable[[list[Tensor]], object]]
) -> tuple[dict[Key, float], list[Row]]:
    """Seconds of one batch, once warm, and rows of the options that cannot run it: an option that
    fails leaves the others their figures.
    """
    first, device = bench.batches[:1], bench.machine.device
    trial: dict[Key, float] = {}
    lost: list[Row] = []
    for key, work in variants.items():
        try:
            times([lambda w=work: w(first)], device, 1)
            trial[key] = times([lambda w=work: w(first)], device, 1)[0]
        except Exception as error:
            if key in (_OBSERVED, _UNOBSERVED) or key[0] == "transformers":
                raise
            lost.append(_row(*key, *stage_outcome(error)))
    return trial, lost


def _contexts(bench: Bench, trial: dict[Key, float], turns: int) -> list[Row]:
    """One batch observed twice in one context: the difference is what first calls cost."""
    from reap_driver import observe

    ids, device = bench.batches[0], bench.machine.device
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns + 1):
        with observe(bench.model) as obs:
            for own in taken:
                own += times([lambda o=obs: o(input_ids=ids)], device, 1)
    # The first context warms up.
    first, again = (statistics.median(own[1:]) for own in taken)
    note = f"{bench.note}; one batch, twice in one context; the checks of first calls take "
    note += f"{first - again:.3f} s"
    rows = []
    for name, seconds in (("first batch of a context", first), ("the same batch again", again)):
        row = _row("reap", name, "yes", "timed", note)
        row |= {"layers": bench.layers, "sequences": len(ids), "length": bench.length}
        row |= {"batch": bench.batch, "rounds": turns, "seconds": f"{seconds:.3f}"}
        row["tokens_s"] = f"{len(ids) * bench.length / seconds:.0f}"
        row[_OVER] = f"{seconds / trial[_UNOBSERVED]:.4f}"
        rows.append(row)
    return rows


def _out_of_the_race(trial: dict[Key, float]) -> set[Key]:
    """transformers' implementations but the fastest on one batch."""
    theirs = [key for key in trial if key[0] == "transformers"]
    return set(theirs) - {min(theirs, key=lambda key: trial[key])}


def _rows(
    bench: Bench,
    batches: list[Tensor],
    taken: dict[Key, list[float]],
    peaks: dict[Key, float],
    trial: dict[Key, float],
    baseline: float,
    checked: str,
) -> list[Row]:
    done = sum(len(ids) for ids in batches)
    middle = {key: statistics.median(seconds) for key, seconds in taken.items() if seconds}
    theirs = next(key for key in middle if key[0] == "transformers")
    note = bench.note
    total = sum(len(ids) for ids in bench.batches)
    if done < total:
        note += f"; {done} of {total} sequences: {Deadline(0).reason}"

    def row(key: Key, seconds: float, extra: str, calls: int) -> Row:
        tokens = done * bench.length
        figures: Row = {"layers": bench.layers, "sequences": done, "length": bench.length}
        figures |= {"batch": bench.batch, "rounds": calls, "seconds": f"{seconds:.3f}"}
        figures |= {"tokens_s": f"{tokens / seconds:.0f}"}
        figures |= {"peak_gb": f"{peaks[key]:.1f}" if key in peaks else ""}
        figures |= {"time/transformers": f"{seconds / middle[theirs]:.3f}"}
        plain = middle.get((*key[:2], "no"))
        if key[2] == "yes" and plain:
            figures[_OVER] = f"{seconds / plain:.4f}"
        return {**_row(*key, status="timed", note=f"{note}; {extra}"), **figures}

    turns = max(map(len, taken.values()))
    rows = [row(key, middle[key], checked, turns) for key in middle]
    for key in [key for key in taken if key not in middle]:
        slower = f"{trial[key] / trial[theirs]:.2f} times transformers' fastest on one batch"
        rows.append(_row(*key, status="skipped", note=f"{note}; {slower}"))
    observed = middle[theirs] + baseline * bench.layers * done
    extra = f"{baseline * 1e3:.1f} ms per layer and sequence, timed on two layers, one sequence, "
    extra += f"extrapolated to all and added to transformers' {theirs[1]}"
    rows.append(row(("all-experts", "eager", "yes"), observed, extra, 3))
    return rows


def _row(provider: str, variant: str, observed: str, status: str, note: str) -> Row:
    figures = ("layers", "sequences", "length", "batch", "rounds", "seconds", "tokens_s")
    who: Row = {"model": "Qwen3-30B-A3B's shape", "dtype": "bfloat16", "provider": provider}
    who |= {"variant": variant, "observed": observed, "status": status}
    blank = dict.fromkeys((*figures, "peak_gb", "time/transformers", _OVER, *COLUMNS), "")
    return {**who, **blank, "note": note}
