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
from reap_driver.compat.library_errors import wrap_errors
from reap_kernels.errors import UnsupportedModel
from reap_kernels.schema import short

CORRECT = "correct the field, or use the transformers version the checkpoint was made for"

# Keys that say how a model was stored or is run, not which model it is.
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
    """Read the configuration of a local checkpoint folder or of a hub id.

    A `model_type` unknown to transformers (Kimi-K2's `kimi_k2`) is resolved through
    `architectures[0]` when that names a class the library has; native classes are preferred to code
    shipped with a checkpoint.

    Raises:
        CheckpointError: no readable `config.json` there.
        UnsupportedModel: neither `model_type` nor `architectures[0]` is known.
    """
    raw = read_config(path_or_id)
    model_type, architecture = raw.get("model_type"), (raw.get("architectures") or [None])[0]
    remote = trust_remote_code and "auto_map" in raw
    what = (
        f"{path_or_id}: config.json (model_type {short(model_type)}) is not a valid configuration"
    )
    with wrap_errors(what, CORRECT):
        config = _known_config(str(path_or_id), model_type, architecture, remote=remote)
    if config is not None:
        config._name_or_path = str(path_or_id)  # for messages
        return config
    remedy = (
        "pass trust_remote_code=True (--trust-remote-code) to run the checkpoint's own code"
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
    """What the class for it makes of config.json; None where there is no class."""
    if model_type in CONFIG_MAPPING and not remote:
        return CONFIG_MAPPING[str(model_type)].from_pretrained(path_or_id)
    native = native_class(architecture)
    if native is not None and native.config_class is not None:
        with quiet("transformers.configuration_utils"):  # warns of the alias
            config = native.config_class.from_pretrained(path_or_id)
        # The library looks up a model's key conversions by this name; an alias has none.
        config.model_type = native.config_class.model_type
        return config
    return AutoConfig.from_pretrained(path_or_id, trust_remote_code=True) if remote else None


def config_digest(config: PretrainedConfig) -> str:
    """`sha256:...` over what identifies the model: fields that differ from its class's defaults.

    Fields that say how the model is stored or run (dtype, cache, quantization, version, paths) are
    left out at every level, so a config in memory, saved, reloaded, dequantised, or read by another
    transformers version that only added fields, keeps its digest.
    """
    identity = identifying_fields(config)
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def identifying_fields(config: PretrainedConfig) -> dict[str, Any]:
    """What `config_digest` is made of: the fields of one (sub) config that differ from its class's
    defaults, less volatile ones.
    """
    try:
        defaults = _plain(type(config)().to_dict())
    except (TypeError, ValueError, AttributeError, KeyError):  # no default: every field counts
        defaults = {}
    kept: dict[str, Any] = {
        "model_type": type(config).model_type
    }  # an alias such as kimi_k2 lives on the instance
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
    """JSON's view of a value: tuples are lists, keys are strings."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def quantization_settings(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How the checkpoint is quantised, as its config.json says; None if it holds plain floats.

    Models with images or sound may say it in the configuration of their text model (Kimi-K2.5).
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else dict(found.to_dict())


def native_class(architecture: str | None) -> type[PreTrainedModel] | None:
    """The model class of that name in transformers, if there is one."""
    found = getattr(transformers, architecture, None) if architecture else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence some of transformers' loggers while what they would report is handled here."""
    targets = [logging.getLogger(name) for name in loggers]
    before = [target.level for target in targets]
    for target in targets:
        target.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for target, level in zip(targets, before, strict=True):
            target.setLevel(level)
