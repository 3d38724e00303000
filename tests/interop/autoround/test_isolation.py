"""Libraries that are installed are not started: importing AutoRound replaces blocks of models."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.driver.formats.build import AUTO_ROUND, FORMATS, plain_model

PROGRAM = """
import json, sys
from reap_driver.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, "auto_round" in sys.modules]))
"""
BY_NAME = {stored.name: stored for stored in reversed(FORMATS)}
MARLIN = {**AUTO_ROUND, "packing_format": "auto_round:marlin"}
CASES = {
    "AutoRound": (BY_NAME["AutoRound"], 0),
    "AutoRound for Marlin": (replace(BY_NAME["AutoRound"], settings=MARLIN), 3),
    "bitsandbytes 4-bit": (BY_NAME["bitsandbytes 4-bit"], 0),
    "torchao packed for a kernel": (BY_NAME["torchao packed for a kernel"], 3),
    "HQQ": (BY_NAME["HQQ"], 3),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_no_quantizer_is_started(name: str, dry: bool, tmp_path: Path) -> None:
    """Observed, or refused with the reason and the remedy; never the library's own error."""
    stored, code = CASES[name]
    plain = plain_model(tmp_path / "plain", stored.model)
    model = stored.write(plain, tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"input_ids": list(range(3, 67))}))
    words = ["observe", str(model), "--data", str(tmp_path / "data.jsonl"), "--seq-len", "32"]
    words += ["--dry-run"] if dry else ["--out", str(tmp_path / "stats.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [code, False], done.stderr
    if code:
        assert "observe the checkpoint that it was quantized from" in done.stderr
        assert "has no mixture-of-experts layer" not in done.stderr
