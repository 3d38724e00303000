"""Observation files of the reference implementation of REAP (github.com/CerebrasResearch/reap):
`torch.save` of {number of the decoder layer: {key: tensor}}.

Its router weights are a softmax over the logits of all experts, by default divided by the sum of
those that are chosen, and experts are chosen by their logits; models whose routers compute
otherwise (sigmoid scores, a bias for the choice) are observed otherwise there. Sums of squares,
least elements, calibration groups and parts are not recorded, and of the largest elements those
below 0 as 0.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from reap_driver.interchange.content import ModelFacts, Source
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.documents import open_file
from reap_kernels.errors import DataError
from reap_kernels.schema import short
from reap_kernels.stats import OPTIONAL
from reap_kernels.stats_values import check_values

WHAT = "observation file of the reference implementation"
GROUP = "imported"
GATE = "a softmax over the logits of all experts, as the reference implementation takes it"
# Our fields by the keys that hold them: [E], but `tokens`, which has no dimension.
FIELDS = {
    "expert_frequency": "count",
    "total_tokens": "tokens",
    "weighted_expert_frequency_sum": "router_weight_sum",
    "ean_sum": "norm_sum",
    "weighted_ean_sum": "weighted_norm_sum",
    "max_activations": "out_max",
}
_NEEDED = ("expert_frequency", "total_tokens")
_CODE = re.compile(r"GLOBAL ([\w.]+)")


def read(path: Path, model: ModelFacts) -> SaliencyStats:
    """The statistics that a file holds.

    Nothing in the file is executed: a file that needs code, such as those that the reference's
    layer-by-layer observer writes for each block, is refused.

    Args:
        path: of the file.
        model: that was observed.

    Raises:
        DataError: it is no such file, not of this model, or its numbers are none that an
            observation leaves; names file, layer and key.
    """
    content, names = _loaded(path), model.numbers()
    if set(content) != set(names):
        raise _unfit(
            path,
            f"it has the layers {short(sorted(content))}, and the model's with experts are "
            f"{short(sorted(names))}",
        )
    layers = {}
    for number, name in names.items():
        experts, most = model.experts(name), int(model.layers[name]["top_k"])
        layers[name] = _layer(path, number, content[number], experts)
        try:
            check_values(name, layers[name].fields(), most)
        except ValueError as error:
            raise _unfit(path, str(error)) from error
    tokens = max(int(layer.tokens.sum()) for layer in layers.values())
    note = (
        f"the statistics were imported from {path.name}, an {WHAT}: router weights are {GATE}, "
        "whatever the model's router computes"
    )
    provenance = {
        **model.record,
        "gate": GATE,
        "data": [{"group": GROUP, "source": path.name, "tokens": tokens}],
        "notes": [note],
    }
    return SaliencyStats(layers, [GROUP], provenance)


def write(path: Path, source: Source) -> list[str]:
    """Writes statistics as the reference implementation reads them, in its dtypes.

    Args:
        path: of the file.
        source: with statistics of all layers; their groups are added up.

    Returns:
        What to know of it.

    Raises:
        DataError: outputs of experts were not finite; a layer was not observed, or a sum that
            the file holds is not recorded.
    """
    stats = source.all_statistics(WHAT)
    stats.check_finite()
    numbers = sorted(source.model.numbers().items())
    content = {number: _entries(stats.layers[name]) for number, name in numbers}
    with path.open("wb") as file:
        torch.save(content, file)
    return [
        "router weights are the model's own, which the reference implementation takes as a softmax "
        "over all logits: another rule for routers with sigmoid scores or a bias"
    ]


def _loaded(path: Path) -> dict[int, Mapping[str, Any]]:
    """What a file holds: plain values and tensors on the CPU."""
    try:
        with open_file(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise _unfit(path, f"it cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        code = _CODE.search(str(error))
        if code is None:
            raise _unfit(path, "it cannot be unpickled") from error
        raise _unfit(
            path,
            f"reading it would run code ({short(code[1])}), as with the files that the layer-wise "
            "observer leaves of each block",
            "give the file that it writes at the end",
        ) from error
    except Exception as error:  # whatever damaged bytes lead the library to
        raise _unfit(path, f"it is damaged ({type(error).__name__})") from error
    if not isinstance(content, dict) or not content:
        raise _unfit(path, f"it holds {short(type(content).__name__)}, no layers")
    for number, keys in content.items():
        if type(number) is not int or not isinstance(keys, dict):
            raise _unfit(path, f"its entry {short(number)} is no layer")
    return content


def _layer(path: Path, number: int, keys: Mapping[str, Any], experts: int) -> LayerStats:
    """The statistics of one layer; keys that only merging or clustering needs are passed over."""
    for key in _NEEDED:
        if key not in keys:
            raise _unfit(path, f"layer {number} has no {key}")
    known = {field for key, field in FIELDS.items() if key in keys}
    layer = LayerStats(experts, missing=[name for name in OPTIONAL if name not in known])
    for key, field in FIELDS.items():
        if key not in keys:
            continue
        value, shape = keys[key], [] if field == "tokens" else [experts]
        if not _has_numbers(value):
            found = "a sparse, nested or empty one" if isinstance(value, Tensor) else short(value)
            raise _unfit(path, f"layer {number}: {key} is {found}; expected a dense tensor {shape}")
        if (sizes := list(value.shape)) != shape:
            raise _unfit(path, f"layer {number}: {key} is {sizes}; expected a tensor {shape}")
        kinds = (value.is_floating_point(), value.is_complex(), value.dtype == torch.bool)
        if kinds != (field in OPTIONAL, False, False):
            raise _unfit(path, f"layer {number}: {key} has the dtype {value.dtype}")
        target = layer.tokens[0] if field == "tokens" else getattr(layer, field)[0]
        target.copy_(value.detach())
    if "out_max" in known:  # 0 stands for experts without rows there
        layer.out_max[layer.count == 0] = -torch.inf
    return layer


def _has_numbers(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor whose numbers are in the file."""
    return (
        isinstance(value, Tensor)
        and not value.is_nested
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _entries(layer: LayerStats) -> dict[str, Tensor]:
    """What the reference implementation records of a layer, for pruning."""
    total = layer.total().to("cpu")
    count, rows = total.count[0], total.count[0].clamp(min=1).double()
    norms, weighted = total.norm_sum[0], total.weighted_norm_sum[0]
    entries = {
        "total_tokens": total.tokens[0],
        "expert_frequency": count,
        "pairwise_expert_frequency": count[:, None] + count[None, :],
        "ean_sum": norms,
        "ean_mean": (norms / rows).float(),
        "weighted_ean_sum": weighted,
        "weighted_expert_frequency_sum": total.router_weight_sum[0],
        "reap": (weighted / rows).float(),
        "max_activations": total.out_max[0].clamp(min=0),
    }
    return {key: value.clone() for key, value in entries.items()}  # a view is saved whole


def _unfit(path: Path, why: str, remedy: str = "give another file") -> DataError:
    return DataError(f"{path}: is no {WHAT} of this model: {why}; {remedy}")
