"""Criteria and allocations compared by the bundled model's predictions on held-out text.

For each of several seeds, calibration windows are drawn from the calibration split and observed.
Every criterion makes a plan for each ratio, with uniform and global allocation; a budget search on
the same windows uses the scores of `reap`. Plans are evaluated by masking routers, on the same
windows of the held-out split. Rows contain means over seeds and 95 % intervals by Student's t, over
draws of the calibration text and, for `random`, of the experts.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import reap_driver as rd
from bench import rows
from reap_driver.demo.corpus import DOMAINS, Document, load_corpus
from reap_driver.demo.evaluate import token_windows
from reap_driver.demo.run import (
    CALIBRATION_WINDOWS,
    HELD_OUT_WINDOWS,
    MODEL,
    WINDOW,
    observe_windows,
)
from reap_driver.evaluation.predictions import Predictions, predict
from reap_driver.evaluation.router_masks import RouterMasks
from reap_driver.evaluation.sequences import Comparison, Sums
from reap_driver.plan_search.evolution import Settings
from reap_driver.planning.criteria import CRITERIA
from reap_driver.planning.plan import Plan
from reap_driver.planning.student_t import t_quantile

RATIOS = (0.25, 0.5)
# Number of windows per domain for the budget search: the first of those observed.
SEARCH_WINDOWS = 8
BATCH = 16
FIGURES = ("perplexity", "acceptance", "same_top")
Row = dict[str, object]


def drawn_windows(documents: Sequence[Document], tokenizer: Any, seed: int) -> dict[str, Tensor]:
    """Calibration windows [n, WINDOW] of each domain, at random positions."""
    windows = {}
    for domain in DOMAINS:
        texts = [d.text + tokenizer.eos_token for d in documents if d.domain == domain]
        ids = [i for text in tokenizer(texts)["input_ids"] for i in text]
        last = len(ids) - WINDOW
        starts = Random(f"{seed} {domain}").sample(range(last + 1), CALIBRATION_WINDOWS)
        windows[domain] = torch.tensor([ids[start : start + WINDOW] for start in starts])
    return windows


class HeldOut:
    """The full model's predictions on the held-out windows, cached for the comparison of plans."""

    def __init__(self, model: Any, windows: dict[str, Tensor]) -> None:
        self.model, self.masks = model, RouterMasks(model)
        self._known: list[tuple[str, dict[str, Tensor], Predictions]] = []
        for domain, ids in windows.items():
            for part in ids.split(BATCH):
                inputs = {"input_ids": part}
                self._known.append((domain, inputs, predict(model, inputs)))

    def comparison(self, model: Any) -> Comparison:
        """The figures of each window of a model that is pruned, or has been."""
        sums = Sums()
        for domain, inputs, full in self._known:
            sums.add(domain, inputs, full, predict(model, inputs))
        return sums.comparison(draws=2, seed=0)

    def figures(self, plan: Plan) -> dict[str, float]:
        """Perplexity, expected acceptance and share of equal most likely tokens."""
        with self.masks.keeping(plan.kept):
            found = self.comparison(self.model)
        mean = found.sums.sum(dim=0) / found.counts.sum()
        return dict(zip(FIGURES, (math.exp(mean[1]), float(mean[3]), float(mean[4])), strict=True))


def plans(
    stats: rd.SaliencyStats, model: Any, windows: dict[str, Tensor], seed: int, evaluations: int
) -> Iterator[tuple[str, str, float, Plan]]:
    """(criterion, allocation, ratio, plan) of every plan to compare."""
    batches = [{"input_ids": ids[:SEARCH_WINDOWS]} for ids in windows.values()]
    for ratio in RATIOS:
        for criterion in CRITERIA:
            scores = rd.score(stats, criterion)
            for allocation in ("uniform", "global"):
                yield (
                    criterion,
                    allocation,
                    ratio,
                    rd.make_plan(scores, ratio, allocation=allocation),
                )
        yield "random", "uniform", ratio, rd.make_plan(rd.score(stats, f"random:{seed}"), ratio)
        if evaluations:
            settings = Settings(evaluations=evaluations, seed=seed)
            scores = rd.score(stats, "reap")
            plan = rd.search_plan(model, scores, batches, ratio, settings=settings)
            yield "reap", "searched", ratio, plan


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of Student's t."""
    if len(values) < 2:
        return values[0], 0.0
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def measure(seeds: int, evaluations: int) -> list[Row]:
    """Rows of every criterion, allocation and ratio."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    documents = load_corpus(("calibration", "held_out"))
    own = [d for d in documents if d.split == "held_out"]
    model = rd.load_model(MODEL, dtype=torch.float32)
    held = HeldOut(model, token_windows(own, tokenizer, per_domain=HELD_OUT_WINDOWS, length=WINDOW))
    calibration = [d for d in documents if d.split == "calibration"]
    found: dict[tuple[str, str, float], list[dict[str, float]]] = {}
    total = seeds * len(RATIOS) * (2 * len(CRITERIA) + 1 + bool(evaluations))
    with tqdm(total=total, unit="plan") as bar:
        for seed in range(seeds):
            windows = drawn_windows(calibration, tokenizer, seed)
            stats = observe_windows(model, windows)
            for *key, plan in plans(stats, model, windows, seed, evaluations):
                found.setdefault((key[0], key[1], key[2]), []).append(held.figures(plan))
                bar.update()
    return [_row(*key, evaluations, each) for key, each in found.items()]


def _row(
    criterion: str, allocation: str, ratio: float, evaluations: int, each: list[dict[str, float]]
) -> Row:
    row: Row = {"criterion": criterion, "allocation": allocation, "ratio": ratio}
    row |= {"seeds": len(each), "evaluations": evaluations if allocation == "searched" else ""}
    for name in FIGURES:
        middle, half = spread([figures[name] for figures in each])
        row |= {name: f"{middle:.4f}", f"{name}_half": f"{half:.4f}"}
    return row


def main(arguments: list[str]) -> None:
    """Measures, prints, appends rows."""
    parser = argparse.ArgumentParser(prog="python -m bench criteria_cpu", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="calibration draws (default: 5)")
    parser.add_argument(
        "--evaluations", type=int, default=500, help="of each search (default: 500; 0: none)"
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    with torch.no_grad():
        found = measure(options.seeds, options.evaluations)
    seconds = f"{time.perf_counter() - began:.0f}"
    rows.write("criteria_cpu", [{**row, "all_s": seconds} for row in found])
