"""Gives a model its multi-token-prediction (MTP) layer, which transformers' classes leave out.

The layer that DeepSeek-V3 and GLM-4.5 ship after their last one (`model.layers.61`) is a decoder
layer with three modules more: for token t it gets the model's last hidden state of t and the
embedding of token t + 1, normalizes both (`hnorm`, `enorm`), and projects them to one hidden state
(`eh_proj`), on which the decoder layer runs. transformers has the same in `MtpModel`, for drafting
with a cache, for some of these models; here the layer is one more item of the model's own list, so
that it is found, loaded and streamed as the others are, under its name on disk.
"""

import contextlib
import inspect
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from reap_driver.compat.config_file import MTP_FIELDS
from reap_kernels.errors import UnsupportedModel

_OWN = ("enorm", "hnorm", "eh_proj")
# Types of models whose publishers and engines run the layer as above.
_TYPES = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "kimi_k2")


class MtpLayer(nn.Module):
    """What an MTP layer adds to the decoder layer class that it is combined with."""

    def __init__(self, config: PretrainedConfig, layer: int, norm: type[nn.Module]) -> None:
        super().__init__(config, layer)
        width = config.hidden_size
        self.enorm = norm(width, eps=config.rms_norm_eps)
        self.hnorm = norm(width, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, hidden_states: Tensor, following: Tensor, **kwargs: Any) -> Any:
        """The decoder layer's output [batch, seq, H].

        Args:
            hidden_states: the model's last ones [batch, seq, H], after its final norm.
            following: embeddings [batch, seq, H] of the token after each.
            **kwargs: of the decoder layer.
        """
        both = torch.cat([self.enorm(following), self.hnorm(hidden_states)], dim=-1)
        return super().forward(self.eh_proj(both), **kwargs)


def why_not_run(model: PreTrainedModel, keys: Container[str] | None) -> str | None:
    """Why a model's MTP layer cannot be run; None if it can.

    Args:
        model: without that layer, on any device.
        keys: of the checkpoint's tensors; None if they are not known.
    """
    config = model.config.get_text_config()
    if config.model_type not in _TYPES:
        return f"how models of type {config.model_type} run them is not known here"
    counts = (getattr(config, name, None) for name in ("num_mtp_layers", *MTP_FIELDS))
    count = next((count for count in counts if count is not None), 0)
    if count != 1:
        return f"config.json counts {count} of them, and only one can be run"
    found = _layers(model)
    if found is None:
        return f"{type(model).__name__} has no list of decoder layers that another can follow"
    name, layers = found
    own = [f"{name}.{len(layers)}.{module}.weight" for module in _OWN]
    missing = next((key for key in own if keys is not None and key not in keys), None)
    return None if missing is None else f"the checkpoint has no tensor {missing}"


def attach_mtp(model: PreTrainedModel) -> None:
    """Appends the MTP layer to the model's decoder layers, on the meta device. `why_not_run` must
    have returned None.
    """
    found = _layers(model)
    assert found is not None
    layers, base = found[1], model.get_decoder()
    kind = type(layers[-1])
    made = type(f"{kind.__name__}Mtp", (MtpLayer, kind), {})
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"), _one_more_layer(base.config):
            layers.append(made(base.config, len(layers), type(base.norm)))
    finally:
        torch.set_default_dtype(before)
    layers[-1].train(model.training)


@contextlib.contextmanager
def _one_more_layer(config: PretrainedConfig) -> Iterator[None]:
    """Inside, the configuration says of one layer more whether it has experts, which MTP layers of
    these models do.
    """
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is None:
        yield
        return
    config.mlp_layer_types = [*kinds, "sparse"]
    try:
        yield
    finally:
        config.mlp_layer_types = kinds


def mtp_layers(model: nn.Module) -> list[str]:
    """Qualified names of the MTP layers that a model was given."""
    return [name for name, module in model.named_modules() if isinstance(module, MtpLayer)]


@contextlib.contextmanager
def running_mtp(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every forward of a model also runs the MTP layer that it was given, if any.

    The layer gets the arguments of the last decoder layer: positions and masks are relative, so it
    makes no difference that its tokens are one further. What follows the last token of a row is
    unknown; the row's first token stands for it, and no other token attends to the result. It has
    no cache: of `generate`, it runs on the prompt.

    Raises, in a forward:
        UnsupportedModel: it continues cached tokens by several; or the layers' arguments are not
            known.
    """
    if not mtp_layers(model):
        yield
        return
    base = model.get_decoder()
    *_, last, layer = base.layers
    signature = inspect.signature(type(base).forward)
    given: dict[str, Any] = {}

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1:
            raise UnsupportedModel(
                f"{type(last).__name__} is given {len(args)} arguments by position, so what its "
                "multi-token-prediction layer needs is not known; observe the model without it"
            )
        given.clear()
        caches = dict.fromkeys(kwargs.keys() & {"past_key_values", "cache"})
        given.update({**kwargs, **caches})

    def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = signature.bind_partial(None, *args, **kwargs).arguments
        embeds = named.get("inputs_embeds")
        if embeds is None:
            embeds = base.get_input_embeddings()(named["input_ids"])
        cached = _cached_tokens(named.get("past_key_values"), embeds.shape[1])
        if cached and embeds.shape[1] == 1:
            return  # a step of generation: nothing follows its token
        if cached:
            raise UnsupportedModel(
                f"{type(model).__name__}: its multi-token-prediction layer is run on whole "
                f"sequences, and this forward continues {cached} cached tokens; pass them in one "
                "forward, or load the model without that layer (leave out `with_mtp=True`)"
            )
        hidden = output.last_hidden_state
        layer(hidden, following=embeds.roll(-1, dims=1).to(hidden.device), **given)

    handles = [
        last.register_forward_pre_hook(keep, with_kwargs=True),
        base.register_forward_hook(run, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cached_tokens(cache: Any, length: int) -> int:
    """How many tokens a cache held before a forward of `length` tokens that has ended."""
    return 0 if cache is None else int(cache.get_seq_length()) - length


def _layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and list of a model's decoder layers."""
    base = model.get_decoder()
    layers = getattr(base, "layers", None)
    norm = getattr(base, "norm", None)
    count = getattr(base.config, "num_hidden_layers", None)
    if not isinstance(layers, nn.ModuleList) or norm is None or len(layers) != count:
        return None
    return next(name for name, module in model.named_modules() if module is layers), layers
