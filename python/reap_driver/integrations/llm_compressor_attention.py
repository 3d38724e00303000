"""Causal attention under llm-compressor: notices when calibration lacks it, and restores it.

The sequential pipeline of llm-compressor 0.14 runs layers with eager attention, which hides later
tokens by the mask it is given and by nothing else. The pipeline builds this mask from a copy of the
model's config that does not say which attention is used, so it gets none, or one of another kind,
and every token attends to all tokens of its sequence.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reap_kernels.errors import UnsupportedModel


def sees_later_tokens(implementation: str, mask: Tensor | None, tokens: int) -> bool:
    """Whether the first token of a sequence attends to its last one.

    Args:
        implementation: name of transformers' attention function, such as `eager` or `sdpa`.
        mask: what the function is given: [B, heads or 1, T, T], additive or bool, or another form
            of which causal functions take no more than the padding; None for no mask.
        tokens: T.

    Returns:
        False also where the function is causal by itself: every one but `eager`, given no mask of
        four dimensions.

    Example:
        >>> import torch
        >>> sees_later_tokens("eager", None, 8), sees_later_tokens("sdpa", None, 8)
        (True, False)
        >>> hidden = torch.full((8, 8), -torch.inf).triu(1)[None, None]
        >>> sees_later_tokens("eager", hidden, 8)
        False
    """
    if tokens < 2:
        return False
    eager = implementation == "eager"
    if mask is None or mask.ndim != 4:
        return eager
    if mask.dtype == torch.bool:  # eager attention adds its mask, and 0 and 1 hide nothing
        return eager or bool(mask[..., 0, -1].any())
    return bool((mask[..., 0, -1] > torch.finfo(mask.dtype).min / 2).any())


def check_causal(
    name: str, attention: Any, args: tuple[Any, ...], given: Mapping[str, Any]
) -> None:
    """Checks one call of an attention module, as a forward pre-hook is given it.

    Args:
        name: of the module, for the message.
        attention: one of transformers, with `config` and `is_causal`.
        args, given: arguments of the call, by position and by name.

    Raises:
        UnsupportedModel: tokens would attend to later ones.
    """
    if "attention_mask" not in given:
        return
    hidden = args[0] if args else given["hidden_states"]
    implementation = attention.config._attn_implementation
    if sees_later_tokens(implementation, given["attention_mask"], hidden.shape[1]):
        raise UnsupportedModel(
            f"{name}: llm-compressor calibrates with {implementation} attention and no causal "
            "mask, so tokens attend to later ones and saliency is wrong; call `oneshot` inside "
            "`with causal_attention():` of reap_driver.integrations.llm_compressor, or give it "
            '`pipeline="basic"`'
        )


@contextmanager
def causal_attention() -> Iterator[None]:
    """While it lasts, llm-compressor's sequential pipeline builds masks for the attention it runs.

    Around `oneshot`; every modifier of its recipe then calibrates with causal attention. Where
    llm-compressor does so by itself, nothing changes.

    Example:
        >>> with causal_attention():  # doctest: +SKIP
        ...     oneshot(model, recipe=recipe, dataset=data, pipeline="sequential")
    """
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer
    from transformers import PretrainedConfig

    original = SequentialTracer.create_arg

    def create_arg(self: Any, value: Any) -> Any:
        argument = original(self, value)
        if isinstance(value, PretrainedConfig) and isinstance(argument, torch.fx.Node):
            chosen = {"attn_implementation": value._attn_implementation}
            argument.kwargs = {**argument.kwargs, **chosen}
        return argument

    SequentialTracer.create_arg = create_arg
    try:
        yield
    finally:
        SequentialTracer.create_arg = original
