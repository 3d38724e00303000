"""The table of engines in docs/support.md, from what their tests measured: never typed.

`make test-engines` leaves one file for each engine in out/interop/engines;
`python -m tests.interop.engines.table` rewrites the table from them.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/support.md"
BEGIN, END = "<!-- engines -->\n", "<!-- end engines -->"
RESULTS = ROOT / "out/interop/engines"
ENVIRONMENTS = ROOT / "tests/interop/environments"
# Environment -> title of its column, and the package that is the engine.
ENGINES = {"llamacpp": ("llama.cpp", "xllamacpp"), "mlx": ("MLX", "mlx-lm")}
# architecture -> {"model", "experts": [whole, pruned], "difference": [whole, pruned]}
Rows = dict[str, dict[str, Any]]


def record(environment: str, rows: Rows) -> None:
    """What a whole run of an engine's tests measured, in place of what an earlier run did."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{environment}.json").write_text(json.dumps(rows, indent=1) + "\n")


def pinned(environment: str) -> str:
    """The engine's package with the version that its environment installs."""
    package = ENGINES[environment][1]
    [version] = re.findall(
        rf"^{package}==(\S+)$", (ENVIRONMENTS / f"{environment}.txt").read_text(), re.MULTILINE
    )
    return f"{package} {version}"


def heads() -> list[str]:
    """Titles of the columns, with the versions that the environments pin."""
    titles = [f"{title} ({pinned(name)})" for name, (title, _) in ENGINES.items()]
    return ["architecture", "configuration of", "experts", *titles]


def table(results: dict[str, Rows]) -> str:
    """One row for each architecture."""
    head = heads()
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    first = next(iter(results.values()))
    for architecture, row in first.items():
        cells = [architecture, row["model"], "{} to {}".format(*row["experts"])]
        for rows in results.values():
            assert rows[architecture]["experts"] == row["experts"]
            whole, pruned = rows[architecture]["difference"]
            cells.append(f"{whole:.1e} whole, {pruned:.1e} pruned")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrites the page."""
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ENGINES}
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + table(results) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
