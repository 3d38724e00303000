"""The demo: prunes the bundled model by three criteria and measures what each one costs.

It takes the same steps as for any model: observe calibration text, score, plan, write a pruned
checkpoint, load it again. The text, windows, seeds and ratios are fixed in this file, and
calibration and held-out text come from different modules.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from reap_driver.demo.corpus import load_corpus
from reap_driver.demo.evaluate import Evaluation, evaluate, token_windows
from reap_driver.demo.table import format_report
from reap_driver.load.resident import load_model
from reap_driver.observation.observer import observe
from reap_driver.planning.criteria import Scores
from reap_driver.planning.plan import Plan
from reap_driver.planning.planner import make_plan, random_plan
from reap_driver.planning.scoring import score
from reap_driver.workflow.console import emit
from reap_driver.writer.apply import apply_plan
from reap_kernels.stats import SaliencyStats

MODEL = Path(__file__).parent / "model"
RATIOS = (0.25, 0.5)
FILES = ("stats.safetensors", "scores.png", *(f"plan-{ratio * 100:.0f}.json" for ratio in RATIOS))
CRITERIA = ("reap", "frequency")
_TITLES = {
    "reap": "REAP: mean of router weight x output norm over an expert's tokens",
    "frequency": "frequency: number of tokens routed to an expert",
}
RANDOM_SEEDS = 5
WINDOW = 256  # tokens, as in training
CALIBRATION_WINDOWS = 32  # per domain: 32 x 256 x 4 domains = 32,768 tokens
HELD_OUT_WINDOWS = 16  # per domain: 16,320 predicted tokens
PROMPT = "def read_lines(path):\n"
SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Pruned:
    """One pruned checkpoint and its figures."""

    criterion: str
    ratio: float
    seed: int | None
    experts: int
    bytes: int
    evaluation: Evaluation

    def row(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "criterion": self.criterion,
            "ratio": self.ratio,
            "seed": self.seed,
            "experts": self.experts,
            "bytes": self.bytes,
            **_figures(self.evaluation),
        }


def run_demo(out: Path, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Runs the demo and returns all figures.

    Writes to ``out``: ``reap-25`` and ``reap-50`` (pruned checkpoints), ``plan-*.json``,
    ``stats.safetensors`` and ``scores.png``; the files of an earlier run are replaced. Prints a
    table and generated samples on stdout unless ``quiet``; progress goes to stderr.

    Args:
        out: folder for the results, created if missing.
        seed: first seed of the random plans, and seed of the samples.
        quiet: print nothing.

    Returns:
        The figures as plain values, which JSON can hold.

    Raises:
        DataError: this Python installation has no library sources to calibrate on.
    """
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    with _progress(quiet) as stage:
        stage("reading Python's library")
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        calibration, held_out = read_texts(tokenizer)
        model = load_model(MODEL, dtype=torch.float32)
        stage("observing the calibration text")
        stats = observe_windows(model, calibration)
        stats.save(out / "stats.safetensors")
        stage("evaluating the unpruned model")
        base = evaluate(model, held_out)
        scores = {criterion: score(stats, criterion) for criterion in CRITERIA}
        plans = _plans(scores, seed)
        results = []
        for plan, plan_seed in plans:
            stage(f"pruning {plan.ratio:.0%} by {plan.criterion}")
            results.append(_prune(plan, plan_seed, out, held_out, base))
        stage("drawing and generating")
        _draw(scores, plans, out / "scores.png")
        sources = {"the unpruned model": MODEL, "reap-50": out / "reap-50"}
        samples = {name: generate(folder, seed) for name, folder in sources.items()}
    report = {
        "unpruned": {
            "path": str(MODEL),
            "experts": model.config.num_experts,
            "bytes": weight_bytes(MODEL),
            **_figures(base),
        },
        "calibration_tokens": sum(w.numel() for w in calibration.values()),
        "held_out_tokens": base.tokens,
        "pruned": [r.row() for r in results],
        "samples": samples,
        "picture": str(out / "scores.png"),
        "checkpoints": [str(out / f"reap-{ratio * 100:.0f}") for ratio in RATIOS],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if not quiet:
        emit(format_report(report))
    return report


def observe_windows(model: Any, windows: dict[str, Tensor], batch: int = 16) -> SaliencyStats:
    """Statistics of a model on windows (domain -> ids int64 [n, length]), one group per domain."""
    with observe(model) as observer:
        for domain, ids in windows.items():
            with observer.group(domain):
                for part in ids.split(batch):
                    observer(input_ids=part)
            observer.add_source(
                {
                    "group": domain,
                    "source": f"standard library of Python {platform.python_version()}",
                    "records": len(ids),
                    "tokens": ids.numel(),
                    "digest": "sha256:" + hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
                    "seq_len": ids.shape[1],
                    "seed": 0,
                }
            )
    return observer.stats


def generate(checkpoint: Path, seed: int) -> str:
    """Loads a checkpoint by transformers alone, and samples a continuation of ``PROMPT``."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(seed)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def read_texts(tokenizer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Calibration and held-out windows: domain -> token ids, int64 [n, WINDOW]."""
    documents = load_corpus(("calibration", "held_out"))
    calibration, held_out = (
        token_windows(
            [d for d in documents if d.split == split], tokenizer, per_domain=n, length=WINDOW
        )
        for split, n in (("calibration", CALIBRATION_WINDOWS), ("held_out", HELD_OUT_WINDOWS))
    )
    return calibration, held_out


def _plans(scores: dict[str, Scores], seed: int) -> list[tuple[Plan, int | None]]:
    """All plans to compare, each with its seed if it is random."""
    plans: list[tuple[Plan, int | None]] = []
    for ratio in RATIOS:
        plans += [(make_plan(scores[criterion], ratio), None) for criterion in CRITERIA]
        seeds = range(seed, seed + RANDOM_SEEDS)
        plans += [(random_plan(scores["reap"], ratio, s), s) for s in seeds]
    return plans


def _prune(
    plan: Plan, seed: int | None, out: Path, held_out: dict[str, Tensor], base: Evaluation
) -> Pruned:
    """Writes the plan's checkpoint, loads and evaluates it; only REAP's checkpoints are kept."""
    with tempfile.TemporaryDirectory(dir=out, prefix="compared-") as scratch:
        folder = Path(scratch) / "checkpoint"
        if plan.criterion == "reap":
            folder = out / f"reap-{plan.ratio * 100:.0f}"
            plan.save(folder.with_name(f"plan-{plan.ratio * 100:.0f}.json"))
        apply_plan(MODEL, plan, folder, overwrite=True)
        model = load_model(folder, dtype=torch.float32)
        evaluation = evaluate(model, held_out, reference=base)
        experts = model.config.num_experts
        criterion = plan.criterion.partition(":")[0]  # without the seed of a random plan
        return Pruned(criterion, plan.ratio, seed, experts, weight_bytes(folder), evaluation)


def _draw(scores: dict[str, Scores], plans: list[tuple[Plan, int | None]], path: Path) -> None:
    from reap_driver.demo.picture import draw_scores  # imports matplotlib

    kept = {(plan.criterion, plan.ratio): plan.kept for plan, _ in plans}
    light, heavy = RATIOS
    panels = {_TITLES[c]: (scores[c], kept[c, light], kept[c, heavy]) for c in CRITERIA}
    title = f"Scores of the bundled model's experts; plans that remove {light:.0%} and {heavy:.0%}"
    draw_scores(panels, path, title)


def weight_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files, in bytes."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "perplexity": evaluation.perplexity,
        "agreement": evaluation.agreement,
        "domain_perplexity": {d: math.exp(v) for d, v in evaluation.domain_loss.items()},
    }


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; calling the yielded function starts the next stage."""
    plans = len(RATIOS) * (len(CRITERIA) + RANDOM_SEEDS)
    layout = "{percentage:3.0f}% |{bar:24}| {elapsed} {desc}"
    loading_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # fifteen models are loaded while this bar is shown
    try:
        shown = not quiet and sys.stderr.isatty()
        with tqdm(total=plans + 4, disable=not shown, bar_format=layout) as bar:
            begun = itertools.count()

            def stage(name: str) -> None:
                if not quiet and not shown:  # a log file gets one line per stage instead of a bar
                    print(f"demo: {name}", file=sys.stderr, flush=True)
                bar.update(min(next(begun), 1))  # the previous stage is done
                bar.set_description_str(name)

            yield stage
            bar.update(1)
            bar.set_description_str("done")
    finally:
        if loading_bars:
            transformers_logging.enable_progress_bar()
