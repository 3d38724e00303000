"""Checks, before anything is loaded, whether a checkpoint's weights can be read for observation.

The check uses the quantizer that the configuration names, and the names, dtypes and shapes in the
headers. Every command and function that runs a model calls `check_storage`. Applying a plan does
not need it, because it copies tensors without interpreting them.

Models are observed with floating-point weights only, never through a quantization library.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from reap_driver.compat.conversion import KeyMap, Target
from reap_driver.compat.library_errors import wrap_errors
from reap_driver.compat.model_config import quantization_settings
from reap_driver.compat.pretrained import DEQUANTIZED_ON_LOAD, meta_model
from reap_driver.files.quantization import REMEDY, Quantization, method_of
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.load.methods import plain_weights
from reap_driver.load.tensor_reader import PLAIN, TensorReader, stored
from reap_kernels.errors import CheckpointError, UnsupportedModel

_CORRECT = "restore the file from where the checkpoint was published"
_ONE = "use the config.json and weights of one and the same checkpoint"
_LAYER = re.compile(r"(.*?\.\d+)\.")  # the name up to the first number


def check_storage(
    where: object,
    config: PretrainedConfig,
    quantization: Quantization,
    tensors: Mapping[str, TensorEntry] | None,
    model: PreTrainedModel | None = None,
) -> None:
    """Raises an error if the weights cannot be read as floats or do not belong to the model.

    Args:
        where: folder or hub id, for error messages.
        config: the model's configuration.
        quantization: the quantizer that its files name.
        tensors: key -> tensor, from the headers of the files; None if there are no files, so that
            only the configuration is checked.
        model: the model on the meta device; it is built if not given.

    Raises:
        UnsupportedModel: the weights are in a format or layout that cannot be read.
        CheckpointError: the tensors of a matrix do not match each other, or the weights do not
            match config.json.
    """
    method = quantization.method
    if method in DEQUANTIZED_ON_LOAD:
        _check_library(where, config, quantization)
    if tensors is None:
        plain_weights({}, quantization, where, torch.device("cpu"))
        return
    with contextlib.closing(TensorReader()) as reader:
        found = plain_weights(stored(tensors, reader), quantization, where, torch.device("cpu"))
        dtypes = {key: tensor.get_dtype() for key, tensor in found.items()}
        shapes = {key: tuple(tensor.get_shape()) for key, tensor in found.items()}
    model = meta_model(config) if model is None else model
    keys = KeyMap(model)
    targets = {key: keys.locate(_weight_of(key, method)) for key in dtypes}
    _check_layout(where, keys, model.state_dict(), targets, dtypes, method)
    whole = {
        key for key, dtype in dtypes.items() if dtype in PLAIN and _weight_of(key, method) == key
    }
    _check_sizes(where, model, targets, {key: shapes[key] for key in whole})


def _check_library(where: object, config: PretrainedConfig, quantization: Quantization) -> None:
    """Raises an error if the library, which is to dequantize the weights, cannot use the settings,
    or does not look for them where they are.
    """
    settings = quantization_settings(config)
    if settings is None or method_of(settings, None) != quantization.method:
        raise UnsupportedModel(
            f"{where}: {quantization.origin} names the method {quantization.method!r}, which is "
            f"read only if quantization_config of config.json names it; {REMEDY}"
        )
    with wrap_errors(f"{where}: quantization_config of config.json cannot be used", _CORRECT):
        AutoQuantizationConfig.from_dict(dict(settings))


def _check_layout(
    where: object,
    keys: KeyMap,
    state: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    dtypes: Mapping[str, str],
    method: str | None,
) -> None:
    """Raises UnsupportedModel for tensors in a layout that the model's class cannot load.

    Args:
        where: folder or hub id, for error messages.
        keys: key map of the model.
        state: the model's tensors on the meta device.
        targets: where each tensor of the files goes.
        dtypes: their dtypes, after dequantizing what `load.methods` reads.
        method: quantization method that the library dequantizes; None for none.
    """
    found: set[str] = set()
    others: list[tuple[str, str]] = []
    for key, target in targets.items():
        dtype = dtypes[key]
        if not keys.known(target):
            others.append((key, target.name))
            continue
        found.update(target.names)
        floats = state[target.name].is_floating_point()
        if floats and dtype not in PLAIN and not _is_dequantized(key, dtypes, method):
            beside = ", ".join(sorted(_beside(key, dtypes))) or "no scales"
            raise UnsupportedModel(
                f"{where}: {key} is stored as {dtype} with {beside}, a layout that is not read"
                f"{_by(method)}; {REMEDY}"
            )
    lost = {name.rpartition(".")[0] for name in state if name not in found}
    for key, name in others:
        inside = next((module for module in _parents(name) if module in lost), None)
        if inside is not None:
            raise UnsupportedModel(
                f"{where}: {inside} is stored as {key} ({dtypes[key]}) and the like, a layout that "
                f"is not read{_by(method)}; {REMEDY}"
            )


def _check_sizes(
    where: object,
    model: PreTrainedModel,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises CheckpointError if a shape differs from the model's, or all tensors of a layer are
    missing.

    Args:
        where: folder or hub id, for error messages.
        model: the model on the meta device.
        targets: where each tensor of the files goes.
        shapes: shapes of the tensors that are loaded as they are; tensors that a conversion
            combines are not checked.
    """
    state = model.state_dict()
    other = []
    for key, shape in shapes.items():
        target = targets[key]
        alone = target.pattern is None and target.name in state
        if alone and shape != state[target.name].shape:
            other.append(f"{key} ({list(shape)} instead of {list(state[target.name].shape)})")
    if other:
        raise CheckpointError(
            f"{where}: {len(other)} tensors are of another shape than config.json says, first "
            f"{min(other)}; {_ONE}"
        )
    found = {name for target in targets.values() for name in target.names}
    found |= set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    layers: dict[str, bool] = {}
    for name in state:
        layer = _LAYER.match(name)
        if layer is not None and not any(re.search(pattern, name) for pattern in ignored):
            layers[layer[1]] = layers.get(layer[1], False) or name in found
    absent = [layer for layer, some in layers.items() if not some]
    if absent:
        raise CheckpointError(
            f"{where}: config.json has {len(layers)} layers, and the files have no tensor of "
            f"{len(absent)} of them, first {absent[0]}; {_ONE}"
        )


def _by(method: str | None) -> str:
    return " without a quantization_config" if method is None else f" as {method}"


def _weight_of(key: str, method: str | None) -> str:
    """The key of the weight to which a tensor of scales or blocks belongs."""
    if method == "mxfp4":
        return key.removesuffix("_blocks").removesuffix("_scales")
    if method == "fp8" and key.endswith(".scale"):
        return key.removesuffix("scale") + "weight"
    return key.removesuffix("_scale_inv") if method == "fp8" else key


def _is_dequantized(key: str, dtypes: Mapping[str, str], method: str | None) -> bool:
    """Whether the library dequantizes a tensor by scales that the checkpoint has, or whether the
    tensor holds such scales.
    """
    if method == "mxfp4":
        parts = {key.removesuffix(end) + other for end, other in _PAIRS if key.endswith(end)}
        return bool(parts) and parts <= dtypes.keys()
    if method != "fp8":
        return False
    weight = _weight_of(key, method)
    if weight != key:
        return weight in dtypes
    scales = (f"{key}_scale_inv", key.removesuffix("weight") + "scale")
    return key.endswith(".weight") and any(scale in dtypes for scale in scales)


_PAIRS = (("_blocks", "_scales"), ("_scales", "_blocks"))


def _beside(key: str, dtypes: Mapping[str, str]) -> Iterator[str]:
    """Names of the other tensors of the same module or stack of experts."""
    stem = key.removesuffix("weight")
    for other in dtypes:
        if other != key and other.startswith(stem):
            yield other.removeprefix(key.rpartition(".")[0] + ".")


def _parents(name: str) -> Iterator[str]:
    """Names of the modules that contain a tensor, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
