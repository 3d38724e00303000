"""The token mask: which tokens count, from the arguments of the model's forward."""

import contextlib
import inspect
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_kernels.errors import DataError, UnsupportedModel
from reap_kernels.schema import short

# Models with sparse attention that selects keys by blocks or top-k over padded positions, so the
# outputs of a padded sequence differ from those of the sequence alone.
_PADDING_SENSITIVE = {
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl_text",
}

# Arguments of a forward on text only, in which every MoE layer receives all tokens.
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "labels"}


def takes_padding(config: PretrainedConfig) -> bool:
    """Whether the outputs of a padded sequence are those of the sequence alone."""
    return config.get_text_config().model_type not in _PADDING_SENSITIVE


class TokenMask:
    """The token mask of the current forward."""

    def __init__(
        self, model: PreTrainedModel, unmaskable: list[str], ahead: Container[str] = ()
    ) -> None:
        """Prepares the mask.

        Args:
            model: the model whose forwards are followed.
            unmaskable: names of layers in which tokens cannot be left out.
            ahead: names of layers that are given the next token too (multi-token prediction), in
                which tokens without one do not count.
        """
        self._model = model
        # The signature of the class, because offloading hooks wrap the forward of the instance.
        self._signature = inspect.signature(type(model).forward)
        self._unmaskable, self._ahead = unmaskable, ahead
        self._given: Tensor | None = None
        self._attention: Any = None
        self._mask: Tensor | None = None
        self._followed: Tensor | None = None
        self._tokens: int | None = None
        self._inside = False

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Follows the model's forwards inside the context."""
        before = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)
        after = self._model.register_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._leave()

    @contextlib.contextmanager
    def restricted_to(self, given: Tensor | None, attention: Any = None) -> Iterator[None]:
        """Counts only the tokens in `given`, bool [batch, seq], in a forward inside the context.

        Args:
            given: the mask; None if all tokens count.
            attention: the forward's `attention_mask` before it is moved to the model's device;
                reading it there would wait for the device.
        """
        self._given, self._attention = given, attention
        try:
            yield
        finally:
            self._given, self._attention = None, None

    def for_layer(self, name: str, tokens: int, device: torch.device) -> Tensor | None:
        """The mask, bool [tokens], for a layer that received `tokens` tokens; None if all count.

        Raises:
            UnsupportedModel: the layer ran outside a forward, or received other tokens than the
                mask covers.
        """
        if not self._inside:
            raise UnsupportedModel(
                f"{name} ran outside a forward of the observed {type(self._model).__name__}; call "
                "the model itself, not a part of it, so that its attention mask is known"
            )
        mask = self._mask
        if name in self._ahead and self._followed is not None:
            mask = self._followed if mask is None else mask & self._followed.to(mask.device)
        if mask is None:
            if tokens != (self._tokens or tokens):
                raise UnsupportedModel(
                    f"{name} received {tokens} of the {self._tokens} tokens of a batch: the model "
                    "leaves out tokens whose logits are not requested; pass logits_to_keep=0"
                )
            return None
        if mask.numel() != tokens:
            raise UnsupportedModel(
                f"{name} received {tokens} tokens but the mask covers {mask.numel()}; this "
                "model reorders or splits tokens before its experts: pass sequences of equal "
                "length without padding"
            )
        return mask.to(device)

    @torch.compiler.disable
    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = self._signature.bind_partial(None, *args, **kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        inputs = named.get("input_ids")
        inputs = named.get("inputs_embeds") if inputs is None else inputs
        attention = named.get("attention_mask")
        before = self._attention  # None in forwards that are not run through the observer
        self._mask = self._combine(inputs, attention if before is None else before)
        if self._ahead and inputs is not None:
            self._followed = _followed(inputs, attention, named.get("position_ids"))
        # Images and other modalities add tokens, which may be routed to other experts.
        text = all(key in _TEXT for key, value in named.items() if isinstance(value, Tensor))
        self._tokens = inputs.shape[:2].numel() if inputs is not None and text else None
        self._inside = True

    @torch.compiler.disable
    def _leave(self, *_: Any) -> None:
        self._mask, self._followed, self._tokens, self._inside = None, None, None, False

    def _combine(self, inputs: Tensor | None, attention: Any) -> Tensor | None:
        """The flattened mask of this forward's tokens; None if every token counts."""
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
                    "attention_mask is not [batch, seq], so it does not show which tokens count; "
                    "pass token_mask [batch, seq] to the observer, or a 2-D attention_mask"
                )
        for mask in masks:
            if inputs is not None and mask.shape != inputs.shape[:2]:
                raise DataError(
                    f"a token mask of shape {tuple(mask.shape)} does not fit inputs of "
                    f"{tuple(inputs.shape[:2])}; give one entry per token"
                )
        masks = [mask for mask in masks if not bool(mask.all())]
        if not masks:
            return None
        if self._unmaskable:
            raise UnsupportedModel(
                f"{self._unmaskable[0]} routes inside its block, so tokens cannot be left out "
                "there; pass sequences of equal length without padding, or one at a time"
            )
        device = masks[0].device if inputs is None else inputs.device
        return (masks[0].to(device) & masks[-1].to(device)).reshape(-1)

    def _check_padding(self) -> None:
        config = self._model.config
        kind = config.get_text_config().model_type
        if not takes_padding(config):
            raise UnsupportedModel(
                f"the outputs of {kind} for a padded sequence differ from those for the sequence "
                "alone; pass sequences of equal length without padding, or one at a time"
            )


def _followed(inputs: Tensor, attention: Any, positions: Tensor | None) -> Tensor:
    """Whether each token [batch * seq] has a next one in its row and document."""
    found = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    found[:, -1] = False
    if isinstance(attention, Tensor) and attention.ndim == 2:
        found[:, :-1] &= attention[:, -inputs.shape[1] :][:, 1:].to(found.device) == 1
    if positions is not None and positions.ndim == 2:
        found[:, :-1] &= (positions[:, 1:] > positions[:, :-1]).to(found.device)
    return found.reshape(-1)


def _as_bool(name: str, mask: Any) -> Tensor:
    """A mask as bool. Its values must be boolean, or 1 and 0 in any dtype.

    Raises:
        DataError: it is not a tensor, or has other values, such as the -inf of an additive mask.
    """
    if not isinstance(mask, Tensor):
        raise DataError(f"{name} is {short(mask)}; give a bool tensor [batch, seq]")
    if mask.dtype == torch.bool:
        return mask
    ones = mask == 1
    other = mask[~ones & (mask != 0)]
    if len(other):
        raise DataError(
            f"{name} ({mask.dtype}) holds {other[0].item()}, which is neither 1 (counted) nor 0 "
            "(left out); give a bool tensor [batch, seq]"
        )
    return ones
