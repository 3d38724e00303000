"""In which format a checkpoint's weights are stored, and whether it can be observed.

Decided before anything is loaded, from config.json's quantization_config and the names and dtypes
in the headers: every command and every call that runs a model asks `check_storage`. Pruning by
files needs none of this: it moves what is stored, whatever it means.

Nothing is observed through another library: weights are read as plain floats, or not at all.
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
from reap_driver.files.compressed_scheme import METHOD, REMEDY, read_scheme
from reap_driver.files.quantization import method_of
from reap_driver.files.safetensors_file import TensorEntry
from reap_driver.load.compressed_matrices import plain_weights
from reap_driver.load.tensor_reader import TensorReader, stored
from reap_kernels.errors import CheckpointError, UnsupportedModel

_CORRECT = "restore the file from where the checkpoint was published"
_ONE = "use the config.json and weights of one and the same checkpoint"
_LAYER = re.compile(r"(.*?\.\d+)\.")  # up to the first number
PLAIN = frozenset({"BF16", "F16", "F32", "F64"})

# What the methods of quantization_config that are not read call themselves.
_NAMES = {
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "quanto": "quanto",
    "torchao": "torchao",
}


def check_storage(
    where: object,
    config: PretrainedConfig,
    tensors: Mapping[str, TensorEntry] | None,
    model: PreTrainedModel | None = None,
) -> None:
    """Raises where the weights cannot be read as plain floats, or are another model's.

    Args:
        where: folder or hub id, for messages.
        config: the model's.
        tensors: of the files' headers; None where there are no files, and config.json decides.
        model: on the meta device; built where it is not given.

    Raises:
        UnsupportedModel: a format or layout that is not read; says which, and what to do.
        CheckpointError: parts of compressed-tensors that do not fit each other, or weights that do
            not fit config.json.

    Example:
        >>> check_storage("model", config, open_checkpoint(Path("model")).tensors)
    """
    said = quantization_settings(config)
    method = None if said is None else method_of(said, "unnamed")
    if method is not None and method not in (*DEQUANTIZED_ON_LOAD, METHOD):
        name = _NAMES.get(method, f"the method {method!r}")
        raise UnsupportedModel(
            f"{where}: by quantization_config of config.json its weights are stored by {name}, "
            f"which is not read; {REMEDY}"
        )
    if method == METHOD:
        assert said is not None
        read_scheme(said, f"{where}: quantization_config")
    elif said is not None:
        with wrap_errors(f"{where}: quantization_config of config.json cannot be used", _CORRECT):
            AutoQuantizationConfig.from_dict(dict(said))
    if tensors is None:
        return
    with contextlib.closing(TensorReader()) as reader:
        found = plain_weights(stored(tensors, reader), said, where, torch.device("cpu"))
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


def _check_layout(
    where: object,
    keys: KeyMap,
    state: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    dtypes: Mapping[str, str],
    method: str | None,
) -> None:
    """Raises for a module whose tensors are there, but not as the model's class reads them.

    Args:
        where: for messages.
        keys: the model's.
        state: the model's tensors on the meta device.
        targets: where every tensor of the files goes.
        dtypes: of these, compressed-tensors' made plain.
        method: by which the rest is made plain; None for none.
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
        if floats and dtype not in PLAIN and not _is_made_plain(key, dtypes, method):
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
    """Raises where config.json promises another shape, or a layer of which nothing is there.

    Args:
        where: for messages.
        model: on the meta device.
        targets: where every tensor of the files goes.
        shapes: of those that are stored as they are; what is made of several is not judged.
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
            f"{where}: config.json promises {len(layers)} layers, and of {len(absent)} nothing is "
            f"in the files, first {absent[0]}; {_ONE}"
        )


def _by(method: str | None) -> str:
    return " without a quantization_config" if method is None else f" as {method}"


def _weight_of(key: str, method: str | None) -> str:
    """The weight that a part of it goes with."""
    if method == "mxfp4":
        return key.removesuffix("_blocks").removesuffix("_scales")
    if method == "fp8" and key.endswith(".scale"):
        return key.removesuffix("scale") + "weight"
    return key.removesuffix("_scale_inv") if method == "fp8" else key


def _is_made_plain(key: str, dtypes: Mapping[str, str], method: str | None) -> bool:
    """Whether the library makes floats of a tensor, with the scales that stand beside it, or
    whether it is such a scale.
    """
    if method == "mxfp4":
        parts = {key.removesuffix(end) + other for end, other in _PAIRS if key.endswith(end)}
        return bool(parts) and parts <= dtypes.keys()
    if method != "fp8":
        return False
    weight = _weight_of(key, method)
    if weight != key:
        return weight in dtypes
    scales = {f"{key}_scale_inv", key.removesuffix("weight") + "scale"}
    return key.endswith(".weight") and not scales.isdisjoint(dtypes)


_PAIRS = (("_blocks", "_scales"), ("_scales", "_blocks"))


def _beside(key: str, dtypes: Mapping[str, str]) -> Iterator[str]:
    """Names of the tensors that go with one: of its module, or of the same stack of experts."""
    stem = key.removesuffix("weight")
    for other in dtypes:
        if other != key and other.startswith(stem):
            yield other.removeprefix(key.rpartition(".")[0] + ".")


def _parents(name: str) -> Iterator[str]:
    """Modules around a tensor, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
