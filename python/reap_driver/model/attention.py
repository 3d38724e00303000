"""Prefers cuDNN's attention where torch chooses a kernel for `scaled_dot_product_attention`.

On a GPU of compute capability 9.0 it is a candidate beside the kernel that torch takes first. Which
calls it serves torch decides: where cuDNN refuses one (its head size, dtype or mask), torch takes
the next kernel in the order that it had.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from reap_driver.compat.text_model import text_model
from reap_driver.model.forward import input_device
from reap_kernels.errors import BackendUnavailable, UnsupportedModel
from reap_kernels.tuning import choose_backend

Attention = Literal["model", "cudnn"]

# The order in which torch tries its kernels, unless a caller has changed it.
_ORDER = tuple(SDPBackend(number) for number in torch._C._get_sdp_priority_order())
_CUDNN = SDPBackend.CUDNN_ATTENTION
_INPUTS = ("input_ids", "inputs_embeds")


def cudnn_first() -> contextlib.AbstractContextManager[Any]:
    """A context in which torch tries cuDNN's attention first, then its kernels in their order."""
    order = [_CUDNN, *(one for one in _ORDER if one != _CUDNN)]
    return sdpa_kernel(order, set_priority=True)


def has_cudnn(device: torch.device) -> bool:
    """Whether cuDNN's attention is to be tried on a device."""
    return (
        device.type == "cuda"
        and torch.backends.cudnn.is_available()
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


class AttentionKernels:
    """Which of torch's attention kernels the forwards of a model prefer.

    Args:
        model: it.
        asked: by the caller, without fallback; None for what the launch table says.
        width: H, the hidden size, which the launch table is asked by.

    Attributes:
        used: what forwards have preferred beside the model's own choice.

    Raises:
        BackendUnavailable: cuDNN's is asked for, and the model is not on a GPU of compute
            capability 9.0 with cuDNN.
        UnsupportedModel: it is asked for, and the model computes its attention without torch's
            function.
    """

    def __init__(self, model: PreTrainedModel, asked: Attention | None, width: int) -> None:
        self._model = model = text_model(model)
        self._asked, self._width = asked, width
        self.used: Attention = "model"
        if asked == "cudnn" and (reason := _refusal(model)) is not None:
            raise reason

    @contextlib.contextmanager
    def around(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Inside, a forward on a batch runs with what is preferred for it; afterwards torch chooses
        as before. Where a caller has switched one of torch's kernels off, or changed their order,
        that holds.
        """
        if self._choice(batch) == "model":
            yield
            return
        self.used = "cudnn"
        with cudnn_first():
            yield

    def _choice(self, batch: Mapping[str, Any]) -> str:
        if self._asked == "model" or _refusal(self._model) is not None or _users_own():
            return "model"
        inputs = next((batch[name] for name in _INPUTS if batch.get(name) is not None), None)
        if self._asked is not None or not isinstance(inputs, Tensor):
            return self._asked or "model"
        device, tokens = input_device(self._model), inputs.shape[:2].numel()
        return choose_backend(device, "attention", self._model.dtype, self._width, tokens)


def _users_own() -> bool:
    """Whether a caller has switched a kernel off or changed their order."""
    switches = torch.backends.cuda
    on = (
        switches.cudnn_sdp_enabled(),
        switches.flash_sdp_enabled(),
        switches.mem_efficient_sdp_enabled(),
        switches.math_sdp_enabled(),
    )
    order = tuple(SDPBackend(number) for number in torch._C._get_sdp_priority_order())
    return not all(on) or order != _ORDER


def _refusal(model: PreTrainedModel) -> BackendUnavailable | UnsupportedModel | None:
    """Why cuDNN's attention cannot be preferred for a model; None if it can."""
    device = input_device(model)
    if not has_cudnn(device):
        return BackendUnavailable(
            f"attention='cudnn' needs a GPU of compute capability 9.0 with cuDNN, and "
            f"{type(model).__name__} is on {device}; leave it out"
        )
    own = model.config.get_text_config()._attn_implementation
    if own != "sdpa":
        return UnsupportedModel(
            f"attention='cudnn': {type(model).__name__} computes its attention by {own!r}, for "
            "which torch chooses no kernel; load it with attn_implementation='sdpa', or leave it "
            "out"
        )
    return None
