"""Experts stacked in 3-D tensors: transformers' experts interface, and classes that resemble it.

Serves every module that uses the interface, for any model, and classes with the same tensors and
arguments that do not use it (step3p7, longcat_flash).
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from reap_driver.compat.experts_interface import (
    GroupedForm,
    eager_forward,
    experts_bound,
    grouped_form,
    is_interface,
)
from reap_driver.model.adapters.adapter import (
    ExpertsModule,
    KernelAdapter,
    Recorder,
    Sizes,
    check_tensors,
    forward_replaced,
)
from reap_driver.model.adapters.expert_parallel import ExpertSlice, slice_of
from reap_kernels import Activation, ExpertWeights, probe_activation
from reap_kernels.errors import UnsupportedModel

# Flags of the interface that are supported. Another `has_*` that is true changes the computation.
_KNOWN_FLAGS = {"has_gate", "has_bias"}
_KNOWN_TENSORS = {
    "gate_up_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj_bias",
    "up_proj_bias",
    "down_proj_bias",
}


class StackedExperts(KernelAdapter):
    """`gate_up_proj` [E, 2I, H] (or `up_proj` [E, I, H]) and `down_proj` [E, H, I]."""

    name = "stacked"

    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        return is_interface(module) or _looks_alike(module)

    def sizes(self, module: ExpertsModule) -> Sizes:
        down = module.down_proj
        hidden, inner = _out_in(down, module)[1:]
        return Sizes(down.shape[0], hidden, inner)

    def check(self, name: str, module: ExpertsModule) -> None:
        unknown = sorted(
            flag
            for flag, value in vars(module).items()
            if flag.startswith("has_") and value and flag not in _KNOWN_FLAGS
        )
        local = self.local(module)
        spread = bool(getattr(module, "_is_expert_parallel", False))
        unknown += ["_is_expert_parallel"] if spread and slice_of(module) is None else []
        if unknown:
            raise UnsupportedModel(
                f"{name} sets {', '.join(unknown)}, which this version does not know how to "
                "observe; load the model on one process, with a transformers version it supports"
            )
        extra = sorted({key for key, _ in module.named_parameters()} - _KNOWN_TENSORS)
        if extra:
            raise UnsupportedModel(
                f"{name} has weights {', '.join(extra)} beside the two products of an expert; "
                "its outputs cannot be reproduced, so the model is refused"
            )
        check_tensors(name, module, local)
        self._check_whole(name, module)

    def local(self, module: ExpertsModule) -> ExpertSlice | None:
        # In other classes, replacing forward would bypass the hooks that make tensors local.
        return slice_of(module) if is_interface(module) else None

    def activation(self, module: ExpertsModule) -> Activation:
        gated = _is_gated(module)
        if not gated:
            function = module.act_fn
        elif hasattr(module, "_apply_gate"):
            function = module._apply_gate
        else:
            function = _split_gate(module)
        down = module.down_proj
        return probe_activation(
            function,
            intermediate_size=self.sizes(module).intermediate_size,
            gated=gated,
            interleaved=_interleaved(module),
            limits=_numbers(module, "limit"),
            alphas=_numbers(module, "alpha"),
            device=down.device,
        )

    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        leaf = "gate_up_proj" if _is_gated(module) else "up_proj"
        up, down = getattr(module, leaf), module.down_proj
        up = up[: down.shape[0]]  # longcat_flash has unused rows for its identity experts
        if getattr(module, "is_transposed", False):
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return ExpertWeights(
            up.detach(),
            down.detach(),
            activation,
            up_bias=_detached(getattr(module, f"{leaf}_bias", None)),
            down_bias=_detached(getattr(module, "down_proj_bias", None)),
            interleaved=_interleaved(module),
        )

    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> AbstractContextManager[None]:
        eager, local = eager_forward(module), self.local(module)

        def here(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            """The module's own forward, with a valid id for the slots of other ranks, of
            weight 0.
            """
            ids = ids if local is None else torch.where(ids < local.count, ids, 0)
            return eager(hidden, ids, weights)

        def grouped() -> GroupedForm | None:
            return grouped_form(module)

        def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return recorder.observe(hidden, ids, weights, here, grouped)

        def run_with_identity(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            # Slots of identity experts return their input times the router weight.
            passed = torch.where(ids >= module.down_proj.shape[0], weights, 0).sum(1, keepdim=True)

            def routed(rows: Tensor, row_ids: Tensor, row_weights: Tensor) -> Tensor:
                kept = torch.where(row_ids < module.down_proj.shape[0], row_weights, 0)
                return eager(rows, row_ids, kept)

            out = recorder.observe(hidden, ids, weights, routed)
            return out + (hidden * passed).to(out.dtype)

        if is_interface(module):
            return experts_bound(module, run)
        identity = getattr(module, "zero_expert_num", 0)
        return forward_replaced(module, run_with_identity if identity else run)

    def _check_whole(self, name: str, module: ExpertsModule) -> None:
        """Raises UnsupportedModel if the weights do not have the intermediate size of the
        module.
        """
        declared = getattr(module, "intermediate_dim", getattr(module, "intermediate_size", None))
        actual = self.sizes(module).intermediate_size
        if isinstance(declared, int) and declared != actual:
            raise UnsupportedModel(
                f"{name}.down_proj has intermediate size {actual}, the module declares {declared}: "
                "the experts are sharded; load the model without tensor parallelism"
            )


def _looks_alike(module: ExpertsModule) -> bool:
    """Whether a class that does not use the interface has its tensors and its three arguments."""
    if not type(module).__name__.endswith("Experts"):
        return False
    if any(
        getattr(getattr(module, leaf, None), "ndim", 0) != 3
        for leaf in ("gate_up_proj", "down_proj")
    ):
        return False
    return len(inspect.signature(type(module).forward).parameters) == 4


def _out_in(down: Tensor, module: ExpertsModule) -> tuple[int, int, int]:
    """(E, out, in) of the down projection, transposed or not."""
    experts, rows, cols = down.shape
    return (
        (experts, cols, rows) if getattr(module, "is_transposed", False) else (experts, rows, cols)
    )


def _is_gated(module: ExpertsModule) -> bool:
    return bool(getattr(module, "has_gate", True))


def _interleaved(module: ExpertsModule) -> bool:
    return not getattr(module, "is_concatenated", True)


def _split_gate(module: ExpertsModule) -> Any:
    """`act(gate) * up`, for classes without `_apply_gate`."""

    def function(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        activated: Tensor = module.act_fn(gate)
        return activated * up

    return function


def _numbers(module: ExpertsModule, word: str) -> list[float]:
    """Numeric attributes of the module whose name contains `word`."""
    return [
        float(value)
        for key, value in vars(module).items()
        if word in key and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
