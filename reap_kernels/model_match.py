"""Whether what was made from one model holds for another: what decides, and what is only said.

Models are compared by their records, as the provenance of statistics and plans holds them:
`{"model": {"model_type", "config_digest", "config", ...}, "layers": {name: facts}}`, where `config`
are the fields of the model's configuration that its digest is made of. Experts can be told apart
and chosen alike in two models whose MoE layers have as many experts of the same sizes, routed to in
the same way; whether they are equally worthy no configuration says. So that decides, and what else
differs (token ids, context length, positions) is named.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reap_kernels.errors import DataError
from reap_kernels.schema import short

# Facts of a layer that decide.
DECIDING = ("num_experts", "top_k", "n_group", "topk_group", "hidden_size", "intermediate_size")
_NAMED = 8  # fields that a message names
_ABSENT = "(its default)"


@dataclass(frozen=True)
class Differences:
    """How two models differ, in words, `there` being the first and `here` the second.

    Attributes:
        deciding: what makes one no match for the other, such as "top_k is 8 there and 4 here".
        other: fields of the configuration that differ otherwise.
        unnamed: both digests, where they differ and a record that holds no fields cannot say in
            what; else empty.
    """

    deciding: tuple[str, ...]
    other: tuple[str, ...]
    unnamed: str

    @property
    def text(self) -> str:
        """All of it in one line, a few fields by name; empty where nothing differs."""
        found = [*self.deciding, *self.other, *([self.unnamed] if self.unnamed else [])]
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return ", ".join(found[:_NAMED]) + more


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Differences:
    """Compares two models by their records.

    Args:
        there: provenance of one: `model`, and facts of its MoE layers in `layers`. Facts and layers
            that one of the records lacks are not compared.
        here: likewise of the other.

    Example:
        >>> there = {"model": {"config": {"eos_token_id": 2}, "config_digest": "a"}}
        >>> here = {"model": {"config": {"eos_token_id": 3}, "config_digest": "b"}}
        >>> differences(there, here).text
        'eos_token_id is 2 there and 3 here'
    """
    models = [dict(record.get("model") or {}) for record in (there, here)]
    deciding = []
    kinds = [model.get("model_type") for model in models]
    if None not in kinds and kinds[0] != kinds[1]:
        deciding.append(_said("model_type", *kinds))
    deciding += _layer_differences(there.get("layers") or {}, here.get("layers") or {})
    if models[0].get("config_digest") == models[1].get("config_digest"):
        return Differences(tuple(deciding), (), "")
    configs = [model.get("config") for model in models]
    if not all(isinstance(config, Mapping) for config in configs):
        digests = (str(model.get("config_digest")) for model in models)
        unnamed = "config digest is {} there and {} here, of which fields is not recorded"
        return Differences(tuple(deciding), (), unnamed.format(*digests))
    first, second = (_flat(config) for config in configs if config is not None)
    names = (name for name in {**first, **second} if name.rpartition(".")[2] != "model_type")
    other = [
        _said(name, first.get(name, _ABSENT), second.get(name, _ABSENT))
        for name in sorted(names)
        if first.get(name, _ABSENT) != second.get(name, _ABSENT)
    ]
    return Differences(tuple(deciding), tuple(other), "")


def merged_provenance(
    here: Mapping[str, Any], there: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """The provenance of two observations as one; what else differs in the models is noted.

    Args:
        here, there: the provenance of each.
        what: begins the message, such as "cannot merge statistics".

    Raises:
        DataError: the models do not match, or the gate rules differ; names what does.

    Example:
        >>> model = {"model_type": "qwen3_moe", "config_digest": "a"}
        >>> first, second = ({"model": model, "data": [{"tokens": n}]} for n in (64, 32))
        >>> merged_provenance(first, second, "cannot merge")["data"]
        [{'tokens': 64}, {'tokens': 32}]
    """
    found = differences(there, here)
    if found.deciding or found.unnamed:
        raise DataError(f"{what}: {found.text}; merge observations of one model only")
    if here.get("gate") != there.get("gate"):
        raise DataError(
            f"{what}: gate is {here.get('gate')!r} here and {there.get('gate')!r} there; merge "
            "observations of one model only"
        )
    data = [*here.get("data", []), *there.get("data", [])]
    # No command made the two together.
    known = {name: value for name, value in here.items() if name not in ("run", "observed")}
    # What changed rounding in a part is said of the whole.
    known = {**{name: there[name] for name in ("attention", "fused") if name in there}, **known}
    notes = [*here.get("notes", []), *there.get("notes", [])]
    if found.other:
        ids = [(record.get("model") or {}).get("id") for record in (there, here)]
        notes.append(
            f"statistics of {ids[0]!r} (there) were merged into those of {ids[1]!r} (here): "
            f"{found.text}"
        )
    noted = {"notes": list(dict.fromkeys(notes))} if notes else {}
    return {**known, "data": data, **noted}


def _layer_differences(
    there: Mapping[str, Mapping[str, Any]], here: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Deciding facts of layers of both that differ, each with the first layer it differs in."""
    found = []
    shared = [name for name in there if name in here]
    for fact in DECIDING:
        pairs = ((name, there[name].get(fact), here[name].get(fact)) for name in shared)
        differ = [pair for pair in pairs if None not in pair and pair[1] != pair[2]]
        for name, mine, theirs in itertools.islice(differ, 1):
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            found.append(f"{_said(fact, mine, theirs)} ({name}{more})")
    return found


def _said(name: str, there: Any, here: Any) -> str:
    """A field with both values."""
    mine, theirs = (value if value == _ABSENT else short(value) for value in (there, here))
    return f"{name} is {mine} there and {theirs} here"


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value of every field."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
