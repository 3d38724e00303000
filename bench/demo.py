"""The figures of the demo as rows: perplexity and agreement of every pruned bundled model."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bench import rows
from reap_driver.demo.run import run_demo


def _row(name: str, ratio: float, results: list[dict[str, Any]]) -> dict[str, object]:
    perplexity = [result["perplexity"] for result in results]
    agreement = [100 * result["agreement"] for result in results]
    return {
        "criterion": name,
        "ratio": ratio,
        "experts": results[0]["experts"],
        "seeds": len(results),
        "perplexity": f"{sum(perplexity) / len(results):.2f}",
        "perplexity_min": f"{min(perplexity):.2f}",
        "perplexity_max": f"{max(perplexity):.2f}",
        "agreement": f"{sum(agreement) / len(results):.1f}",
        "agreement_min": f"{min(agreement):.1f}",
        "agreement_max": f"{max(agreement):.1f}",
    }


def main(arguments: list[str]) -> None:
    """Runs the demo once and appends a row for the unpruned model and each criterion and ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="reap-bench-") as folder:
        report = run_demo(Path(folder), seed=options.seed, quiet=True)
    found: list[dict[str, object]] = [_row("unpruned", 0.0, [report["unpruned"]])]
    for ratio in sorted({result["ratio"] for result in report["pruned"]}):
        for name in dict.fromkeys(result["criterion"] for result in report["pruned"]):
            chosen = [
                result
                for result in report["pruned"]
                if (result["criterion"], result["ratio"]) == (name, ratio)
            ]
            found.append(_row(name, ratio, chosen))
    rows.write("demo", [{**row, "demo_s": report["seconds"]} for row in found])
