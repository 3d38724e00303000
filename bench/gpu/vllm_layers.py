"""Stage `vllm`: layers of vLLM of published shapes under our plugin, checked, then timed in turn.

vLLM's own choice of a kernel computes each layer: without hooks, with a mask, and observed in both
modes, once the plugin's self-check has passed on this device. Where vLLM is not installed, the one
row says so.
"""

import gc
import statistics
from dataclasses import replace
from typing import Any

import torch

from bench import rows, vllm_layer
from bench.gpu import layer
from bench.gpu.clock import Deadline, times
from bench.gpu.machine import Machine
from bench.gpu.verify import CheckFailed, NotHere, outcome_of
from bench.vllm_layer import Hooked
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


def _check(hooked: Hooked) -> float:
    """The plugin's self-check, and that each kind does what it says; the error of `replace`.

    Raises:
        CheckFailed: what is wrong.
        NotHere: the layer is refused, for a reason that is not a mistake.
    """
    from reap_driver.integrations.vllm.engine.self_check import check_layer

    refused = hooked.layer.refusal or hooked.layer.mask_refusal
    if refused is not None:
        raise NotHere(f"the plugin refuses this layer: {refused}")
    hooked.layer.install()
    found = check_layer(hooked.layer)
    if found:
        raise CheckFailed("; ".join(found))
    return hooked.checked(KINDS)


def _measure(case: Case, machine: Machine, config: Any) -> Row:
    """Figures of one case: every kind in turn, in several rounds."""
    with vllm_layer.running(config):
        dtype = torch.float32 if machine.device.type == "cpu" else torch.bfloat16
        hooked = Hooked(case, dtype, machine.device, f"{case.name}.{case.tokens}")
        error = _check(hooked)
        calls = [hooked.call]
        rounds, repeats = (2, 2) if machine.smoke else (5, 20)
        taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                hooked.enter(kind)
                hooked.call()
                taken[kind].append(statistics.median(times(calls, machine.device, repeats)))
        hooked.enter("alone")
    middle = {kind: statistics.median(seconds) for kind, seconds in taken.items()}
    return {
        "kernel": hooked.layer.facts()["kernel"],
        **{f"{kind}_ms": f"{seconds * 1e3:.4g}" for kind, seconds in middle.items()},
        **{f"{kind}/alone": f"{middle[kind] / middle['alone']:.3f}" for kind in KINDS[1:]},
        "note": f"replace is off by {error:.1e} of the largest output",
    }
