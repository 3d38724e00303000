"""Configurations and models: resolve, digest, load, build on meta; the class for a config."""

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from reap_driver.base.arguments import typed
from reap_driver.compat.config_file import read_config
from reap_driver.compat.foreign import foreign, offending_field, one_line
from reap_driver.compat.fp8 import partial_blocks
from reap_driver.compat.load_pruned import built_per_layer
from reap_driver.files.compressed_scheme import is_compressed
from reap_kernels.errors import CheckpointError, UnsupportedModel
from reap_kernels.schema import short

_CORRECT = "correct the field, or use the transformers version the checkpoint was made for"

# Auto mappings tried, in order, for a config whose `architectures` names no class we can use.
_AUTO_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)

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

# Quantised formats that transformers can unpack to plain floats while loading, by config class.
DEQUANTISED_ON_LOAD = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


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
    with foreign(what, _CORRECT):
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
    native = _native_class(architecture)
    if native is not None and native.config_class is not None:
        with _quiet("transformers.configuration_utils"):  # warns of the alias
            config = native.config_class.from_pretrained(path_or_id)
        # The library looks up a model's key conversions by this name; an alias has none.
        config.model_type = native.config_class.model_type
        return config
    return AutoConfig.from_pretrained(path_or_id, trust_remote_code=True) if remote else None


def read_model(
    path_or_id: str | Path, *, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The configuration of a checkpoint, and its model on the meta device; no weights are read.

    Whatever config.json holds, the outcome is a model or one error that names the file.

    Raises:
        CheckpointError, UnsupportedModel: see `load_config`, `model_class` and `meta_model`.

    Example:
        >>> config, model = read_model("Qwen3-30B-A3B")
    """
    config = load_config(path_or_id, trust_remote_code=trust_remote_code)
    return config, meta_model(config)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class to build for `config`: the one `architectures[0]` names if it fits, else Auto's.

    Raises:
        UnsupportedModel: transformers has no model class for this configuration.
    """
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if type(config).__module__.startswith("transformers_modules"):
        return _remote_class(config)
    if (
        config.model_type == "step3p5"
    ):  # the text config of step3p7: transformers ships no causal LM for it
        from reap_driver.compat.step3p5 import Step3p5ForCausalLM

        return Step3p5ForCausalLM
    native = _native_class(architecture)
    if native is not None and isinstance(config, native.config_class or ()):
        return native
    for name in _AUTO_MAPPINGS:
        mapping = getattr(modeling_auto, name, None)
        found = mapping.get(type(config), None) if mapping is not None else None
        if found is not None:
            chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return chosen
    raise UnsupportedModel(
        f"transformers {transformers.__version__} has no model class for architecture "
        f"{short(architecture)} ({type(config).__name__}); use a version that has one."
    )


def config_digest(config: PretrainedConfig) -> str:
    """`sha256:...` over what identifies the model: fields that differ from its class's defaults.

    Fields that say how the model is stored or run (dtype, cache, quantisation, version, paths) are
    left out at every level, so a config in memory, saved, reloaded, dequantised, or read by another
    transformers version that only added fields, keeps its digest.
    """
    identity = identifying_fields(config)
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def from_checkpoint(
    path_or_id: str | Path,
    config: PretrainedConfig,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What the library's own `from_pretrained` makes of a checkpoint, and its report of loading.

    What compressed-tensors stores is expected as plain weights (`compressed.matrices` makes them).

    Raises:
        CheckpointError: the library cannot load it; what its report says is not judged
            (`check_loading` does).
        UnsupportedModel: see `model_class`.
    """
    cls = model_class(config)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if is_compressed(quantisation(config)):
        config = _unquantised(config)
    method = _quant_method(config)
    if method in DEQUANTISED_ON_LOAD:
        options["quantization_config"] = getattr(transformers, DEQUANTISED_ON_LOAD[method])(
            dequantize=True
        )
    if device_map is not None:
        options.update(device_map=device_map, offload_folder=offload_folder)
    # Its report of missing keys is raised below; its tensor-parallel advice is noise.
    noisy = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    remedy = "check config.json, generation_config.json and the weights, or download them again"
    with foreign(f"{path_or_id}: the model cannot be loaded", remedy):
        with _quiet(*noisy), partial_blocks(), built_per_layer(cls):
            model, info = cls.from_pretrained(
                str(path_or_id),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused by check_loading
                **options,
            )
        return model.eval(), info


def meta_model(
    config: PretrainedConfig, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Build the model of `config` on the meta device: names and shapes of tensors, no memory.

    Args:
        config: the configuration.
        cls: the class to build, by default `model_class(config)`.

    Raises:
        CheckpointError: the configuration has values that no model can be built with.
    """
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    chosen = model_class(config) if cls is None else cls

    def build(config: PretrainedConfig) -> PreTrainedModel:
        with contextlib.ExitStack() as stack:
            for context in (torch.device("meta"), meta_device_safe_creation_ops()):
                stack.enter_context(context)
            stack.enter_context(no_init_weights())
            stack.enter_context(built_per_layer(chosen))
            return chosen(config)

    def culprit(raised: Exception) -> str | None:
        with _quiet("transformers"):
            return offending_field(
                config.to_dict(), raised, lambda edited: build(type(config).from_dict(edited))
            )

    name = config._name_or_path or "model"
    what = f"{name}: config.json does not describe a {chosen.__name__} that can be built"
    with foreign(what, _CORRECT, culprit=culprit):
        return build(config)


def _native_class(architecture: str | None) -> type[PreTrainedModel] | None:
    """The model class of that name in transformers, if there is one."""
    found = getattr(transformers, architecture, None) if architecture else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _remote_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class a checkpoint's own code declares (the config was loaded with trust_remote_code)."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
        if auto in auto_map:
            what = f"{config._name_or_path}: the code that auto_map of config.json names"
            with foreign(f"{what} cannot be used", "install what it needs, or restore the files"):
                cls: type[PreTrainedModel] = get_class_from_dynamic_module(
                    auto_map[auto], config._name_or_path
                )
                return cls
    raise UnsupportedModel(
        f"{config._name_or_path}: auto_map of config.json names no model class: {auto_map}."
    )


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


def quantisation(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """How the checkpoint is quantised, as its config.json says; None if it holds plain floats.

    Models with images or sound may say it in the configuration of their text model (Kimi-K2.5).
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, Mapping) else dict(found.to_dict())


def _quant_method(config: PretrainedConfig) -> str | None:
    """Name of the checkpoint's quantisation format, None if it holds plain floats."""
    found = quantisation(config)
    if found is None:
        return None
    method = found.get("quant_method")
    return str(getattr(method, "value", method))


def _unquantised(config: PretrainedConfig) -> PretrainedConfig:
    """The same without a word of quantisation: the library then builds plain modules."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def check_loading(path_or_id: str | Path, info: dict[str, Any], model: PreTrainedModel) -> None:
    """Raise when loading left tensors random, of another shape, or experts and routers unused.

    Raises:
        CheckpointError: names the first such tensor.
    """
    errors = info.get("conversion_errors") or info.get("error_msgs")
    if errors:
        raise CheckpointError(
            f"{path_or_id}: weights could not be converted: {one_line(str(errors))}"
        )
    layers = {name for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()}
    unused = (key for key in info.get("unexpected_keys") or () if _is_routed(str(key), layers))
    problems = {
        "missing from the checkpoint": sorted(str(key) for key in info.get("missing_keys") or ()),
        "experts or routers unknown to the model": sorted(unused),
        "of another shape than config.json says": sorted(
            f"{key} ({list(found)} instead of {list(wanted)})"
            for key, found, wanted in info.get("mismatched_keys") or ()
        ),
    }
    for what, keys in problems.items():
        if keys:
            raise CheckpointError(
                f"{path_or_id}: {len(keys)} tensors are {what}, first {keys[0]}; "
                "use the config.json and weights of one and the same checkpoint."
            )


def _is_routed(key: str, layers: set[str]) -> bool:
    """Whether a key unknown to the model belongs to experts or a router of a layer the model has.

    Multi-token-prediction layers sit past the model's last layer or under a module of their own,
    and may be ignored.
    """
    mentions = any(part in key for part in ("expert", "router", ".gate.", ".moe."))
    return mentions and any(key.startswith(layer + ".") for layer in layers)


@contextlib.contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
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
