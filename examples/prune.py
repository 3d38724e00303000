"""Prunes the bundled model from Python, and says what it cost."""

import json
import sys
from pathlib import Path

import reap_driver as rd

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "example")
OUT.mkdir(exist_ok=True)
MODEL = Path(rd.__file__).parent / "demo" / "model"
texts = [f"def add_{i}(first, second):\n    return first + second + {i}\n" for i in range(100)]
(OUT / "code.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

pruned = rd.prune(MODEL, data=OUT / "code.jsonl", ratio=0.5, seq_len=128, out=OUT / "half")
print(pruned)
print(rd.compare(MODEL, OUT / "half", data=OUT / "code.jsonl", sequences=8, seq_len=128))
