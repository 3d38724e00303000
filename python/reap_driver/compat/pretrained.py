"""Models: their class for a configuration, built on the meta device, and loaded."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from reap_driver.compat.config_texts import without_texts
from reap_driver.compat.fp8 import partial_blocks
from reap_driver.compat.library_errors import offending_field, one_line, wrap_errors
from reap_driver.compat.load_pruned import built_per_layer
from reap_driver.compat.model_config import (
    CORRECT,
    load_config,
    native_class,
    quantization_settings,
    quiet,
)
from reap_driver.compat.replacement import LIBRARY
from reap_kernels.errors import CheckpointError, UnsupportedModel
from reap_kernels.schema import short

# Auto mappings tried in this order if `architectures` of a configuration names no usable class.
_AUTO_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)

# Quantization methods that transformers can dequantize while loading -> its class of settings.
DEQUANTIZED_ON_LOAD = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}


def read_model(
    path_or_id: str | Path, *, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The configuration of a checkpoint, and its model on the meta device. Reads no weights.

    Whatever config.json contains, the result is a model or one error that names the file.

    Raises:
        CheckpointError, UnsupportedModel: see `load_config`, `model_class` and `meta_model`.

    Example:
        >>> config, model = read_model("MODEL")
    """
    config = load_config(path_or_id, trust_remote_code=trust_remote_code)
    return config, meta_model(config)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class for a configuration: that of `architectures[0]` if it fits, else Auto's.

    Raises:
        UnsupportedModel: transformers has no model class for this configuration.
    """
    architecture = (getattr(config, "architectures", None) or [None])[0]
    if type(config).__module__.startswith("transformers_modules"):
        return _remote_class(config)
    if config.model_type == "step3p5":  # transformers has its text model but no causal LM
        from reap_driver.compat.step3p5 import Step3p5ForCausalLM

        return Step3p5ForCausalLM
    native = native_class(architecture)
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


def from_checkpoint(
    path_or_id: str | Path,
    config: PretrainedConfig,
    *,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads a checkpoint by the library's own `from_pretrained`; returns the model and the
    library's loading report, which `check_loading` evaluates.

    It dequantizes the methods of `DEQUANTIZED_ON_LOAD`. Weights of others must have been replaced
    by dequantized ones (`load.methods`), since no other quantizer of the library is started.

    Raises:
        CheckpointError: the library cannot load the checkpoint.
        UnsupportedModel: see `model_class`.
    """
    cls = model_class(config)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    method = _quant_method(config)
    if method in DEQUANTIZED_ON_LOAD:
        options["quantization_config"] = getattr(transformers, DEQUANTIZED_ON_LOAD[method])(
            dequantize=True
        )
    elif method is not None:
        config = _unquantized(config)
    if device_map is not None:
        options.update(device_map=device_map, offload_folder=offload_folder)
    # `check_loading` raises what it warns of; its advice on tensor parallelism does not apply.
    noisy = ("transformers.modeling_utils", "transformers.distributed.tensor_parallel")
    remedy = "check config.json, generation_config.json and the weights, or download them again"
    with wrap_errors(f"{path_or_id}: the model cannot be loaded", remedy):
        with LIBRARY, quiet(*noisy), partial_blocks(), built_per_layer(cls):
            model, info = cls.from_pretrained(
                str(path_or_id),
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_loading raises for them
                **options,
            )
        return model.eval(), info


def meta_model(
    config: PretrainedConfig, cls: type[PreTrainedModel] | None = None
) -> PreTrainedModel:
    """Builds the model of a configuration on the meta device: names and shapes, no memory.

    Args:
        config: the configuration.
        cls: the class to build; `model_class(config)` by default.

    Raises:
        CheckpointError: no model can be built with the values of the configuration.
    """
    from transformers.initialization import meta_device_safe_creation_ops, no_init_weights

    chosen = model_class(config) if cls is None else cls

    def build(config: PretrainedConfig) -> PreTrainedModel:
        with LIBRARY, contextlib.ExitStack() as stack:
            for context in (torch.device("meta"), meta_device_safe_creation_ops()):
                stack.enter_context(context)
            stack.enter_context(no_init_weights())
            stack.enter_context(without_texts())
            stack.enter_context(built_per_layer(chosen))
            return chosen(config)

    def culprit(raised: Exception) -> str | None:
        with quiet("transformers"):
            return offending_field(
                config.to_dict(), raised, lambda edited: build(type(config).from_dict(edited))
            )

    name = config._name_or_path or "model"
    what = f"{name}: config.json does not describe a {chosen.__name__} that can be built"
    with wrap_errors(what, CORRECT, culprit=culprit):
        return build(config)


def _remote_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The model class in a checkpoint's own code, whose configuration was loaded from there too."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    auto_map = getattr(config, "auto_map", None) or {}
    for auto in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel"):
        if auto in auto_map:
            what = f"{config._name_or_path}: the code that auto_map of config.json names"
            with wrap_errors(
                f"{what} cannot be used", "install what it needs, or restore the files"
            ):
                cls: type[PreTrainedModel] = get_class_from_dynamic_module(
                    auto_map[auto], config._name_or_path
                )
                return cls
    raise UnsupportedModel(
        f"{config._name_or_path}: auto_map of config.json names no model class: {auto_map}."
    )


def _quant_method(config: PretrainedConfig) -> str | None:
    """`quant_method` of the checkpoint; None if its weights are not quantized."""
    found = quantization_settings(config)
    if found is None:
        return None
    method = found.get("quant_method")
    return str(getattr(method, "value", method))


def _unquantized(config: PretrainedConfig) -> PretrainedConfig:
    """A copy without `quantization_config`, for which the library builds ordinary modules."""
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return plain


def check_loading(path_or_id: str | Path, info: dict[str, Any], model: PreTrainedModel) -> None:
    """Evaluates the library's loading report.

    Raises:
        CheckpointError: a tensor is missing, has another shape than in the model, or belongs to an
            expert or router that the model does not have. Names the first such tensor.
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
    """Whether a key that the model lacks belongs to an expert or router of a layer that it has.

    Keys of multi-token-prediction layers, which follow the last layer or are in a module of their
    own, may be ignored.
    """
    mentions = any(part in key for part in ("expert", "router", ".gate.", ".moe."))
    return mentions and any(key.startswith(layer + ".") for layer in layers)
