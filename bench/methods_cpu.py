"""Methods of pruning compared by the bundled model's predictions on held-out text.

For each of several seeds, calibration windows are drawn as in `bench.criteria_cpu` and observed
with Gram matrices. Every method cuts the model by 25 % and by 50 % of its expert weights. What it
gives is written as a checkpoint, loaded and compared with the original on the same held-out
windows; constants for removed experts, which no checkpoint can hold, and merged experts, whose
checkpoint is no smaller, are put into the model in memory. With `--shift`, the model is calibrated
on two of the four domains, each pair once, and compared on these and on the others. Rows contain
means over draws and 95 % intervals by Student's t.
"""

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

import reap_driver as rd
from bench import rows
from bench.criteria_cpu import RATIOS, HeldOut, Row, drawn_windows, spread
from bench.cuts import METHODS, Cut, Draw, constants_in
from reap_driver.demo.corpus import DOMAINS, load_corpus
from reap_driver.demo.evaluate import token_windows
from reap_driver.demo.run import HELD_OUT_WINDOWS, MODEL, WINDOW, weight_bytes
from reap_driver.evaluation.sequences import Comparison

FIGURES = ("acceptance", "kl", "perplexity")
# Methods that are compared on domains that they have not seen.
SHIFTED = ("reap", "reap_refit", "obs", "obs_refit")
Key = tuple[str, float, str]


class Bench:
    """The bundled model, its held-out text, and the figures found so far.

    Args:
        draws: calibration draws.
        names: of the methods.
        shift: whether to calibrate on two domains of four.
    """

    def __init__(self, draws: int, names: Sequence[str], shift: bool) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self._documents = load_corpus(("calibration", "held_out"))
        self._model = rd.load_model(MODEL, dtype=torch.float32)
        own = [d for d in self._documents if d.split == "held_out"]
        windows = token_windows(own, self._tokenizer, per_domain=HELD_OUT_WINDOWS, length=WINDOW)
        self._held = HeldOut(self._model, windows)
        self._names, self._shift = names, shift
        pairs = list(itertools.combinations(DOMAINS, 2))
        seen = pairs if shift else [DOMAINS] * draws
        self._draws = list(enumerate(seen))
        self.figures: dict[Key, list[dict[str, float]]] = {}
        self.facts: dict[tuple[str, float], Row] = {}

    def run(self) -> list[Row]:
        """Rows of all methods, ratios and texts."""
        ratios = RATIOS[1:] if self._shift else RATIOS
        with tqdm(total=len(self._draws) * len(ratios) * len(self._names), unit="cut") as bar:
            for seed, domains in self._draws:
                draw = self._drawn(seed, domains)
                for ratio, name in itertools.product(ratios, self._names):
                    bar.set_description_str(f"{seed} {name} {ratio:.0%}")
                    self._measure(draw, name, ratio, domains)
                    bar.update()
        return [self._row(*key, each) for key, each in self.figures.items()]

    def _drawn(self, seed: int, domains: Sequence[str]) -> Draw:
        documents = [d for d in self._documents if d.split == "calibration"]
        windows = drawn_windows(documents, self._tokenizer, seed)
        return Draw.of(self._model, {d: windows[d] for d in domains}, seed)

    def _measure(self, draw: Draw, name: str, ratio: float, domains: Sequence[str]) -> None:
        began = time.process_time()
        cut = METHODS[name](draw, ratio)
        seconds = time.process_time() - began
        with tempfile.TemporaryDirectory(prefix="reap-methods-") as root:
            comparison, facts, more = self._compared(draw, cut, Path(root) / "cut")
        facts = {"shape": cut.shape, **facts}
        self.facts.setdefault((name, ratio), facts)
        for text, groups in self._texts(domains).items():
            found = {**figures(comparison, groups), "cpu_s": seconds + more}
            self.figures.setdefault((name, ratio, text), []).append(found)

    def _compared(self, draw: Draw, cut: Cut, folder: Path) -> tuple[Comparison, Row, float]:
        """The comparison with the original, facts, and process seconds of a re-fit."""
        if cut.constants:
            with constants_in(self._model, cut):
                facts = {"checkpoint": "no", "mb": ""}
                return self._held.comparison(self._model), facts, 0.0
        if cut.merged is not None:
            vectors, began = draw.vectors, time.process_time()
            with rd.merged_experts(self._model, vectors, *cut.merged):
                seconds = time.process_time() - began
                facts = {"checkpoint": "as large as before", "mb": ""}
                return self._held.comparison(self._model), facts, seconds
        rd.apply_plan(MODEL, cut.plan, folder, matrices=cut.matrices)
        refitted = folder.with_name("refitted")
        seconds = draw.refit(folder, refitted) if cut.refit else 0.0
        written = refitted if refitted.exists() else folder
        facts = {"checkpoint": "ordinary", "mb": f"{weight_bytes(written) / 1e6:.2f}"}
        pruned = rd.load_model(written, dtype=torch.float32)
        return self._held.comparison(pruned), facts, seconds

    def _texts(self, seen: Sequence[str]) -> dict[str, list[str]]:
        if not self._shift:
            return {"held out": list(DOMAINS)}
        return {"seen": list(seen), "unseen": [d for d in DOMAINS if d not in seen]}

    def _row(self, name: str, ratio: float, text: str, each: list[dict[str, float]]) -> Row:
        row: Row = {"method": name, "ratio": ratio, "text": text, "draws": len(each)}
        row |= self.facts[name, ratio]
        row["cpu_s"] = f"{statistics.median(one['cpu_s'] for one in each):.2f}"
        for key in FIGURES:
            middle, half = spread([one[key] for one in each])
            row |= {key: f"{middle:.4f}", f"{key}_half": f"{half:.4f}"}
        return row


def figures(comparison: Comparison, groups: Sequence[str]) -> dict[str, float]:
    """Expected acceptance, KL divergence and perplexity on the text of some groups."""
    own = torch.isin(
        comparison.group, torch.tensor([comparison.groups.index(name) for name in groups])
    )
    mean: Tensor = comparison.sums[own].sum(dim=0) / comparison.counts[own].sum()
    values = (float(mean[3]), float(mean[2]), math.exp(mean[1]))
    return dict(zip(FIGURES, values, strict=True))


def main(arguments: list[str]) -> None:
    """Measures, prints, appends rows."""
    parser = argparse.ArgumentParser(prog="python -m bench methods_cpu", description=__doc__)
    parser.add_argument("--draws", type=int, default=5, help="calibration draws (default: 5)")
    parser.add_argument("--shift", action="store_true", help="calibrate on two domains of four")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="print rows, do not append them")
    options = parser.parse_args(arguments)
    names: Any = options.method or (SHIFTED if options.shift else METHODS)
    with torch.no_grad():
        found = Bench(options.draws, list(names), options.shift).run()
    if options.dry_run:
        print(*found, sep="\n")
    else:
        rows.write("methods_cpu", found)
