"""Loads a checkpoint whose layers keep different numbers of experts; needs transformers alone.

    from load_pruned import from_pretrained  # this file lies beside the weights

    model = from_pretrained("path/to/checkpoint", dtype="auto", device_map="auto")

transformers gives every layer of a model the same number of experts, the one in config.json. Here
that is the largest, so its own `from_pretrained` refuses the weights of the other layers. The
number of each layer is in another field of config.json:

    "experts_per_layer": {
      "count_fields": ["num_experts"],
      "counts": {"model.layers.0.mlp.experts": 96, "model.layers.1.mlp.experts": 64}
    }

`count_fields` are the fields of the configuration (dotted if nested) that set the number of experts
of all layers; `counts` is the number of experts of each experts module. The model is built once for
every number that occurs, without weights, and each decoder layer is taken from the model with that
layer's number. Loading, saving, devices and quantization are the library's.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

SETTINGS = "experts_per_layer"  # the key in config.json
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")  # where the files come from


def from_pretrained(path_or_id: str, **options: Any) -> PreTrainedModel:
    """Loads the model, as the `from_pretrained` of its class does.

    Args:
        path_or_id: folder of the checkpoint, or its hub id.
        options: arguments of the library's `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        ValueError: transformers has no class for the model, or the settings are damaged.
    """
    hub = {key: options[key] for key in _HUB_OPTIONS if key in options}
    raw, _ = PretrainedConfig.get_config_dict(path_or_id, **hub)
    names, codes = raw.get("architectures"), raw.get("auto_map")
    name = str(names[0]) if isinstance(names, list) and names else ""
    remote = codes.get("AutoModelForCausalLM") if isinstance(codes, dict) else None
    cls: Any
    if options.get("trust_remote_code") and remote is not None:
        config = AutoConfig.from_pretrained(path_or_id, trust_remote_code=True, **hub)
        cls = get_class_from_dynamic_module(remote, path_or_id, **hub)
    else:
        cls = getattr(transformers, name, None)
        if cls is None:
            raise ValueError(
                f"{path_or_id}: transformers {transformers.__version__} has no class {name!r}; use "
                "another version, trust_remote_code=True for code that comes with the checkpoint, "
                "or load_model of reap_driver"
            )
        config = cls.config_class.from_pretrained(path_or_id, **hub)
        config.model_type = cls.config_class.model_type  # config.json may have an unknown alias
    with built_per_layer(cls):
        model: PreTrainedModel = cls.from_pretrained(path_or_id, config=config, **options)
    return model


@contextlib.contextmanager
def built_per_layer(cls: Any) -> Iterator[None]:
    """Inside, each layer of a model of class `cls` has the number of experts that `counts` of its
    configuration gives; models whose configuration has no `counts` are built as usual.
    """
    own, inherited = cls.__init__, "__init__" not in vars(cls)

    @functools.wraps(own)
    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        own(self, config, *args, **kwargs)
        fields, counts = _settings(config)
        for count in sorted(set(counts.values()) - {max(counts.values(), default=0)}):
            other = cls.__new__(cls)
            own(other, _with_count(config, fields, count), *args, **kwargs)
            for layer in {_decoder_layer(name) for name in counts if counts[name] == count}:
                _take_layer(self, other, layer)

    cls.__init__ = build
    try:
        yield
    finally:
        if inherited:
            del cls.__init__
        else:
            cls.__init__ = own


def _settings(config: PretrainedConfig) -> tuple[list[str], Mapping[str, int]]:
    """`count_fields` and `counts` of a configuration; both empty if it has neither."""
    found = getattr(config, SETTINGS, None)
    if found is None:
        return [], {}
    fields: Any = found.get("count_fields") if isinstance(found, dict) else None
    counts: Any = found.get("counts") if isinstance(found, dict) else None
    named = isinstance(fields, list) and all(isinstance(field, str) for field in fields)
    fine = named and fields and isinstance(counts, dict) and counts
    if not fine or not all(isinstance(n, int) and n > 0 for n in counts.values()):
        raise ValueError(
            f"config.json: {SETTINGS!r} is {str(found)[:80]}, expected an object of count_fields "
            "(names) and counts (numbers by layer); restore the file"
        )
    return fields, counts


def _with_count(config: PretrainedConfig, fields: list[str], count: int) -> PretrainedConfig:
    """A copy of the configuration that gives every layer this number of experts."""
    changed = copy.deepcopy(config)
    for field in fields:
        *path, name = field.split(".")
        try:
            part: Any = functools.reduce(_field, path, changed)
            old = _field(part, name)
        except (AttributeError, KeyError) as error:
            raise ValueError(
                f"config.json: {SETTINGS!r} says that {field!r} counts experts, which is no field "
                f"of {type(config).__name__}; restore the file"
            ) from error
        new = [count] * len(old) if isinstance(old, list) else count
        part.update({name: new}) if isinstance(part, dict) else setattr(part, name, new)
    return changed


def _field(part: Any, name: str) -> Any:
    """A field of a configuration, or of a nested object that is a plain dictionary."""
    return part[name] if isinstance(part, dict) else getattr(part, name)


def _decoder_layer(name: str) -> str:
    """`model.layers.3` for `model.layers.3.mlp.experts`: everything up to the first number."""
    path = name.split(".")
    number = next((place for place, part in enumerate(path) if part.isdigit()), len(path))
    return ".".join(path[: number + 1])


def _take_layer(model: nn.Module, other: nn.Module, name: str) -> None:
    """Replaces a layer of a model by the same layer of another model.

    Its modules that do not depend on the number of experts share the configuration object of the
    first model, so that later changes of it (`set_attn_implementation`) reach them.
    """
    try:
        old, new = model.get_submodule(name), other.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"config.json: {SETTINGS!r} names {name!r}, which this model does not have "
            f"({error}); use the transformers version the checkpoint was written with"
        ) from error
    shapes = {key: tensor.shape for key, tensor in old.state_dict().items()}
    for path, module in new.named_modules():
        same = all(
            shapes.get(f"{path}.{key}" if path else key) == tensor.shape
            for key, tensor in module.state_dict().items()
        )
        if same and hasattr(module, "config"):
            module.config = old.get_submodule(path).config
    model.set_submodule(name, new)
