"""A pruned model gets back a part of what the cut took from its output."""

import json
import sys
import tempfile
from pathlib import Path

import reap_driver as rd

MODEL = Path(rd.__file__).parent / "demo" / "model"  # the bundled one

if __name__ == "__main__":
    out = sys.argv[1] if len(sys.argv) > 1 else "model-refitted"
    with tempfile.TemporaryDirectory() as folder:
        data, cut = Path(folder, "code.jsonl"), Path(folder, "cut")
        files = sorted(Path(rd.__file__).parent.glob("*/*.py"))[:40]
        texts = [{"text": path.read_text(encoding="utf-8")} for path in files]
        data.write_text("".join(json.dumps(text) + "\n" for text in texts))
        rd.prune(MODEL, f"{data}:16ktok", keep=16, seq_len=128, out=cut)
        done = rd.refit(cut, MODEL, f"{data}:16ktok", seq_len=128, out=out)
    for name, figures in done.evaluation.named.items():
        overall = figures.overall
        print(f"{name}: perplexity {overall.pruned_perplexity.value:.2f}", end=", ")
        print(f"expected acceptance {overall.acceptance.value:.3f}")
    print(f"{out} holds the {done.written}")
