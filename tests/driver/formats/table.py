"""The table in docs/formats.md: what `observe` and `apply` did with a checkpoint of each format.

`python -m tests.driver.formats.table` writes it; a test checks every row.
"""

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap_driver.cli.main import main
from reap_driver.compat.pretrained import read_model
from reap_driver.model.discover import MoELayer
from tests.driver.formats.build import FORMATS, Format, plain_model
from tests.driver.writer.saved import make_plan

DOCS = Path(__file__).parents[3] / "docs" / "formats.md"
BEGIN, END = "<!-- formats -->\n", "<!-- end -->"
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
    """The table as it stands: format and layout -> observe, apply."""
    lines = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {f"{name}, {layout}": (seen, cut) for name, layout, seen, cut in cells}


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


def write() -> None:
    """Runs everything and writes the table."""
    lines = ["| format | stored | observe | apply |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        plain = {model: plain_model(root / model, model) for model in {f.model for f in FORMATS}}
        for number, stored in enumerate(FORMATS):
            folder = root / str(number)
            folder.mkdir()
            found = outcomes(stored, plain[stored.model], folder, _here)
            lines.append("| " + " | ".join((stored.name, stored.layout, *found.cells)) + " |")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write())
