"""What a re-fit came to: as a result, as the record in the checkpoint, and as rows of its card."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import reap_kernels
from reap_driver.base.units import row, significant, took
from reap_driver.evaluation.figures import Estimate, Figures
from reap_driver.evaluation.sequences import Comparison
from reap_driver.planning.public_provenance import public_name
from reap_driver.refitting.engine import LayerFacts
from reap_driver.workflow.comparison_results import (
    Compared,
    Comparisons,
    figures_table,
    groups_and_all,
)
from reap_driver.workflow.results import Result
from reap_driver.writer.replace import ReplaceReport

Written = Literal["refit", "cut"]
CUT, REFIT = "the cut", "re-fitted"  # names in tables
_HEADINGS = ("held-out text", "model", "perplexity", "KL divergence", "expected acceptance")
_DIGITS = 4


@dataclass(frozen=True)
class RefitEvaluation:
    """How the pruned model follows its original before and after the re-fit, on the same text.

    Attributes:
        original, pruned: what was compared, as given.
        cut, refit: before and after.
        data: provenance of each source of the text.
        unseen: groups that neither was calibrated on, as far as that is known.

    Example:
        >>> rd.refit("CUT", "MODEL", "code.jsonl:40", out="again", seq_len=64).evaluation.better
        'refit'
    """

    original: str
    pruned: str
    cut: Comparison
    refit: Comparison
    data: list[dict[str, Any]]
    unseen: tuple[str, ...]

    @property
    def better(self) -> Written:
        """Which one has the higher expected acceptance, over all groups."""
        cut, refit = (one.overall.acceptance.value for one in (self.cut, self.refit))
        return "refit" if refit > cut else "cut"

    @property
    def gain(self) -> Estimate:
        """The expected acceptance after the re-fit minus that before, with its interval."""
        return self.refit.less(self.cut).acceptance

    @property
    def named(self) -> dict[str, Comparison]:
        """Both, by their names in tables."""
        return {CUT: self.cut, REFIT: self.refit}

    def comparisons(self) -> Comparisons:
        """Both, as `compare` has them."""
        each = (
            Compared((), self.original, name, one, self.data, {}, None, self.unseen)
            for name, one in self.named.items()
        )
        return Comparisons((), tuple(each))

    def describe(self) -> str:
        """The figures as a table."""
        return figures_table(self.named, self.unseen)

    def rows(self) -> list[tuple[str, ...]]:
        """The figures as rows of the model card, the heading first."""
        found: list[tuple[str, ...]] = [
            ("held-out text", "model", "perplexity", "KL divergence", "expected acceptance")
        ]
        each = {name: groups_and_all(one) for name, one in self.named.items()}
        for title, cut in each[CUT].items():
            text = f"{title} (not calibrated on)" if title in self.unseen else title
            before = _shown(cut.original_perplexity)
            found.append((text, "the original", before, "0", "1"))
            found += [(text, name, *_cells(own[title])) for name, own in each.items()]
        return found


def _cells(figures: Figures) -> tuple[str, str, str]:
    estimates = (figures.pruned_perplexity, figures.kl, figures.acceptance)
    first, kl, acceptance = map(_shown, estimates)
    return first, kl, acceptance


def _shown(estimate: Estimate) -> str:
    """A figure with its interval, where there is one."""
    text = significant(estimate.value, _DIGITS)
    if estimate.low is None or estimate.high is None:
        return text
    low, high = (significant(value, _DIGITS) for value in (estimate.low, estimate.high))
    return f"{text} [{low}, {high}]"


@dataclass(frozen=True, repr=False)
class Refitted(Result):
    """A pruned model that was re-fitted.

    Attributes:
        out: the folder of the new checkpoint.
        written: "refit", or "cut" where the pruned model was copied, as it was better.
        layers: {experts module: how its re-fit went}.
        evaluation: before and after.
        tokens: that were fitted, and that chose ridges.
        seconds: the re-fit took, interrupted runs included, without the evaluation.
        report: of the writer.

    Example:
        >>> done = rd.refit("CUT", "MODEL", "code.jsonl:40", out="solved", seq_len=64)
        >>> done.written, len(done.layers)
        ('refit', 4)
    """

    out: Path
    written: Written
    layers: dict[str, LayerFacts]
    evaluation: RefitEvaluation
    tokens: int
    seconds: float
    report: ReplaceReport

    def facts(self) -> dict[str, Any]:
        """See `Result`; with the evaluation, what `report --compare` reads."""
        return {
            **self.evaluation.comparisons().facts(),
            "out": str(self.out),
            "refit": outcome(self.written, self.layers, self.evaluation, self.seconds),
            "bytes_written": self.report.bytes_written,
            "write_seconds": round(self.report.seconds, 3),
        }

    def describe(self) -> str:
        """See `Result`."""
        solved = solved_line(self.layers, self.tokens, self.seconds)
        return "\n".join([solved, self.evaluation.describe(), self.decision()])

    def decision(self) -> str:
        """What was written, and by which figure."""
        return decision_lines(self.out, self.written, self.evaluation)


def solved_line(layers: Mapping[str, LayerFacts], tokens: int, seconds: float) -> str:
    """How the layers went, for people."""
    kept = [layer for layer in layers.values() if layer.kept]
    text = f"re-fitted {len(kept)} of {len(layers)} layers on {tokens:,} tokens, {took(seconds)}"
    if not kept:
        return f"{text}\n  no layer came closer to the original on held-out sequences"
    least, most = (f"{100 * get(layer.gain for layer in kept):.0f}" for get in (min, max))
    share = least if least == most else f"{least} to {most}"
    return f"{text}\n  their error on held-out sequences fell by {share} %"


def decision_lines(out: Path, written: Written, evaluation: RefitEvaluation) -> str:
    """What was written, and by which figure, for people."""
    cut, refit = (one.overall.acceptance.value for one in (evaluation.cut, evaluation.refit))
    figures = f"expected acceptance {significant(refit, 4)}, the cut has {significant(cut, 4)}"
    if written == "refit" and evaluation.better == "cut":
        what = f"the re-fit, as asked for, though it is no better: {figures}"
    elif written == "refit":
        what = f"the re-fit, which is better: {figures}"
    else:
        what = f"the cut as it was, since the re-fit is no better: {figures}"
    lines = [f"wrote {out}", row("  holds", what, 10)]
    gain = evaluation.gain
    if gain.low is None or gain.high is None:
        lines.append(row("", "the text has too few sequences for an interval of that", 10))
    elif gain.low <= 0 <= gain.high:
        low, high = significant(gain.low, 2), significant(gain.high, 2)
        lines.append(row("", f"the difference is uncertain: 95 % interval [{low}, {high}]", 10))
    return "\n".join(lines)


def outcome(
    written: Written, layers: Mapping[str, LayerFacts], evaluation: RefitEvaluation, seconds: float
) -> dict[str, Any]:
    """What a re-fit came to, as JSON values."""
    gain = evaluation.gain
    return {
        "written": written,
        "better": evaluation.better,
        "decided_by": "expected acceptance on the evaluation text, over all groups",
        "acceptance_gain": {"value": gain.value, "low": gain.low, "high": gain.high},
        "layers": {name: layer_facts(layer) for name, layer in layers.items()},
        "seconds": round(seconds, 3),
    }


def layer_facts(layer: LayerFacts) -> dict[str, Any]:
    """How the re-fit of a layer went, as JSON values."""
    return {**vars(layer), "experts": list(layer.experts)}


def record(
    found: dict[str, Any], asked: Mapping[str, Any], data: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of `reap/refit.json`: `Refitted.facts` without what is true of this run alone."""
    kept = {key: found[key] for key in ("format", "version", "original", "comparisons")}
    more = {"run": dict(asked), "data": data, "reap_kernels": reap_kernels.__version__}
    return {**kept, "differences": found["differences"], "refit": {**found["refit"], **more}}


def card_rows(
    layers: Mapping[str, LayerFacts], evaluation: RefitEvaluation, steps: int, tokens: int
) -> list[tuple[str, str]]:
    """Rows (what, value) of the model card."""
    ridges = sorted({f"{layer.ridge:.3g}" for layer in layers.values() if layer.ridge}, key=float)
    chosen = ridges[0] if len(ridges) == 1 else f"{ridges[0]} to {ridges[-1]}" if ridges else ""
    cut, refit = (one.overall.acceptance.value for one in (evaluation.cut, evaluation.refit))
    ridge = "ridge, relative to the mean of the Gram matrices' diagonals"
    return [
        ("original", public_name(evaluation.original)),
        ("pruned model", public_name(evaluation.pruned)),
        ("tokens fitted and used to choose ridges", f"{tokens:,}"),
        ("steps of conjugate gradients in each layer", str(steps)),
        *([(ridge, chosen)] if chosen else []),
        ("expected acceptance before, after", f"{cut:.4f}, {refit:.4f}"),
        ("written by", f"reap-kernels {reap_kernels.__version__}"),
    ]
