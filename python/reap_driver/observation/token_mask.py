"""Which tokens count: read from the model's own arguments, applied in every MoE layer."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_kernels.errors import DataError, UnsupportedModel
from reap_kernels.schema import short

# Sparse-attention models whose choice of keys moves with padding (blocks and top-k are taken over
# padded positions): statistics of a padded batch would not be those of its sequences.
_PADDING_SENSITIVE = {
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl_text",
}

# Arguments of a forward on text alone: every MoE layer gets all of its tokens.
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels"}


def takes_padding(config: PretrainedConfig) -> bool:
    """Whether the model gives a padded sequence the outputs that it gives the sequence alone."""
    return config.get_text_config().model_type not in _PADDING_SENSITIVE


class TokenMask:
    """The token mask of the forward in flight."""

    def __init__(self, model: PreTrainedModel, unmaskable: list[str]) -> None:
        """`unmaskable`: names of layers from which no token can be left out."""
        self._model = model
        # The class's signature: hooks of offloading wrap the instance's forward.
        self._signature = inspect.signature(type(model).forward)
        self._unmaskable = unmaskable
        self._given: Tensor | None = None
        self._mask: Tensor | None = None
        self._tokens: int | None = None
        self._inside = False

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Follow the model's forwards."""
        before = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = self._model.register_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._leave()

    @contextlib.contextmanager
    def restricted_to(self, given: Tensor | None) -> Iterator[None]:
        """Count only tokens of `given` [batch, seq] bool in the forward inside the context."""
        self._given = given
        try:
            yield
        finally:
            self._given = None

    def for_layer(self, name: str, tokens: int, device: torch.device) -> Tensor | None:
        """[tokens] bool for a layer that received `tokens` tokens; None when all count."""
        if not self._inside:
            raise UnsupportedModel(
                f"{name} ran outside a forward of the observed {type(self._model).__name__}; call "
                "the model itself, not a part of it, so that its attention mask is seen"
            )
        if self._mask is None:
            if tokens != (self._tokens or tokens):
                raise UnsupportedModel(
                    f"{name} received {tokens} of the {self._tokens} tokens of a batch: the model "
                    "leaves out those whose logits nobody asks for; pass logits_to_keep=0"
                )
            return None
        if self._mask.numel() != tokens:
            raise UnsupportedModel(
                f"{name} received {tokens} tokens but the mask covers {self._mask.numel()}; this "
                "model reorders or splits tokens before its experts: pass sequences of equal "
                "length without padding"
            )
        return self._mask.to(device)

    @torch.compiler.disable
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(None, *args, **kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        inputs = named.get("input_ids")
        inputs = named.get("inputs_embeds") if inputs is None else inputs
        attention = named.get("attention_mask")
        self._mask = self._combine(inputs, attention)
        # Images and the like bring tokens of their own, which other experts may get.
        text = all(key in _TEXT for key, value in named.items() if isinstance(value, Tensor))
        self._tokens = inputs.shape[:2].numel() if inputs is not None and text else None
        self._inside = True

    @torch.compiler.disable
    def _leave(self, *_: Any) -> None:
        self._mask, self._tokens, self._inside = None, None, False

    def _combine(self, inputs: Tensor | None, attention: Any) -> Tensor | None:
        """Flattened mask of the tokens of this call; None when every token counts."""
        given = self._given
        masks = [] if given is None else [_as_bool("token_mask", given)]
        if attention is not None and inputs is not None:
            if isinstance(attention, Tensor) and attention.ndim == 2:
                seen = _as_bool("attention_mask", attention)
                if not bool(seen.all()):
                    self._check_padding()
                masks.append(seen[:, -inputs.shape[1] :])
            elif given is None:
                raise DataError(
                    "attention_mask is not [batch, seq], so it does not say which tokens count; "
                    "pass token_mask [batch, seq] to the observer, or a 2-D attention_mask"
                )
        for mask in masks:
            if inputs is not None and mask.shape != inputs.shape[:2]:
                raise DataError(
                    f"a token mask of shape {tuple(mask.shape)} does not fit inputs of "
                    f"{tuple(inputs.shape[:2])}; give one entry a token"
                )
        masks = [mask for mask in masks if not bool(mask.all())]
        if not masks:
            return None
        if self._unmaskable:
            raise UnsupportedModel(
                f"{self._unmaskable[0]} routes inside its block, so tokens cannot be left out "
                "there; pass sequences of equal length without padding, one at a time if need be"
            )
        combined = masks[0].to(masks[-1].device) & masks[-1]
        return combined.reshape(-1)

    def _check_padding(self) -> None:
        config = self._model.config
        kind = config.get_text_config().model_type
        if not takes_padding(config):
            raise UnsupportedModel(
                f"{kind} gives other outputs for padded sequences than for the same ones alone; "
                "pass sequences of equal length without padding, one at a time if need be"
            )


def _as_bool(name: str, mask: Any) -> Tensor:
    """A mask whose values are true or false, or 1 or 0 in any dtype, as bool.

    Raises:
        DataError: it is no tensor, or has other values: added to scores, say, or not a number.
    """
    if not isinstance(mask, Tensor):
        raise DataError(f"{name} is {short(mask)}; give a tensor of bool [batch, seq]")
    if mask.dtype == torch.bool:
        return mask
    ones = mask == 1
    other = mask[~ones & (mask != 0)]
    if len(other):
        raise DataError(
            f"{name} ({mask.dtype}) holds {other[0].item()}, which is neither 1 (counted) nor 0 "
            "(left out); give a tensor of bool [batch, seq]"
        )
    return ones
