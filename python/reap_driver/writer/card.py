"""The model card of a pruned checkpoint: what was done, to what, how to load it. Every number is
from the run; what the run does not know is not said.

The card's words are in templates/card.md.jinja, and what fills it is collected here.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCardData

import reap_kernels
from reap_driver.base.units import in_bytes, short, took
from reap_driver.base.yaml_text import MAX_BYTES, parse_yaml
from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.files.checkpoint import Checkpoint, belongs
from reap_driver.planning.criteria import known_criterion
from reap_driver.planning.plan import Plan
from reap_driver.planning.public_provenance import (
    MixEntry,
    calibration_mix,
    observation,
    public_name,
    recipes_of,
    shape_settings,
)
from reap_driver.writer.licenses import license_words
from reap_driver.writer.markdown import Markdown, code, template, text
from reap_driver.writer.report import ApplyReport
from reap_kernels.files import is_file

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
_CALIBRATION = (
    *("group", "source", "records", "tokens", "share of tokens", "sequence length"),
    "packing",
)


def model_card(inherited: Mapping[str, Any] | None, plan: "Plan", report: "ApplyReport") -> str:
    """README.md of the output. Names from elsewhere in it can be read, and have no effect.

    Args:
        inherited: fields of the source's card, see `inherited_fields`; its license stays.
        plan: what was applied.
        report: of this run, complete but for its duration.
    """
    source = public_name(str(plan.model.get("id") or report.source.name))
    known = inherited or {}
    mix = calibration_mix(plan.data)
    body = template("reap_driver.writer", "card.md.jinja").render(
        plan=plan,
        report=report,
        source=_link(source),
        experts=_experts(report),
        neurons=_neurons(report),
        fewer=_decrease(*report.specification.parameters),
        specification=_specification(report),
        method=_method(plan, report),
        digests=_digests(plan),
        known_criterion=known_criterion(plan.criterion) is not None,
        calibration=_calibration(plan),
        tokens=_count(sum(entry.tokens or 0 for entry in mix)),
        counted=_counted(mix),
        edits=_edits(report),
        loader_settings=SETTINGS,
        load=_load(report),
        # Where layers differ, the section on use has the warning.
        warnings=report.warnings if report.uniform else [],
        inherited=inherited,
        license=license_words(known, report.licenses),
    )
    return f"---\n{_front_matter(known, source).to_yaml()}\n---\n\n{body}"


def inherited_fields(source: Checkpoint) -> tuple[dict[str, Any] | None, str | None]:
    """What stays true of the metadata of a source's card: fields of the YAML between the first two
    `---` lines of README.md that are texts or lists of texts.

    Returns:
        The fields and None; or, where they cannot be read, None and why. A broken card says nothing
        about the weights.

    Example:
        `license: mit` and `tags: [chat]` give `{"license": "mit", "tags": ["chat"]}`.
    """
    card = source.folder / "README.md"
    if not is_file(card):
        return {}, None
    try:
        fields = _read_front_matter(source, card)
    except ValueError as error:
        return None, (
            f"{card}: {error}; so the new card repeats no license and no tags: add them by hand"
        )
    kept = {name: fields[name] for name in (*_INHERITED, "tags") if _is_text(fields.get(name))}
    return kept, None


def _read_front_matter(source: Checkpoint, card: Path) -> dict[str, Any]:
    """All fields. `huggingface_hub.ModelCard` reads them without limits; a card may come from
    anywhere.

    Raises:
        ValueError: they cannot be read.
    """
    if not belongs(source.folder, card):
        raise ValueError(f"is a symbolic link to {card.readlink()}, no file of this checkpoint")
    try:
        with card.open("rb") as file:
            content = file.read(MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", content, re.DOTALL)
    fields = parse_yaml(found[1]) if found else {}
    if not isinstance(fields, dict | None):
        raise ValueError(f"its front matter is a {type(fields).__name__}, not fields with values")
    return fields or {}


def _is_text(value: Any) -> bool:
    """A text, or a list of texts."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def _front_matter(inherited: Mapping[str, Any], source: str) -> ModelCardData:
    """Metadata of the card."""
    tags = inherited.get("tags")
    old = tags if isinstance(tags, list) else []
    known = {name: value for name, value in inherited.items() if name != "tags"}
    base = source if _is_hub_id(source) else None
    return ModelCardData(**known, base_model=base, tags=[*old, "moe", "pruned", "reap"])


def _specification(report: "ApplyReport") -> list[tuple[object, ...]]:
    """The table of both models."""
    spec = report.specification
    top_k = " or ".join(map(str, spec.top_k))
    stored = ", ".join(spec.stored)
    if spec.quantization is not None:
        stored = Markdown(f"{stored} ({text(spec.quantization)})")
    rows = [
        ("parameters", *map(_parameters, spec.parameters)),
        ("parameters used for a token", *map(_parameters, spec.active_parameters)),
        ("routed experts per layer", *_experts(report)),
        *([("neurons of a routed expert", *_neurons(report))] if report.neurons_per_layer else []),
        ("experts a token is routed to", top_k, top_k),
        ("MoE layers", report.layers, report.layers),
        ("decoder layers", spec.layers, spec.layers),
        ("attention heads", spec.heads, spec.heads),
        ("key-value heads", spec.key_value_heads, spec.key_value_heads),
        ("context length", spec.context, spec.context),
        ("tensor bytes", f"{report.source_tensor_bytes:,}", f"{report.tensor_bytes:,}"),
        ("size", in_bytes(report.source_tensor_bytes), in_bytes(report.tensor_bytes)),
        ("tensors", f"{report.source_tensors:,}", f"{report.tensors:,}"),
        ("stored as", stored, stored),
    ]
    return [("", "original", "pruned"), *(row for row in rows if row[1] is not None)]


def _method(plan: "Plan", report: "ApplyReport") -> list[tuple[object, ...]]:
    """The table of how experts were chosen."""
    found = known_criterion(plan.criterion)
    formula = f": {code(found.formula)}" if found else ""
    weights = Markdown("as observed")
    if plan.weights is not None:
        shares = (f"{text(group)} {weight:g}" for group, weight in plan.weights.items())
        weights = Markdown(", ".join(shares))
    protected = sum(len(experts) for experts in plan.settings.get("protected", {}).values())
    total = sum(layer.num_experts for layer in plan.layers.values())
    removed = sum(len(layer.removed) for layer in plan.layers.values())
    wrote = took(report.seconds)
    versions = (
        f"reap-kernels {reap_kernels.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}"
    )
    return [
        ("setting", "value"),
        ("criterion", Markdown(code(plan.criterion) + formula)),
        *([("asked for", plan.asked)] if plan.asked else []),
        ("ratio", f"{plan.ratio:g}"),
        *shape_settings(plan.settings),
        ("experts removed", f"{removed:,} of {total:,} ({100 * removed / total:.1f} %)"),
        ("allocation", plan.allocation),
        ("weights of calibration groups", weights),
        *([("protected experts", f"{protected:,}")] if protected else []),
        *(("calibration recipe", name) for name in recipes_of(plan.data)),
        *observation(plan.observed).items(),
        ("written in", wrote),
        ("written by", Markdown(versions)),
        *(("note", note) for note in plan.notes),
    ]


def _digests(plan: "Plan") -> list[tuple[str, Markdown]]:
    """Names and digests, which are too long for the tables."""
    mix = calibration_mix(plan.data)
    found = [
        ("scores", plan.scores_digest),
        ("new down projections", plan.matrices.get("digest")),
        ("the model's config", plan.model.get("config_digest")),
        *((f"recipe {text(name)}", digest) for name, digest in recipes_of(plan.data).items()),
        *((f"tokens of {text(one.group)}", one.digest) for one in mix),
        *((f"chat template given for {text(one.group)}", one.chat_template) for one in mix),
    ]
    return [(Markdown(name), code(digest)) for name, digest in found if digest]


def _calibration(plan: "Plan") -> list[list[object]]:
    """The table of the mix the scores are from, without columns of which nothing is known; empty
    where the plan does not record it.
    """
    rows = [
        (
            text(entry.group),
            text(entry.source),
            _count(entry.records),
            _count(entry.tokens),
            "" if entry.share is None else f"{100 * entry.share:.1f} %",
            _count(entry.seq_len),
            text(entry.packing or ""),
        )
        for entry in calibration_mix(plan.data)
    ]
    used = [n for n in range(len(_CALIBRATION)) if any(row[n] for row in rows)]
    return [[row[n] for n in used] for row in (_CALIBRATION, *rows)] if rows else []


def _edits(report: "ApplyReport") -> list[Markdown]:
    """Fields of config.json that have other values, without those of the loader that is beside the
    weights.
    """
    return [
        Markdown(f"{code(name)} {code(repr(old))} -> {code(repr(new))}")
        for name, (old, new) in report.edited_config.items()
        if name.partition(".")[0] != SETTINGS
    ]


def _load(report: "ApplyReport") -> dict[str, Markdown]:
    """Parts of the code that loads the checkpoint; they stand in blocks of code as they are."""
    spec, name = report.specification, report.out_path.name
    vision = spec.architecture.endswith("ForConditionalGeneration")
    remote = ", trust_remote_code=True" if spec.remote_code else ""
    trust = " --trust-remote-code" if spec.remote_code else ""
    parts = {
        "model": "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM",
        "reader": "AutoProcessor" if vision else "AutoTokenizer",
        "variable": "processor" if vision else "tokenizer",
        "folder": json.dumps(name, ensure_ascii=False),
        "options": f'dtype="auto", device_map="auto"{remote}',
        "serve": f"vllm serve {shlex.quote(name)}{trust}",
    }
    return {part: Markdown(words) for part, words in parts.items()}


def _experts(report: "ApplyReport") -> tuple[str, str]:
    """Routed experts of a layer that is not left whole, before and after; ranges where layers
    differ.
    """
    before, after = zip(*report.pruned.values(), strict=True)
    return _range(before), _range(after)


def _neurons(report: "ApplyReport") -> tuple[str, str]:
    """Neurons of a routed expert before and after; empty where experts keep them all."""
    if not report.neurons_per_layer:
        return "", ""
    before, after = zip(*report.neurons_per_layer.values(), strict=True)
    return _range(before), _range(after)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return str(low)
    return f"{low} to {high} ({sum(numbers) / len(numbers):.1f} on average)"


def _decrease(before: int, after: int) -> str:
    return f"{100 * (1 - after / before):.1f} %"


def _parameters(number: int) -> str:
    return f"{number:,} ({short(number, 'kMBT')})"


def _counted(mix: Sequence[MixEntry]) -> str:
    """How many tokens of the mix count in the statistics; empty if that is all or unknown."""
    if any(entry.counted is None for entry in mix) or all(e.counted == e.tokens for e in mix):
        return ""
    return _count(sum(entry.counted or 0 for entry in mix))


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _link(source: str) -> Markdown:
    """The model, with a link where it is on the hub."""
    hub = Markdown(f"[{source}](https://huggingface.co/{source})")
    return hub if _is_hub_id(source) else code(source)


def _is_hub_id(source: str) -> bool:
    return (
        re.fullmatch(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", source, re.ASCII | re.IGNORECASE)
        is not None
    )
