"""Configurations of models: loaded from a checkpoint, and the fields that identify a model."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reap_driver.base.arguments import typed
from reap_driver.compat.config_file import read_config
from reap_driver.compat.config_texts import without_texts
from reap_driver.compat.library_errors import wrap_errors
from reap_kernels.errors import UnsupportedModel
from reap_kernels.schema import short

CORRECT = "correct the field, or use the transformers version the checkpoint was made for"

# Fields about how a model is stored or run, which do not identify it.
_VOLATILE_KEYS = frozenset(
    {
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "name_or_path",
        "transformers_version",
        "use_cache",
        "quantization_config",
        "compression_config",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "attn_implementation",
        "experts_implementation",
        "experts_impl",
        "base_model_ep_plan",  # loading FP8 weights adds entries
        "base_model_pp_plan",
        "base_model_tp_plan",
    }
)


@typed
def load_config(path_or_id: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load the configuration of a checkpoint.

    If transformers does not know the `model_type` (Kimi-K2's `kimi_k2`), the class that
    `architectures[0]` names is used. Classes of transformers are preferred to code that comes with
    the checkpoint.

    Args:
        path_or_id: folder of the checkpoint, or hub id.
        trust_remote_code: run code that comes with the checkpoint, if config.json names some.

    Raises:
        CheckpointError: there is no `config.json`, it cannot be read, or it has invalid values.
        UnsupportedModel: transformers knows neither `model_type` nor `architectures[0]`.

    Example:
        >>> rd.load_config("MODEL").num_experts
        32
    """
    raw = read_config(path_or_id)
    model_type, architecture = raw.get("model_type"), (raw.get("architectures") or [None])[0]
    remote = trust_remote_code and "auto_map" in raw
    what = (
        f"{path_or_id}: config.json (model_type {short(model_type)}) is not a valid configuration"
    )
    with wrap_errors(what, CORRECT), without_texts():
        config = _known_config(str(path_or_id), model_type, architecture, remote=remote)
    if config is not None:
        config._name_or_path = str(path_or_id)  # for messages
        return config
    remedy = (
        "pass `trust_remote_code=True` to run the checkpoint's own code"
        if "auto_map" in raw
        else "use a transformers version that knows it"
    )
    raise UnsupportedModel(
        f"{path_or_id}: model_type {short(model_type)} with architecture {short(architecture)} is "
        f"unknown to transformers {transformers.__version__}; {remedy}."
    )


def _known_config(
    path_or_id: str, model_type: object, architecture: str | None, *, remote: bool
) -> PretrainedConfig | None:
    """The configuration; None if neither transformers nor the checkpoint has a class for it."""
    if model_type in CONFIG_MAPPING and not remote:
        return CONFIG_MAPPING[str(model_type)].from_pretrained(path_or_id)
    native = native_class(architecture)
    if native is not None and native.config_class is not None:
        with quiet("transformers.configuration_utils"):  # it warns of the alias
            config = native.config_class.from_pretrained(path_or_id)
        # The library finds the key conversions of a model by this name; it has none for an alias.
        config.model_type = native.config_class.model_type
        return config
    return AutoConfig.from_pretrained(path_or_id, trust_remote_code=True) if remote else None


def config_digest(config: PretrainedConfig) -> str:
    """`sha256:...` over the fields that identify the model (`identifying_fields`).

    The digest stays the same when a configuration is saved, reloaded, dequantized, or read by
    another transformers version that only added fields.
    """
    return digest_of(identifying_fields(config))


def digest_of(identity: Mapping[str, Any]) -> str:
    """`sha256:...` over `identifying_fields` that have been computed."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@without_texts()
def identifying_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that differ from the defaults of its class, at every level,
    except those about how the model is stored or run (dtype, cache, quantization, version, paths).
    """
    try:
        defaults = _plain(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError, KeyError):  # no defaults: every field counts
        defaults = {}
    # The class has the type's own name; an alias such as kimi_k2 is on the instance.
    kept: dict[str, Any] = {"model_type": type(config).model_type}
    for key, value in _plain(config.to_dict()).items():
        if key.startswith("_") or key in _VOLATILE_KEYS:
            continue
        nested = getattr(config, key, None) if isinstance(value, dict) else None
        if isinstance(nested, PretrainedConfig):
            kept[key] = identifying_fields(nested)
        elif key not in defaults or value != defaults[key]:
            kept[key] = value
    return kept


def _plain(value: Any) -> Any:
    """A value as JSON represents it: tuples are lists, keys are strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def quantization_settings(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """`quantization_config` of a checkpoint; None if its weights are not quantized.

    Multimodal models may have it in the configuration of their text model (Kimi-K2.5).
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else dict(found.to_dict())


def native_class(architecture: str | None) -> type[PreTrainedModel] | None:
    """The model class of this name in transformers; None if it has none."""
    found = getattr(transformers, architecture, None) if architecture else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Inside, some of transformers' loggers are silent: the caller handles what they report."""
    targets = [logging.getLogger(name) for name in loggers]
    before = [target.level for target in targets]
    for target in targets:
        target.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for target, level in zip(targets, before, strict=True):
            target.setLevel(level)
