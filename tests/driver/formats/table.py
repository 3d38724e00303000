"""What `observe` and `apply` do with a checkpoint of each format, for the table in docs/formats.md.

`python -m tests.driver.formats.table` records it and writes the table; a test checks every row.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import tables
from bench.rows import RESULTS, write
from bench.table_parts import newest
from reap_driver.cli.main import main
from reap_driver.compat.pretrained import read_model
from reap_driver.model.discover import MoELayer
from tests.driver.formats.build import FORMATS, Format, plain_model
from tests.driver.writer.saved import make_plan

Command = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """What the commands did: "yes", or "refused"."""

    dry_run: str
    observe: str
    apply: str

    @property
    def cells(self) -> tuple[str, str]:
        return self.observe, self.apply


def outcomes(stored: Format, source: Path, folder: Path, run: Command) -> Outcome:
    """Runs the commands on a checkpoint of the format, with a plan of its plain release.

    Args:
        stored: the format.
        source: the plain release.
        folder: for files.
        run: a command line, returning its exit code, stdout and stderr.
    """
    model = stored.write(source, folder / "model")
    (folder / "data.jsonl").write_text(json.dumps({"input_ids": list(range(3, 67))}))
    make_plan(source, read_model(source)[1], _half).save(folder / "plan.json")
    options = ("--data", folder / "data.jsonl", "--seq-len", 32, "--quiet")
    return Outcome(
        _outcome(run("observe", model, *options, "--dry-run")),
        _outcome(run("observe", model, *options, "--out", folder / "stats.safetensors")),
        _outcome(run("apply", model, folder / "plan.json", "--out", folder / "out")),
    )


def _half(layer: MoELayer, _: object) -> list[int]:
    """Every other expert: as many as fill words where routers are packed."""
    return list(range(0, layer.num_experts, 2))


def _outcome(done: Any) -> str:
    """Of one command; a refusal says what to do, and does not call the checkpoint damaged."""
    if done.code == 0:
        return "yes"
    assert done.code == 3, done.err
    assert "Traceback" not in done.err
    assert " checkpoint that it was made from" in done.err or "quantized from" in done.err, done.err
    return "refused"


def rows() -> dict[str, tuple[str, str]]:
    """What is recorded: format and layout -> observe, apply."""
    found = newest("formats", "format", "stored")
    return {f"{row['format']}, {row['stored']}": (row["observe"], row["apply"]) for row in found}


def _here(*words: object) -> Any:
    """A command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Done(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Done:
    """What a command line came to."""

    code: int
    out: str
    err: str


def record() -> None:
    """Runs everything, records it in place of what was recorded before, and writes the table."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        plain = {model: plain_model(root / model, model) for model in {f.model for f in FORMATS}}
        for number, stored in enumerate(FORMATS):
            folder = root / str(number)
            folder.mkdir()
            done = outcomes(stored, plain[stored.model], folder, _here)
            method = (stored.settings or {}).get("quant_method", "")
            row = {"format": stored.name, "stored": stored.layout, "method": method}
            found.append({**row, "observe": done.observe, "apply": done.apply})
    (RESULTS / "formats.csv").unlink(missing_ok=True)
    write("formats", found, facts={}, echo=False)
    tables.main()


if __name__ == "__main__":
    record()
