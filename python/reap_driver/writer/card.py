"""The model card of a pruned checkpoint: what was done, to what, how to load it. Every number is
from the run; what the run does not know is not said.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers
import yaml  # type: ignore[import-untyped]

import reap_kernels
from reap_driver.base.units import in_bytes, short
from reap_driver.compat.load_pruned import SETTINGS
from reap_driver.plan.criteria import known_criterion
from reap_driver.plan.plan import Plan
from reap_driver.plan.published import calibration_mix, public_name
from reap_driver.writer.markdown import bullets, code, table, text
from reap_driver.writer.report import ApplyReport

_CITATION = """\
```bibtex
@article{lasby2025reap,
  title   = {{REAP} the Experts: Why Pruning Prevails for One-Shot {MoE} Compression},
  author  = {Lasby, Mike and others},
  journal = {arXiv preprint arXiv:2510.13999},
  year    = {2025}
}
```
"""


def model_card(inherited: Mapping[str, Any] | None, plan: "Plan", report: "ApplyReport") -> str:
    """README.md of the output. Names from elsewhere in it can be read, and do nothing.

    Args:
        inherited: fields of the source's card, see `inherited_fields`; its licence stays.
        plan: what was applied.
        report: of this run, complete but for its duration.
    """
    source = public_name(str(plan.model.get("id") or report.source.name))
    front = yaml.safe_dump(_front_matter(inherited, source), sort_keys=False, allow_unicode=True)
    sections = {
        "Specification": _specification(report),
        "Method": _method(plan),
        "Calibration data": _calibration(plan),
        "What changed and what did not": bullets(_changes(report)),
        "Use": _use(report),
        "Limitations": bullets(_limitations(report)),
        "Licence": _licence(source, inherited),
        "Citation": _CITATION,
    }
    body = "\n".join(f"## {title}\n\n{part}" for title, part in sections.items())
    title = f"# {text(report.out_path.name)}\n\n{_statement(source, plan, report)}"
    return f"---\n{front}---\n\n{title}\n{body}"


def _statement(source: str, plan: "Plan", report: "ApplyReport") -> str:
    """What this is, in a few lines."""
    before, after = _experts(report)
    return (
        f"{_name(source)} with {after} of {before} routed experts in each of its {report.layers} "
        f"MoE layers: {_shrink(*report.specification.parameters)} fewer parameters. The experts "
        f"were chosen by {code(plan.criterion)} on calibration data and removed by reap-kernels in "
        "one shot. Nothing was trained, merged or quantised.\n"
    )


def _front_matter(inherited: Mapping[str, Any] | None, source: str) -> dict[str, Any]:
    """Metadata of the card."""
    front = {name: value for name, value in (inherited or {}).items() if name != "tags"}
    tags = (inherited or {}).get("tags")
    old = tags if isinstance(tags, list) else []
    if _is_hub_id(source):
        front["base_model"] = source
    front["tags"] = list(dict.fromkeys([*old, "moe", "pruned", "reap"]))
    return front


def _specification(report: "ApplyReport") -> str:
    """The table of both models."""
    spec = report.specification
    top_k = " or ".join(map(str, spec.top_k))
    stored = ", ".join(spec.stored)
    if spec.quantisation is not None:
        stored += f" ({text(spec.quantisation)})"
    rows = [
        ("parameters", *map(_parameters, spec.parameters)),
        ("parameters used for a token", *map(_parameters, spec.active_parameters)),
        ("routed experts per layer", *_experts(report)),
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
    known = [row for row in rows if row[1] is not None]
    shown = table(("", "original", "pruned"), known)
    if report.mtp_dropped:
        shown += "\nParameters are counted without multi-token-prediction layers.\n"
    return shown


def _method(plan: "Plan") -> str:
    """How experts were chosen."""
    found = known_criterion(plan.criterion)
    weights = "as observed"
    if plan.weights is not None:
        weights = ", ".join(f"{text(group)} {weight:g}" for group, weight in plan.weights.items())
    protected = sum(len(experts) for experts in plan.settings.get("protected", {}).values())
    total = sum(layer.num_experts for layer in plan.layers.values())
    removed = sum(len(layer.removed) for layer in plan.layers.values())
    rows = [
        ("criterion", code(plan.criterion) + (f": {code(found.formula)}" if found else "")),
        ("ratio asked", f"{plan.ratio:g}"),
        ("experts removed", f"{removed:,} of {total:,} ({100 * removed / total:.1f} %)"),
        ("allocation", text(plan.allocation)),
        ("weights of calibration groups", weights),
        *([("protected experts", f"{protected:,}")] if protected else []),
        ("digest of the scores", code(plan.scores_digest)),
        ("digest of the model's config", code(plan.model.get("config_digest"))),
        (
            "written by",
            f"reap-kernels {reap_kernels.__version__}, transformers {transformers.__version__}",
        ),
    ]
    words = (
        "Over the tokens routed to an expert: g is the weight its output is combined with, f the "
        "output, n their number."
        if found
        else "Scores by this criterion were brought from elsewhere; reap-kernels does not know it."
    )
    words = (
        f"\n{words} Each layer lost its lowest-scored experts, as many as the allocation says.\n"
    )
    rows += [("note", text(note)) for note in plan.notes]
    return table(("setting", "value"), rows) + words


def _calibration(plan: "Plan") -> str:
    """The mix the scores are from."""
    mix = calibration_mix(plan.data)
    if not mix:
        return "The plan does not record which data its scores are from.\n"
    rows = [
        (
            text(entry.group),
            text(entry.source),
            _count(entry.records),
            _count(entry.tokens),
            "" if entry.share is None else f"{100 * entry.share:.1f} %",
            _count(entry.seq_len),
            text(entry.packing or ""),
            code(entry.digest or ""),
        )
        for entry in mix
    ]
    columns = ["group", "source", "records", "tokens", "share of tokens", "sequence length"]
    columns += ["packing", "digest of the tokens"]
    used = [n for n in range(len(columns)) if any(row[n] for row in rows)]
    shown = table([columns[n] for n in used], [[row[n] for n in used] for row in rows])
    total = sum(entry.tokens or 0 for entry in mix)
    return f"{shown}\n{total:,} tokens in all.\n"


def _changes(report: "ApplyReport") -> list[str]:
    """What the run did, and what it left alone."""
    edited = ", ".join(
        f"{code(name)} {code(repr(old))} -> {code(repr(new))}"
        for name, (old, new) in report.edited_config.items()
        if name.partition(".")[0] != SETTINGS
    )
    if not report.uniform:
        edited += f", and the number of experts of every layer under {code(SETTINGS)}"
    lines = [
        "Removed: the weights of the experts that go, and their rows of the router (weight, bias, "
        "correction bias); the experts that stay are numbered anew in their old order.",
        f"Edited in config.json: {edited}.",
        "Unchanged: every tensor, and every row of the router, that stays has the bytes and the "
        "format it had. So have tokenizer, chat template and generation settings.",
    ]
    if report.whole:
        lines.append(
            f"Left whole: {len(report.whole)} MoE layers ({_listed(report.whole)}), whose experts "
            "another field of config.json counts."
        )
    if report.mtp_dropped:
        lines.append(
            f"Left out: {len(report.mtp_dropped)} tensors of multi-token-prediction layers, whose "
            "experts were not observed. Speculative decoding by MTP needs the original."
        )
    if report.tables_rewritten:
        lines.append(
            f"Rewritten: {report.tables_rewritten} tables that route tokens to experts by token "
            "id; in them every removed expert was replaced by a kept one."
        )
    if report.left_out:
        lines.append(
            f"Not copied, other formats of the weights and hidden files: {_names(report.left_out)}."
        )
    return lines


def _use(report: "ApplyReport") -> str:
    """How to load it."""
    name, spec = json.dumps(report.out_path.name, ensure_ascii=False), report.specification
    options = 'dtype="auto", device_map="auto"'
    options += ", trust_remote_code=True" if spec.remote_code else ""
    if not report.uniform:
        return (
            "Layers keep different numbers of experts, and transformers' own `from_pretrained`, "
            "vLLM and SGLang read one number for all of them: they refuse this checkpoint. The "
            "loader that comes with it needs transformers alone:\n\n"
            "```python\nimport sys\n\n"
            f"sys.path.insert(0, {name})  # load_pruned.py lies beside the weights\n"
            "from load_pruned import from_pretrained\nfrom transformers import AutoTokenizer\n\n"
            f"model = from_pretrained({name}, {options})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n```\n"
        )
    vision = spec.architecture.endswith("ForConditionalGeneration")
    auto = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    reader, word = ("AutoProcessor", "processor") if vision else ("AutoTokenizer", "tokenizer")
    trust = " --trust-remote-code" if spec.remote_code else ""
    return (
        f"```python\nfrom transformers import {', '.join(sorted((auto, reader)))}\n\n"
        f"model = {auto}.from_pretrained({name}, {options})\n"
        f"{word} = {reader}.from_pretrained({name})\n```\n\n"
        f"```sh\nvllm serve {shlex.quote(report.out_path.name)}{trust}\n```\n"
    )


def _limitations(report: "ApplyReport") -> list[str]:
    return [
        "No benchmark is part of this run. Measure the model on your own tasks, beside the "
        "original (`reap-kernels compare`), before you rely on it.",
        "Experts were ranked on the calibration data above. What those data lack (other languages, "
        "domains, styles) can have lost more than what they have.",
        "Limits and biases of the original remain.",
        *(report.warnings if report.uniform else []),  # of others, "Use" says it all
    ]


def _licence(source: str, inherited: Mapping[str, Any] | None) -> str:
    """Whose terms apply."""
    if inherited is None:
        return f"That of {_name(source)} applies; the front matter of its card cannot be read.\n"
    named = inherited.get("license_name") or inherited.get("license")
    terms = f": {text(named)}" if isinstance(named, str) else "; its card names none"
    return f"That of {_name(source)} applies{terms}.\n"


def _experts(report: "ApplyReport") -> tuple[str, str]:
    """Routed experts of a layer that is not left whole, before and after; ranges where layers
    differ.
    """
    before, after = zip(*report.pruned.values(), strict=True)
    return _range(before), _range(after)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return str(low)
    return f"{low} to {high} ({sum(numbers) / len(numbers):.1f} on average)"


def _shrink(before: int, after: int) -> str:
    return f"{100 * (1 - after / before):.1f} %"


def _parameters(number: int) -> str:
    return f"{number:,} ({short(number, 'kMBT')})"


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(code, names))


def _listed(names: Sequence[str]) -> str:
    """The first few names."""
    return _names(names[:2]) + (", ..." if len(names) > 2 else "")


def _name(source: str) -> str:
    hub = f"[{source}](https://huggingface.co/{source})"
    return hub if _is_hub_id(source) else code(source)


def _is_hub_id(source: str) -> bool:
    return (
        re.fullmatch(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", source, re.ASCII | re.IGNORECASE)
        is not None
    )
