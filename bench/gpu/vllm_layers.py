"""Stage `vllm`: layers of vLLM of published shapes under our plugin, checked, then timed in turn.

vLLM's own choice of a kernel computes each layer: without hooks, with a mask, and observed in both
modes, once the plugin's self-check has passed on this device. Where vLLM is not installed, the one
row says so.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench import rows, vllm_layer
from bench.gpu import layer
from bench.gpu.clock import Deadline, times
from bench.gpu.machine import Machine
from bench.gpu.verify import CheckFailed, NotHere, outcome_of
from reap_kernels.testing import Case

Row = dict[str, object]
KINDS = ("alone", "off", "masked", "replace", "shadow")
_SHAPES = ("Qwen3-30B-A3B", "GLM-4.5-Air", "Mixtral-8x7B")
# A prompt, and tokens that are generated together.
_TOKENS = (8192, 256, 1)
# vLLM's kernels for CPUs take no smaller ones.
_SMOKE = Case("tiny", "timed", 16, 8, 2, 128, 128)


def plan(smoke: bool) -> list[Case]:
    """Every layer call, one shape after another."""
    if smoke:
        return [_SMOKE]
    shapes = [next(shape for shape in layer.SHAPES if shape.name == name) for name in _SHAPES]
    return [replace(shape, tokens=tokens) for shape in shapes for tokens in _TOKENS]


def run(machine: Machine, deadline: Deadline) -> list[Row]:
    """Rows of all calls; `failed` where a self-check, or what is timed, is not right."""
    cases = plan(machine.smoke)
    if not vllm_layer.installed():
        return [_row(replace(cases[0], tokens=0), "skipped", vllm_layer.INSTALL)]
    found = []
    most = max(case.tokens for case in cases)
    with vllm_layer.world(machine.device, most) as config, torch.inference_mode():
        for case in cases:
            if deadline.passed():
                found.append(_row(case, "skipped", deadline.reason))
                continue
            row = _row(case, "timed", "")
            try:
                row |= _measure(case, machine, config)
            except Exception as error:  # noqa: BLE001  whatever a kernel does is a row
                row["status"], row["note"] = outcome_of(error, "vllm", machine.device)
            found.append(row)
            gc.collect()
    return found


def _row(case: Case, status: str, note: str) -> Row:
    sizes = {"shape": case.name, "tokens": case.tokens, "E": case.experts, "k": case.top_k}
    figures = {"kernel": "", **{f"{kind}_ms": "" for kind in KINDS}}
    ratios = {f"{kind}/alone": "" for kind in KINDS[1:]}
    version = rows.version("vllm") if vllm_layer.installed() else "absent"
    sizes |= {"H": case.hidden, "I": case.intermediate, "vllm": version}
    return {**sizes, **figures, **ratios, "status": status, "note": note}


class _Hooked:
    """A layer with hooks and a pass of one request.

    Args:
        case: sizes.
        machine: where.
        config: of `vllm_layer.world`.
    """

    def __init__(self, case: Case, machine: Machine, config: Any) -> None:
        from reap_driver.integrations.vllm.engine.layer import HookedLayer
        from reap_driver.integrations.vllm.engine.step import Step

        device = machine.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.name = f"{case.name}.{case.tokens}"
        self.config, self.tokens, self.device = config, case.tokens, device
        self.runner = vllm_layer.make(case, dtype, device, self.name)
        self.step = Step(max_tokens=case.tokens, device=device)
        self.layer = HookedLayer(self.name, self.runner, self.step)
        rng = torch.Generator(device).manual_seed(0)

        def normal(columns: int) -> Tensor:
            return torch.randn(case.tokens, columns, generator=rng, device=device).to(dtype)

        self.hidden, self.logits = normal(case.hidden), normal(case.experts)
        self.mask = list(range(0, case.experts, 4)) if case.experts >= 2 * case.top_k else [0]

    def call(self) -> Tensor:
        """One call of the layer."""
        found: Tensor = self.runner(self.hidden.clone(), self.logits)
        return found

    def enter(self, kind: str) -> None:
        """Makes the next calls of this kind; not undone, but by the next."""
        from reap_driver.integrations.vllm.engine.step import Batch

        self.step.leave()
        self.step.stop()
        if kind == "alone":
            self.layer.remove()
            return
        self.layer.install()
        self.layer.set_mask(self.mask if kind == "masked" else [])
        if kind in ("replace", "shadow"):
            self.step.start(kind)
            self.layer.begin(1)
        self.step.enter()
        positions = torch.arange(self.tokens, device=self.device)
        self.step.fill(Batch(["1"], [self.tokens], [0], positions))

    def check(self) -> float:
        """The plugin's self-check, and that each kind does what it says; the error of `replace`.

        Raises:
            CheckFailed: what is wrong.
            NotHere: the layer is refused, for a reason that is not a mistake.
        """
        from reap_driver.integrations.vllm.engine.self_check import check_layer

        refused = self.layer.refusal or self.layer.mask_refusal
        if refused is not None:
            raise NotHere(f"the plugin refuses this layer: {refused}")
        self.layer.install()
        found = check_layer(self.layer)
        if found:
            raise CheckFailed("; ".join(found))
        outputs = {}
        for kind in KINDS:
            self.enter(kind)
            outputs[kind] = self.call().float()
        for kind in ("off", "shadow"):
            if not torch.equal(outputs[kind], outputs["alone"]):
                raise CheckFailed(f"{kind}: the output has other bits than without hooks")
        if torch.equal(outputs["masked"], outputs["alone"]):
            raise CheckFailed("masked: the output is that without a mask")
        if self.layer.error is not None:
            raise CheckFailed(self.layer.error)
        difference = (outputs["replace"] - outputs["alone"]).abs().max()
        return float(difference / outputs["alone"].abs().max())


def _measure(case: Case, machine: Machine, config: Any) -> Row:
    """Figures of one case: every kind in turn, in several rounds."""
    with vllm_layer.running(config):
        hooked = _Hooked(case, machine, config)
        error = hooked.check()
        calls = [hooked.call]
        rounds, repeats = (2, 2) if machine.smoke else (5, 20)
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                hooked.enter(kind)
                hooked.call()
                taken[kind].append(statistics.median(_times(calls, machine, repeats)))
        hooked.enter("alone")
    middle = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    return {
        "kernel": hooked.layer.facts()["kernel"],
        **{f"{kind}_ms": f"{seconds * 1e3:.4g}" for kind, seconds in middle.items()},
        **{f"{kind}/alone": f"{middle[kind] / middle['alone']:.3f}" for kind in KINDS[1:]},
        "note": f"replace is off by {error:.1e} of the largest output",
    }


def _times(calls: list[Callable[[], Tensor]], machine: Machine, repeats: int) -> list[float]:
    return times(calls, machine.device, repeats)
