"""Runs a model on a batch: checks the inputs, moves them, and skips outputs that are not used."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils import TransformersKwargs

from reap_driver.compat.text_model import text_model
from reap_driver.model.isolation import documents_apart
from reap_driver.model.unwrap import check_mode, unwrap_model
from reap_kernels.errors import DataError
from reap_kernels.schema import short

# Arguments that every model of transformers accepts, whether its forward names them or not.
_COMMON = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "cache_position",
    "labels",
    *TransformersKwargs.__annotations__,
    *FlashAttentionKwargs.__annotations__,
)


def forward(model: PreTrainedModel, batch: Mapping[str, Any], *, all_logits: bool = False) -> Any:
    """The model's output for a batch, without gradients or cache.

    Args:
        model: a loaded or streamed model. If it has no forward of its own, its part that takes text
            runs (`text_model`).
        batch: the model's arguments (`input_ids` [batch, seq] int64, ...), which are moved to its
            device. `position_ids` [batch, seq] that restart inside a row mark packed documents,
            which are kept apart.
        all_logits: compute the logits of every token; otherwise those of the last one, if the model
            supports that.

    Raises:
        DataError: the batch has no inputs or is empty, a token id is outside the vocabulary, or the
            model has no argument for a tensor.
        UnsupportedModel: the model is in training mode, or it cannot keep packed documents apart.
    """
    model = unwrap_model(model)
    check_mode("", model)
    _check_names(model, batch)
    # Checked before the batch is moved: on a GPU, reading the ids would wait for all queued work,
    # and so would the move itself if the batch is not in pinned memory.
    model = text_model(model)
    _check_ids(model, batch.get("input_ids"))
    with torch.no_grad(), documents_apart(model.config, batch):
        device = input_device(model)
        if device.type != "meta":
            batch = {k: _moved(v, device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**{**_unused_outputs_off(model, batch, all_logits), **batch})


def _check_names(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Raises DataError for a tensor that is no argument of the model. Models accept any keyword and
    would silently ignore, for example, a mask whose name is misspelled.
    """
    if not any(batch.get(name) is not None for name in ("input_ids", "inputs_embeds")):
        raise DataError(
            f"a batch holds {', '.join(batch) or 'nothing'}; give input_ids [batch, seq], as the "
            "model's tokenizer makes them"
        )
    known = {*inspect.signature(type(model).forward).parameters, *_COMMON}
    for name, value in batch.items():
        if isinstance(value, Tensor) and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]}?" if near else "leave it out of the batch"
            raise DataError(
                f"{type(model).__name__} has no argument {name!r}, and would ignore the tensor "
                f"silently; {remedy}"
            )


def _unused_outputs_off(
    model: PreTrainedModel, batch: Mapping[str, Any], all_logits: bool
) -> dict[str, Any]:
    """Arguments that switch off outputs that are not used: the cache, router logits, attentions,
    hidden states, and all logits but the last token's.
    """
    parameters = inspect.signature(type(model).forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options: dict[str, Any] = {}
    if "use_cache" in parameters or open_ended:
        options["use_cache"] = False
    # A configuration may request them. Some classes compute a loss from router logits, which fails
    # when layers run one by one.
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if name in parameters:
            options[name] = False
    # A loss needs all logits. If layers share keys and values (gemma4), transformers 5.24 runs the
    # layers that reuse them only on the tokens whose logits are kept.
    text = model.config.get_text_config()
    shared = bool(getattr(text, "num_kv_shared_layers", 0))
    wanted = all_logits or "labels" in batch or shared
    if "logits_to_keep" in parameters and not wanted:
        options["logits_to_keep"] = 1
    return options


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of the embeddings, where token ids go; a streamed model's first parameter
    may be on the meta device.
    """
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # a class may not say which they are
        return model.device
    weight = next(embeddings.parameters(), None) if embeddings is not None else None
    return model.device if weight is None or weight.is_meta else weight.device


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; from pinned memory, the copy is queued without waiting for it."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def _check_ids(model: PreTrainedModel, ids: Any) -> None:
    """Raises DataError for an empty batch or a token id without an embedding."""
    if ids is None:
        return
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2:
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else short(ids)
        raise DataError(f"input_ids is {found}; give a tensor of int64 [batch, seq]")
    if not ids.numel():
        raise DataError(f"input_ids is empty (shape {tuple(ids.shape)}); give at least one token")
    embeddings = model.get_input_embeddings()
    size = embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else None
    low, high = (int(v) for v in torch.aminmax(ids))
    if size is not None and not 0 <= low <= high < size:
        raise DataError(
            f"input_ids holds token id {high if high >= size else low}, outside the model's "
            f"vocabulary of {size}; tokenize with the model's own tokenizer"
        )
