"""The model card of a pruned checkpoint: what was done, to what, how to load it. Every number is
from the run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from reap_driver.checkpoint.report import ApplyReport
    from reap_driver.plan import Plan

# Fields of the source's card that stay true for the pruned model.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")

_TEMPLATE = """\
# {title}

{source} with {after} of {before} routed experts in each of its {layers} MoE layers, chosen by
`{criterion}` (ratio {ratio:g}, {allocation} allocation) and written by reap-kernels. Nothing was
trained or quantised: every weight that is left has the bytes it had.

| | before | after |
|---|---|---|
| routed experts per layer | {before} | {after} |
| tensor bytes | {bytes_before} | {bytes_after} |
| tensors | {tensors_before} | {tensors_after} |

{details}

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

```sh
vllm serve {name}
```

## Citation

```bibtex
@article{{lasby2025reap,
  title   = {{{{REAP}} the Experts: Why Pruning Prevails for One-Shot {{MoE}} Compression}},
  author  = {{Lasby, Mike and others}},
  journal = {{arXiv preprint arXiv:2510.13999}},
  year    = {{2025}}
}}
```
"""


def model_card(source_card: Path, plan: "Plan", report: "ApplyReport") -> str:
    """README.md of the output.

    Args:
        source_card: README.md of the source, which need not exist; its licence stays.
        plan: what was applied.
        report: of this run, complete but for its duration.
    """
    source = str(plan.model.get("id") or report.source.name)
    if Path(source).is_absolute():  # cards are published; where somebody keeps files is not
        source = Path(source).name
    front = yaml.safe_dump(_front_matter(source_card, source), sort_keys=False, allow_unicode=True)
    body = _TEMPLATE.format(
        title=report.out_path.name,
        name=report.out_path.name,
        source=source,
        criterion=plan.criterion,
        allocation=plan.allocation,
        ratio=plan.ratio,
        layers=report.layers,
        before=report.experts_before,
        after=report.experts_after,
        bytes_before=f"{report.source_tensor_bytes:,}",
        bytes_after=f"{report.tensor_bytes:,}",
        tensors_before=f"{report.source_tensors:,}",
        tensors_after=f"{report.tensors:,}",
        details="\n".join(f"- {line}" for line in _details(plan, report)),
    )
    return f"---\n{front}---\n\n{body}"


def _front_matter(source_card: Path, source: str) -> dict[str, Any]:
    """Metadata of the card."""
    inherited = read_front_matter(source_card)
    front = {name: inherited[name] for name in _INHERITED if name in inherited}
    tags = inherited.get("tags")
    old = [str(tag) for tag in tags] if isinstance(tags, list) else []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        front["base_model"] = source
    front["tags"] = list(dict.fromkeys([*old, "moe", "pruned", "reap"]))
    return front


def read_front_matter(card: Path) -> Mapping[str, Any]:
    """YAML between the first two `---` lines of a card; empty where there is none that can be
    read.
    """
    if not card.is_file():
        return {}
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match.group(1)) if match else {}
    except (
        yaml.YAMLError
    ):  # a broken card says nothing about the weights; its fields are not inherited
        return {}
    return front if isinstance(front, dict) else {}


def _details(plan: "Plan", report: "ApplyReport") -> list[str]:
    """Facts that not every run has."""
    lines = [f"Model digest `{plan.model['config_digest']}`, scores digest `{plan.scores_digest}`."]
    lines += [
        f"Calibration data: {entry.get('source')} (group {entry.get('group')}), "
        f"{entry.get('records')} records, {entry.get('tokens')} tokens, "
        f"digest `{entry.get('digest')}`."
        for entry in plan.data
    ]
    edited = ", ".join(
        f"`{name}` {old!r} -> {new!r}" for name, (old, new) in report.edited_config.items()
    )
    lines.append(f"Edited in config.json: {edited}.")
    if report.mtp_dropped:
        lines.append(
            f"{len(report.mtp_dropped)} tensors of multi-token-prediction layers were left out: "
            "their experts were not observed. Speculative decoding by MTP needs the original."
        )
    if report.tables_rewritten:
        lines.append(
            f"{report.tables_rewritten} tables route tokens to experts by token id; in them every "
            "removed expert was replaced by a kept one."
        )
    lines += [*plan.notes, *report.warnings]
    return lines
